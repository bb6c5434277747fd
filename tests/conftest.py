"""Fixtures shared by all tests. A server starts when the first test asks for it and ends with the test run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import boto3
import pytest
import redis
from botocore.config import Config

from app.db.migrate import upgrade
from app.settings import Settings, StorageSettings
from tests import servers, swift_server
from tests.factories.guards import storage_outside_of_transactions
from tests.factories.pace import slowness
from tests.swift_server import S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Hundreds of processes of this project are started: without bytecode each of them would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# What would make the code under test use the developer's own database, broker or storage.
_SERVICE_VARIABLES = (
    "DATABASE_URL",
    "BROKER_URL",
    "STORAGE_URL",
    "S3_ENDPOINT_URL",
    "S3_PUBLIC_ENDPOINT_URL",
    "S3_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "ANNEAL_HOST",
    "ANNEAL_PORT",
    "ANNEAL_REQUIRE_KEYS",
)


@pytest.fixture(scope="session", autouse=True)
def machine_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers of the tests neither wait for those of the developer's nor hold them up; what the client keeps goes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKER_LOCK_DIR", str(tmp_path_factory.mktemp("locks")))
        patch.setenv("ANNEAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def transactions_without_storage() -> Iterator[None]:
    """Also where a test does not think of it."""
    with storage_outside_of_transactions():
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_left_in_the_checkout() -> Iterator[None]:
    """Libraries that write where they stand do so in a folder that goes."""
    root = Path(__file__).resolve().parents[1]
    before = {f.name for f in root.iterdir()}
    yield
    left = [f.name for f in root.iterdir() if f.is_file() and f.name not in before]
    assert not left, f"files that tests left in the checkout: {left}"


# Modules whose tests measure, or load the machine: nothing else may run there meanwhile. `make test` runs all others
# side by side first (`-m "not alone"`), then these one by one.
_ALONE = (
    "gpu/test_job.py",
    "gpu/test_stages.py",
    "unit/test_benchmark.py",
    "unit/test_disturbance.py",
    "unit/test_goodput_proven.py",
    "unit/test_machine.py",
    "unit/test_measure_again.py",
    "unit/test_never_slower.py",
    "unit/test_profile.py",
    "unit/test_shapes.py",
    "unit/test_sweep.py",
    "integration/test_busy_machine.py",
    "integration/test_hostile_connections.py",
    "integration/test_hostile_load.py",
    "integration/test_training_auto.py",
)


_TIMEOUT_S = 300.0  # as pyproject.toml has it
_LONGEST_S = 380.0  # the Makefile ends a process whose test takes 400


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.as_posix().endswith(_ALONE):
            item.add_marker(pytest.mark.alone)
        limit = item.get_closest_marker("timeout")
        allowed = _TIMEOUT_S if limit is None else float(limit.args[0])
        if slowness() > 1 and allowed < _LONGEST_S:
            item.add_marker(pytest.mark.timeout(min(allowed * slowness(), _LONGEST_S)), append=False)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server: the URL of its maintenance database, as a superuser. Tests take `fresh_postgres`."""
    with servers.postgres() as url:
        yield url


@pytest.fixture
def fresh_postgres(postgres_url: str) -> Iterator[str]:
    """A new, empty PostgreSQL database: `postgresql://user:password@host:port/name`."""
    with servers.new_database(postgres_url) as url:
        yield url


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str) -> Iterator[str]:
    """The URL of a migrated database that is copied, and that nobody else may be connected to."""
    with servers.new_database(postgres_url) as url:
        upgrade(Settings(DATABASE_URL=url).database)
        yield url


@pytest.fixture
def migrated_postgres(postgres_url: str, postgres_template: str) -> Iterator[str]:
    """A new PostgreSQL database with all tables and no rows, as `fresh_postgres` but for these."""
    with servers.new_database(postgres_url, template=postgres_template) as url:
        yield url


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis server: `redis://:password@host:port/0`. Its content is shared between tests; see `fresh_redis`."""
    with servers.redis_server() as url:
        yield url


@pytest.fixture
def fresh_redis(redis_url: str) -> str:
    """The Redis server, emptied."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return redis_url


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server (OpenStack Swift); installed on first use, and a test fails where that is not possible."""
    with swift_server.swift() as server:
        yield server


@dataclass(frozen=True)
class S3Bucket:
    """A bucket on the S3 server of the tests."""

    server: S3Server
    name: str

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that make the service use this bucket."""
        return {
            "STORAGE_URL": f"s3://{self.name}",
            "S3_ENDPOINT_URL": self.server.endpoint_url,
            "S3_REGION": self.server.region,
            "AWS_ACCESS_KEY_ID": self.server.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.server.secret_access_key,
        }

    def settings(self, **overrides: Any) -> StorageSettings:
        """The storage settings for this bucket; `overrides` by the names of the variables."""
        values = {**self.variables, **overrides}
        return StorageSettings.model_validate({"url": values.pop("STORAGE_URL"), **values})

    @contextmanager
    def client(self) -> Iterator[S3Client]:
        client = boto3.client(
            "s3",
            endpoint_url=self.server.endpoint_url,
            aws_access_key_id=self.server.access_key_id,
            aws_secret_access_key=self.server.secret_access_key,
            region_name=self.server.region,
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )
        try:
            yield client
        finally:
            client.close()


@pytest.fixture
def fresh_bucket(s3_server: S3Server) -> S3Bucket:
    """A new, empty bucket; it goes with the server."""
    return new_bucket(s3_server)


def new_bucket(s3_server: S3Server) -> S3Bucket:
    bucket = S3Bucket(s3_server, f"test-{uuid4().hex[:12]}")
    with bucket.client() as client:
        client.create_bucket(Bucket=bucket.name)
    return bucket


@pytest.fixture
def tmp_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings of the embedded default with its home in a temporary folder; `ANNEAL_HOME` says the same, so that
    child processes and `load_settings()` agree."""
    for name in _SERVICE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("ANNEAL_HOME", str(home))
    return Settings(home=home)
