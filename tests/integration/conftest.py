"""Migrated databases of both kinds, and a service around each."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.blobs.content import ContentStore
from app.db.base import make_engine, utcnow
from app.db.ids import new_id
from app.db.orm import LOCAL_TENANT, Dataset, Job, SourceModel
from app.db.uow import Database
from app.domain.spec import OptimizationSpec
from app.jobs.ledger import Claim, JobLedger
from app.jobs.schedule import Offer
from app.jobs.service import JobService
from app.settings import Settings, WorkerSettings
from app.storage.local import LocalStore
from tests.factories.migrated import migrated_sqlite


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind; a migrated one where the test takes `database`."""
    migrated = "database" in request.fixturenames
    if request.param == "sqlite":
        if migrated:
            shutil.copy(migrated_sqlite(), tmp_path / "test.db")
        return f"sqlite:///{tmp_path / 'test.db'}"
    url: str = request.getfixturevalue("migrated_postgres" if migrated else "fresh_postgres")
    return Settings(DATABASE_URL=url).database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    db = Database(make_engine(database_url))
    yield db
    db.close()


@dataclass
class Desk:
    """Job service and ledger over one database; what they dispatch is collected."""

    db: Database
    service: JobService
    ledger: JobLedger
    content: ContentStore
    scratch: Path
    sent: list[str] = field(default_factory=list)

    def add_model(self, tenant_id: str = LOCAL_TENANT) -> SourceModel:
        model = SourceModel(
            id=new_id("mdl"),
            tenant_id=tenant_id,
            name="net",
            filename="net.onnx",
            format="onnx",
            sha256="0" * 64,
            size_bytes=1,
            opset=17,
            inputs=[{"name": "x", "dtype": "float32", "shape": ["n", 4]}],
            outputs=[{"name": "y", "dtype": "float32", "shape": ["n", 2]}],
            detail={},
            created_at=utcnow(),
        )
        with self.db.write() as uow:
            uow.session.add(model)
        return model

    def add_dataset(self, tenant_id: str = LOCAL_TENANT) -> Dataset:
        dataset = Dataset(
            id=new_id("dst"),
            tenant_id=tenant_id,
            name="data",
            filename="data.npz",
            format="npz",
            sha256="1" * 64,
            size_bytes=1,
            samples=10,
            arrays=[{"name": "x", "dtype": "float32", "shape": [4]}],
            created_at=utcnow(),
        )
        with self.db.write() as uow:
            uow.session.add(dataset)
        return dataset

    def put_blob(self, sha256: str) -> None:
        path = self.scratch / sha256
        path.write_bytes(b"x")
        self.content.put(LOCAL_TENANT, path, sha256)

    def submit(self) -> Job:
        spec = OptimizationSpec(model_id=self.add_model().id)
        job, created = self.service.submit(LOCAL_TENANT, spec, correlation_id="test", idempotency=None)
        assert created
        return job

    def claim(self, job: Job, owner: str = "w1", ledger: JobLedger | None = None) -> Claim | None:
        """As a worker that serves the queue of this job, whose turn it is to be."""
        claim = (ledger or self.ledger).claim(Offer(owner, (job.queue,)))
        assert claim is None or claim.job_id == job.id
        return claim

    def job(self, job_id: str) -> Job:
        return self.service.get(LOCAL_TENANT, job_id)


@pytest.fixture
def desk(database: Database, tmp_path: Path) -> Desk:
    settings = Settings(home=tmp_path, worker=WorkerSettings(lease_s=0.3, redispatch_s=0.2, max_attempts=3))
    content = ContentStore(LocalStore(tmp_path / "blobs"))
    sent: list[str] = []

    def dispatch(job: Job) -> bool:
        sent.append(job.id)
        return True

    ledger = JobLedger(database, content, dispatch, settings.worker)
    service = JobService(database, content, dispatch, settings)
    return Desk(database, service, ledger, content, tmp_path, sent)
