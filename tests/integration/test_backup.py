"""Backup and restore as docs/backup.md has them: PostgreSQL and blobs are destroyed while a job is in its stages, and
on other ones everything goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from tests import servers
from tests.conftest import S3Bucket, S3Server, new_bucket
from tests.factories.deployment import Deployment, deployment, kill, submit_case, wait_for_stage, write_case

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

pytestmark = pytest.mark.timeout(280)


def _postgres(tool: str, *arguments: str) -> None:
    binaries = servers.postgres_binaries()
    done = subprocess.run([binaries / tool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _copy(source: Path, target: Path) -> None:
    """As `rsync -a --exclude=/tmp`."""
    shutil.copytree(source, target, ignore=lambda folder, _: {"tmp"} if Path(folder) == source else set())


def _doctor(deployed: Deployment, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "app.admin", "--json", "doctor", *arguments]
    done = subprocess.run(command, env=deployed.environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


class Folders:
    """Blobs in folders, messages in others."""

    def __init__(self, folder: Path) -> None:
        self._first, self._second, self._backup = folder / "first", folder / "second", folder / "blobs"
        self.before: dict[str, str] = {}
        self.after: dict[str, str] = {}

    def back_up(self) -> None:
        _copy(self._first / "blobs", self._backup)

    def restore(self) -> None:
        self._second.mkdir()
        shutil.copytree(self._backup, self._second / "blobs")


class Buckets:
    """Blobs in a bucket that is destroyed, messages in a Redis that knows nothing of them afterwards."""

    def __init__(self, server: S3Server, redis_url: str) -> None:
        self._redis = redis_url
        self._first, self._backup, self._second = (new_bucket(server) for _ in range(3))
        self.before = {"BROKER_URL": redis_url, **self._first.variables}
        self.after = {"BROKER_URL": redis_url, **self._second.variables}

    def back_up(self) -> None:
        self._copy(self._first, self._backup)

    def restore(self) -> None:
        with self._first.client() as client:
            for key in _keys(client, self._first):
                client.delete_object(Bucket=self._first.name, Key=key)
        with redis.Redis.from_url(self._redis) as broker:
            broker.flushall()
        self._copy(self._backup, self._second)

    def _copy(self, source: S3Bucket, target: S3Bucket) -> None:
        """As `aws s3 sync`."""
        with source.client() as client:
            for key in _keys(client, source):
                body = client.get_object(Bucket=source.name, Key=key)["Body"].read()
                client.put_object(Bucket=target.name, Key=key, Body=body)


def _keys(client: S3Client, bucket: S3Bucket) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name)
    return [found["Key"] for page in pages for found in page.get("Contents", ())]


@pytest.fixture(params=["folders", "S3 and Redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folders | Buckets:
    if request.param == "folders":
        return Folders(tmp_path)
    return Buckets(request.getfixturevalue("s3_server"), request.getfixturevalue("fresh_redis"))


def test_destroyed_and_restored(postgres_url: str, tmp_path: Path, place: Folders | Buckets) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    dump = tmp_path / "anneal.dump"
    with (
        servers.new_database(postgres_url) as url,
        deployment(first, {"DATABASE_URL": url, **place.before}) as deployed,
    ):
        db = deployed.database()
        with deployed.client() as client:
            deleted = client.upload_model(write_case(tmp_path, 61)[0])
            kept = client.upload_model(write_case(tmp_path, 62)[0])
            running = submit_case(client, tmp_path, 60)["id"]
            worker = deployed.start_hurried_worker()
            assert wait_for_stage(db, running, {"benchmark", "validate", "build"}) is not None
            _postgres("pg_dump", "--format=custom", f"--file={dump}", url)
            # The service goes on between the two.
            client.delete_model(deleted.id)
            late = client.upload_model(write_case(tmp_path, 63)[0])
            place.back_up()
        kill(worker)
        db.close()
        key = deployed.api_key
    shutil.rmtree(first)  # the database has gone with its `with`

    with servers.new_database(postgres_url) as url:
        _postgres("pg_restore", "--no-owner", f"--dbname={url}", str(dump))
        place.restore()
        with deployment(second, {"DATABASE_URL": url, **place.after}) as restored:
            code, told = _doctor(restored)
            lacking = [("missing", deleted.sha256)]
            assert (code, [(line["problem"], line["what"]) for line in told if "what" in line]) == (1, lacking)
            restored.api_key = key  # the one from before
            restored.start_hurried_worker()
            with restored.client() as client:
                job = client.wait(running)
                assert job.status == "succeeded", restored.logs()
                assert any(stage.cached for stage in job.stages), "what had finished before the dump is not done again"
                client.download_bundle(job.engine_ids[0], tmp_path / "bundle.zip")
                assert {kept.id, deleted.id} <= {model.id for model in client.models()}
                assert late.id not in {model.id for model in client.models()}
                client.upload_model(write_case(tmp_path, 61)[0])  # replaces what is missing
            assert _doctor(restored, "--hash")[0] == 0
