"""The collector, on SQLite and PostgreSQL: what nothing needs leaves storage, and nothing else does."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from app.blobs import collector
from app.blobs.collector import Collector
from app.blobs.content import ContentStore, blob_key
from app.blobs.references import keep_result
from app.db.base import make_engine, utcnow
from app.db.ids import new_id
from app.db.migrate import upgrade
from app.db.orm import LOCAL_TENANT, Blob, Engine, IdempotencyKey, SourceModel, StageResult, Tenant, Upload, Worker
from app.db.uow import Database
from app.domain.spec import OptimizationSpec
from app.inspection.pool import Inspector
from app.jobs.ledger import JobLedger
from app.jobs.service import JobService
from app.library import IncomingFile
from app.settings import CollectorSettings, Settings
from app.source_models.service import SourceModelService
from app.storage.base import BlobNotFound
from app.storage.s3 import S3Store
from tests.conftest import S3Bucket
from tests.factories.onnx_models import mlp
from tests.integration.conftest import Desk

_OLD = timedelta(days=31)
_KINDS = (
    "tallied", "results", "idempotency_keys", "workers", "audit_events", "webhook_deliveries", "webhook_endpoints",
    "temporary_files", "expired", "blobs", "orphans",
)  # fmt: skip
_NOTHING = dict.fromkeys(_KINDS, 0)


def _settings(home: Path, grace_s: float) -> Settings:
    return Settings(home=home, collector=CollectorSettings(grace_s=grace_s))


def _collector(desk: Desk, grace_s: float = 0) -> Collector:
    return Collector(desk.db, desk.content, _settings(desk.scratch, grace_s))


def _put(desk: Desk, name: str, tenant_id: str = LOCAL_TENANT) -> str:
    """Store a file without a row, as a worker does that dies afterwards."""
    path = desk.scratch / "new"
    path.write_text(name)
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    desk.content.put(tenant_id, path, sha256, move=True)
    return sha256


def _record(desk: Desk, name: str) -> str:
    sha256 = _put(desk, name)
    seen = desk.content.sight(desk.db, LOCAL_TENANT, [sha256])
    with desk.db.write() as uow:
        desk.content.record(uow.session, seen, {sha256: len(name)})
    return sha256


def _result(desk: Desk, key: str, *digests: str, used: timedelta = timedelta()) -> None:
    files = [{"name": "model.onnx", "sha256": sha256, "size_bytes": 1} for sha256 in digests]
    row = StageResult(
        tenant_id=LOCAL_TENANT,
        key=key * 64,
        stage="export",
        outputs={"model": files},
        data={},
        seconds=1.0,
        created_at=utcnow() - used,
        used_at=utcnow() - used,
    )
    with desk.db.write() as uow:
        keep_result(uow.session, row)


def _age(desk: Desk, sha256: str, seconds: float) -> None:
    path = desk.content.store.local_path(blob_key(LOCAL_TENANT, sha256))
    assert path is not None
    then = time.time() - seconds
    os.utime(path, (then, then))
    with desk.db.write() as uow:
        row = uow.session.get(Blob, (LOCAL_TENANT, sha256))
        if row is not None:
            row.created_at = utcnow() - timedelta(seconds=seconds)


def _exists(desk: Desk, sha256: str) -> bool:
    with desk.db.read() as session:
        known = desk.content.known(session, LOCAL_TENANT, sha256)
    there = desk.content.exists(LOCAL_TENANT, sha256)
    assert known == there
    return there


def _passes(collector: Collector, times: int = 3) -> dict[str, int]:
    counts = [collector.collect() for _ in range(times)]
    return {name: sum(c[name] for c in counts) for name in _NOTHING}


def test_deleted_model_leaves_storage_with_what_was_made_of_it(desk: Desk, tmp_path: Path) -> None:
    settings = _settings(tmp_path, 0)
    inspector = Inspector(settings.limits)
    models = SourceModelService(desk.db, desk.content, settings, inspector)
    source = tmp_path / "net.onnx"
    source.write_bytes(mlp().SerializeToString())
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    size = source.stat().st_size
    model, _ = models.create(LOCAL_TENANT, None, IncomingFile(source, "net.onnx", sha256, size), None)
    inspector.close()
    exported, simplified, other = (_record(desk, name) for name in ("exported", "simplified", "another model's"))
    _result(desk, "a", exported)
    _result(desk, "b", simplified)
    _result(desk, "c", other)
    models.delete(LOCAL_TENANT, model.id)
    assert not desk.content.exists(LOCAL_TENANT, sha256)

    assert _passes(Collector(desk.db, desk.content, settings)) == _NOTHING, "still in use within the month"
    with desk.db.write() as uow:
        for key in "ab":
            uow.session.get_one(StageResult, (LOCAL_TENANT, key * 64)).used_at = utcnow() - _OLD
    counts = _passes(Collector(desk.db, desk.content, settings))
    assert counts == {**_NOTHING, "results": 2, "blobs": 2}
    assert [_exists(desk, d) for d in (exported, simplified, other)] == [False, False, True]


def test_nothing_referenced_goes(desk: Desk) -> None:
    names = ("model", "data set", "upload", "engine", "bundle", "report", "manifest", "result")
    kept = {name: _record(desk, name) for name in names}
    model, dataset = desk.add_model(), desk.add_dataset()
    job, _ = desk.service.submit(
        LOCAL_TENANT, OptimizationSpec(model_id=model.id), correlation_id="test", idempotency=None
    )
    with desk.db.write() as uow:
        session = uow.session
        session.merge(model).sha256 = kept["model"]
        session.merge(dataset).sha256 = kept["data set"]
        row = session.merge(job)
        row.report_sha256, row.manifest_sha256 = kept["report"], kept["manifest"]
        session.add(_engine(job.id, model.id, kept["engine"], kept["bundle"]))
        session.add(_upload(kept["upload"], "completed"))
    _result(desk, "a", kept["result"])
    consumed = _record(desk, "consumed upload")
    with desk.db.write() as uow:
        uow.session.add(_upload(consumed, "consumed"))

    assert _passes(_collector(desk)) == {**_NOTHING, "blobs": 1}
    assert {name: _exists(desk, sha256) for name, sha256 in kept.items()} == dict.fromkeys(names, True)
    assert not _exists(desk, consumed)


def test_referenced_file_without_a_row_stays(desk: Desk) -> None:
    sha256 = _put(desk, "model")
    model = desk.add_model()
    with desk.db.write() as uow:
        uow.session.get_one(SourceModel, model.id).sha256 = sha256
    assert _passes(_collector(desk)) == _NOTHING
    assert desk.content.exists(LOCAL_TENANT, sha256)


def test_orphans_go_after_the_grace(desk: Desk) -> None:
    file, row, young = _put(desk, "file"), _record(desk, "row"), _put(desk, "young")
    careful = _collector(desk, grace_s=3600)
    assert _passes(careful) == _NOTHING
    for sha256 in (file, row):
        _age(desk, sha256, 7200)
    assert _passes(careful) == {**_NOTHING, "blobs": 1, "orphans": 1}
    assert [_exists_anywhere(desk, d) for d in (file, row, young)] == [False, False, True]


def test_content_stored_again_counts_as_new(desk: Desk) -> None:
    file, row = _put(desk, "file"), _record(desk, "row")
    for name, sha256 in (("file", file), ("row", row)):
        _age(desk, sha256, 7200)
        assert _put(desk, name) == sha256  # by a worker that has yet to note it
    assert _passes(_collector(desk, grace_s=3600)) == _NOTHING
    assert _exists_anywhere(desk, file)
    assert _exists(desk, row)


def test_reference_made_after_the_first_look_is_seen(desk: Desk) -> None:
    """A result, and a model, noted between the scan and the removal."""
    result, model_file, unneeded = (_record(desk, name) for name in ("result", "model", "unneeded"))
    walk = _collector(desk)._walk_recorded()
    assert next(walk) is None
    batch = next(walk)
    assert batch is not None
    assert batch.digests == sorted((result, model_file, unneeded))
    _result(desk, "a", result)
    model = desk.add_model()
    with desk.db.write() as uow:
        uow.session.get_one(SourceModel, model.id).sha256 = model_file
    assert _collector(desk)._remove(batch) == 1
    assert [_exists(desk, d) for d in (result, model_file, unneeded)] == [True, True, False]


def test_tenants_are_apart(desk: Desk) -> None:
    with desk.db.write() as uow:
        uow.session.add(Tenant(id="tnt_other", name="other"))
    sha256 = _record(desk, "shared content")
    _put(desk, "shared content", "tnt_other")
    _result(desk, "a", sha256)
    assert _passes(_collector(desk)) == {**_NOTHING, "orphans": 1}
    assert _exists(desk, sha256)
    assert not desk.content.exists("tnt_other", sha256)


def test_row_without_bytes_goes(desk: Desk) -> None:
    """Bytes that were taken from the storage by others."""
    sha256 = _record(desk, "half removed")
    desk.content.store.delete(blob_key(LOCAL_TENANT, sha256))
    assert _passes(_collector(desk))["blobs"] == 1
    assert not _exists(desk, sha256)


def test_foreign_files_and_uploads_stay(desk: Desk) -> None:
    store = desk.content.store
    keys = [f"tenants/{LOCAL_TENANT}/uploads/upl_1", f"tenants/{LOCAL_TENANT}/blobs/notes", "backup/blobs/ab/cd"]
    for key in keys:
        path = desk.scratch / "foreign"
        path.write_text(key)
        store.put_file(key, path)
    assert _passes(_collector(desk)) == _NOTHING
    assert all(store.size(key) for key in keys)


def test_old_rows_and_temporary_files_go(desk: Desk) -> None:
    with desk.db.write() as uow:
        for age in (1, 8):
            then = utcnow() - timedelta(days=age)
            uow.session.add(
                IdempotencyKey(
                    tenant_id=LOCAL_TENANT, key=f"{age}", request_sha256="0" * 64, resource_id="x", created_at=then
                )
            )
            uow.session.add(
                Worker(
                    id=f"w{age}",
                    hostname="h",
                    hardware={},
                    backends=[],
                    formats=[],
                    queues=[],
                    started_at=then,
                    last_seen_at=then,
                    stopped_at=then,
                )
            )
    left = desk.scratch / "blobs" / "tmp" / "left"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"half a file")
    assert _collector(desk, grace_s=3600).collect() == {**_NOTHING, "idempotency_keys": 1, "workers": 1}
    assert _collector(desk).collect() == {**_NOTHING, "temporary_files": 1}
    with desk.db.read() as session:
        assert session.get(Worker, "w1") is not None
        assert session.get(IdempotencyKey, (LOCAL_TENANT, "1")) is not None


def test_passes_are_small_and_reach_everything(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_ROWS": 3, "_FILES": 4, "_PAGE": 5, "_PAGES": 2, "_BATCH": 2}.items():
        monkeypatch.setattr(collector, name, value)
    kept = [_record(desk, f"kept {i}") for i in range(12)]
    _result(desk, "f", *kept)
    for i in range(12):
        _record(desk, f"unneeded {i}")
        _put(desk, f"orphan {i}")
    for i in range(7):
        _result(desk, f"{i}", used=_OLD)
    worker = _collector(desk)
    passes = [worker.collect() for _ in range(20)]
    assert [p["results"] for p in passes[:4]] == [3, 3, 1, 0]
    assert max(max(p["blobs"], p["orphans"]) for p in passes) <= 5, "four, and what is left of a batch of two"
    assert sum(p["blobs"] for p in passes) == sum(p["orphans"] for p in passes) == 12
    assert all(_exists(desk, sha256) for sha256 in kept)


def test_collectors_beside_writers(desk: Desk) -> None:
    """Two collectors without any grace, and a worker that stores and notes results all the while: whatever was noted
    has its bytes, and what is removed is removed once."""
    for i in range(60):
        _record(desk, f"unneeded {i}")
    counts: list[dict[str, int]] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def collect() -> None:
        try:
            own = _collector(desk)
            while not done.is_set():
                counts.append(own.collect())
            counts.append(_passes(own))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=collect) for _ in range(2)]
    for thread in threads:
        thread.start()
    noted = list(_noted(desk, 25))
    done.set()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert sum(c["blobs"] for c in counts) == 60
    assert noted
    assert all(_exists(desk, sha256) for sha256 in noted)


def test_s3(fresh_bucket: S3Bucket, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'test.db'}"
    upgrade(url)
    db, store = Database(make_engine(url)), S3Store(fresh_bucket.name, "anneal", fresh_bucket.settings())
    try:
        content, settings = ContentStore(store), _settings(tmp_path, 0)
        ledger = JobLedger(db, content, lambda _job: True, settings.worker)
        desk = Desk(db, JobService(db, content, lambda _job: True, settings), ledger, content, tmp_path)
        kept, unneeded, orphan = _record(desk, "kept"), _record(desk, "unneeded"), _put(desk, "orphan")
        _result(desk, "a", kept)
        time.sleep(1.1)  # S3 tells times in seconds
        assert _passes(_collector(desk, grace_s=3600)) == _NOTHING
        assert _passes(_collector(desk)) == {**_NOTHING, "blobs": 1, "orphans": 1}
        assert [_exists_anywhere(desk, d) for d in (kept, unneeded, orphan)] == [True, False, False]
    finally:
        store.close()
        db.close()


def _noted(desk: Desk, count: int) -> Iterator[str]:
    """Store files and note them as results; those that a collector without grace took before are not noted."""
    for i in range(count):
        name = f"made {i}"
        path = desk.scratch / name
        path.write_text(name)
        sha256 = hashlib.sha256(name.encode()).hexdigest()
        desk.content.put(LOCAL_TENANT, path, sha256, move=True)
        files = [{"name": "model.onnx", "sha256": sha256, "size_bytes": len(name)}]
        try:
            seen = desk.content.sight(desk.db, LOCAL_TENANT, [sha256])
            with desk.db.write() as uow:
                desk.content.record(uow.session, seen, {sha256: len(name)})
                row = StageResult(
                    tenant_id=LOCAL_TENANT,
                    key=sha256,
                    stage="export",
                    outputs={"model": files},
                    data={},
                    seconds=1.0,
                )
                keep_result(uow.session, row)
        except BlobNotFound:
            continue
        yield sha256


def _exists_anywhere(desk: Desk, sha256: str) -> bool:
    return desk.content.exists(LOCAL_TENANT, sha256)


def _engine(job_id: str, model_id: str, sha256: str, bundle_sha256: str) -> Engine:
    return Engine(
        id=new_id("eng"),
        tenant_id=LOCAL_TENANT,
        job_id=job_id,
        model_id=model_id,
        backend="onnxruntime",
        format="onnx",
        precision="int8",
        filename="net.onnx",
        sha256=sha256,
        size_bytes=1,
        bundle_filename="net.zip",
        bundle_sha256=bundle_sha256,
        bundle_size_bytes=1,
        hardware={},
        runtime={},
        metrics={},
    )


def _upload(sha256: str, status: str) -> Upload:
    return Upload(
        id=new_id("upl"),
        tenant_id=LOCAL_TENANT,
        filename="net.onnx",
        size_bytes=1,
        sha256=sha256,
        part_size=1,
        storage_key="x",
        storage_upload_id="x",
        status=status,
        expires_at=utcnow() + timedelta(days=1),
    )
