"""Any sequence of what makes, needs, deletes, damages and collects blobs: what is referred to has its bytes, and what
is not is gone once its grace is over."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import select, update

from app.artifacts.service import EngineService
from app.blobs.collector import Collector
from app.blobs.content import ContentStore, blob_key, blob_prefix
from app.blobs.references import keep_result, references_between
from app.blobs.removal import discard
from app.blobs.usage import bytes_of
from app.db.base import make_engine, utcnow
from app.db.ids import new_id
from app.db.migrate import upgrade
from app.db.orm import LOCAL_TENANT, Blob, BlobRemoval, Engine, Job, SourceModel, StageResult, Upload
from app.db.uow import Database
from app.inspection.pool import Inspector
from app.jobs.service import JobService
from app.settings import CollectorSettings, Settings
from app.source_models.service import SourceModelService
from app.storage.local import LocalStore
from app.uploads.service import UploadService

_TEXTS = [f"content {'x' * n}" for n in range(6)]
_DIGESTS = {hashlib.sha256(text.encode()).hexdigest(): text for text in _TEXTS}
_GRACE_S = 3600
CONTENT = st.sampled_from(sorted(_DIGESTS))


class BlobLife(RuleBasedStateMachine):
    """`owners`: what there is, by id: (kind, the digests that it needs). Few contents, so that they are shared."""

    template: Path

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="anneal-test-blobs-"))
        shutil.copy(self.template, self.folder / "test.db")
        self.db = Database(make_engine(f"sqlite:///{self.folder / 'test.db'}"))
        self.content = ContentStore(LocalStore(self.folder / "blobs"))
        self.settings = Settings(home=self.folder, collector=CollectorSettings(grace_s=_GRACE_S))
        self.collector = Collector(self.db, self.content, self.settings)
        self.jobs = JobService(self.db, self.content, lambda _job: True, self.settings)
        self.uploads = UploadService(self.db, self.content, self.settings)
        self.inspector = Inspector(self.settings.limits)
        self.models = SourceModelService(self.db, self.content, self.settings, self.inspector)
        self.owners: dict[str, tuple[str, set[str]]] = {}
        self.keys = itertools.count()
        self.model_id = self._model("0" * 64)  # of all jobs and engines; needs nothing that is stored

    def teardown(self) -> None:
        if hasattr(self, "db"):
            self.inspector.close()
            self.db.close()
            shutil.rmtree(self.folder)

    # What makes something

    def _store(self, *digests: str) -> Any:
        for sha256 in digests:
            path = self.folder / "new"
            path.write_text(_DIGESTS[sha256])
            with self.db.read() as session:
                trusted = self.content.known(session, LOCAL_TENANT, sha256)
            self.content.put(LOCAL_TENANT, path, sha256, trusted=trusted)
        return self.content.sight(self.db, LOCAL_TENANT, digests)

    def _keep(self, kind: str, owner: str, row: Any, *digests: str) -> None:
        seen = self._store(*digests)
        with self.db.write() as uow:
            self.content.record(uow.session, seen, {d: len(_DIGESTS[d]) for d in digests})
            if kind == "result":
                keep_result(uow.session, row)
            else:
                uow.session.add(row)
        self.owners[owner] = (kind, set(digests))

    def _model(self, sha256: str) -> str:
        model_id = new_id("mdl")
        row = SourceModel(
            id=model_id, tenant_id=LOCAL_TENANT, name="m", filename="m.onnx", format="onnx", sha256=sha256,
            size_bytes=1, inputs=[], outputs=[], detail={},
        )  # fmt: skip
        if sha256 in _DIGESTS:
            self._keep("model", model_id, row, sha256)
        else:
            with self.db.write() as uow:
                uow.session.add(row)
        return model_id

    @rule(sha256=CONTENT)
    def upload_model(self, sha256: str) -> None:
        self._model(sha256)

    @rule(sha256=CONTENT)
    def complete_upload(self, sha256: str) -> None:
        upload_id = new_id("upl")
        row = Upload(
            id=upload_id, tenant_id=LOCAL_TENANT, filename="m.onnx", size_bytes=1, sha256=sha256, part_size=1,
            storage_key=f"tenants/{LOCAL_TENANT}/uploads/{upload_id}", storage_upload_id=upload_id, status="completed",
            expires_at=utcnow() + timedelta(days=1),
        )  # fmt: skip
        self._keep("upload", upload_id, row, sha256)

    @rule(engine=CONTENT, bundle=CONTENT, report=CONTENT)
    def deliver(self, engine: str, bundle: str, report: str) -> None:
        job_id, engine_id = new_id("job"), new_id("eng")
        job = Job(
            id=job_id, tenant_id=LOCAL_TENANT, model_id=self.model_id, status="succeeded", spec={}, queue="q",
            correlation_id="t", engine_ids=[engine_id], report_sha256=report, finished_at=utcnow(),
        )  # fmt: skip
        self._keep("job", job_id, job, report)
        row = Engine(
            id=engine_id, tenant_id=LOCAL_TENANT, job_id=job_id, model_id=self.model_id, backend="b", format="f",
            precision="p", filename="e", sha256=engine, size_bytes=1, bundle_filename="b", bundle_sha256=bundle,
            bundle_size_bytes=1, hardware={}, runtime={}, metrics={},
        )  # fmt: skip
        self._keep("engine", engine_id, row, engine, bundle)

    @rule(first=CONTENT, second=CONTENT)
    def cache(self, first: str, second: str) -> None:
        key = f"{next(self.keys):064d}"
        files = [{"name": d, "sha256": d, "size_bytes": 1} for d in (first, second)]
        row = StageResult(
            tenant_id=LOCAL_TENANT, key=key, stage="s", outputs={"model": files}, data={}, seconds=1.0
        )  # fmt: skip
        self._keep("result", key, row, first, second)

    @rule(sha256=CONTENT)
    def die_before_noting(self, sha256: str) -> None:
        self._store(sha256)

    # What ends something

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owners)))
        kind, _ = self.owners.pop(owner)
        if kind == "model":
            self.models.delete(LOCAL_TENANT, owner)
        elif kind == "upload":
            self.uploads.abort(LOCAL_TENANT, owner)
        elif kind == "engine":
            EngineService(self.db, self.content).delete(LOCAL_TENANT, owner)
        elif kind == "job":
            engines = data.draw(st.booleans())
            with self.db.read() as session:
                gone = session.scalars(select(Engine.id).where(Engine.job_id == owner)).all()
            self.jobs.delete(LOCAL_TENANT, owner, engines=engines)
            for engine_id in gone if engines else ():
                del self.owners[engine_id]
        else:  # it expires
            with self.db.write() as uow:
                old = {"used_at": utcnow() - timedelta(days=365)}
                uow.session.execute(update(StageResult).where(StageResult.key == owner).values(old))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """A worker finds bytes of another digest: what was made is made again, as it were at once."""
        held = sorted(set().union(*(digests for _, digests in self.owners.values())))
        sha256 = data.draw(st.sampled_from(held))
        made_again = discard(self.db, self.content, LOCAL_TENANT, sha256)
        if made_again:
            for owner, (kind, digests) in [*self.owners.items()]:
                if kind == "result" and sha256 in digests:
                    del self.owners[owner]
        seen = self._store(sha256)
        with self.db.write() as uow:
            self.content.record(uow.session, seen, {sha256: len(_DIGESTS[sha256])})

    @rule(hours=st.sampled_from([0.5, 2]))
    def time_passes(self, hours: float) -> None:
        """Everything is older by that."""
        past = timedelta(hours=hours)
        with self.db.write() as uow:
            for blob in uow.session.scalars(select(Blob)):
                blob.created_at -= past
            for removal in uow.session.scalars(select(BlobRemoval)):
                removal.ends_at = removal.ends_at and removal.ends_at - past
        for found in self.content.store.list(blob_prefix(LOCAL_TENANT)):
            path = self.content.store.local_path(found.key)
            assert path is not None
            then = found.modified_at.timestamp() - past.total_seconds()
            os.utime(path, (then, then))

    @rule()
    def collect(self) -> None:
        for _ in range(2):  # results go first; what they held is found by the next round at the latest
            self.collector.collect()
            while not self.collector.round_over:
                self.collector.collect()
        needed = self._needed()
        with self.db.read() as session:
            for blob in session.scalars(select(Blob).where(Blob.sha256.not_in(needed))):
                assert utcnow() - blob.created_at < timedelta(seconds=_GRACE_S), "past its grace, and needed by nobody"
        for found in self.content.store.list(blob_prefix(LOCAL_TENANT)):
            sha256 = found.key.rpartition("/")[2]
            young = (utcnow() - found.modified_at).total_seconds() < _GRACE_S
            assert sha256 in needed or young or self._row_is_young(sha256), "past its grace, and needed by nobody"

    def _row_is_young(self, sha256: str) -> bool:
        with self.db.read() as session:
            row = session.get(Blob, (LOCAL_TENANT, sha256))
            return row is not None and (utcnow() - row.created_at).total_seconds() < _GRACE_S

    # What holds at any time

    def _needed(self) -> set[str]:
        with self.db.read() as session:
            rows = references_between(session, LOCAL_TENANT, "0" * 64, "f" * 64)
        return {reference.sha256 for reference in rows} & {*_DIGESTS}

    @invariant()
    def what_is_needed_is_there(self) -> None:
        if not hasattr(self, "owners"):
            return
        expected = set().union(*(digests for _, digests in self.owners.values())) if self.owners else set()
        assert expected <= self._needed()
        for sha256 in expected:
            path = self.content.store.local_path(blob_key(LOCAL_TENANT, sha256))
            assert path is not None
            assert path.read_text() == _DIGESTS[sha256]
            with self.db.read() as session:
                assert self.content.known(session, LOCAL_TENANT, sha256)
        kept = set().union(*(d for kind, d in self.owners.values() if kind != "result")) if self.owners else set()
        with self.db.read() as session:
            assert bytes_of(session, LOCAL_TENANT) == sum(len(_DIGESTS[sha256]) for sha256 in kept)


def test_any_life_of_blobs(tmp_path: Path) -> None:
    BlobLife.template = tmp_path / "template.db"
    upgrade(f"sqlite:///{BlobLife.template}")
    case = BlobLife.TestCase
    case.settings = settings(
        max_examples=10, stateful_step_count=30, deadline=None, suppress_health_check=[*HealthCheck]
    )
    case("runTest").runTest()
