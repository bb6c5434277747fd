"""The collector has thousands of files to remove: it goes on until they are gone, in small steps, and others have their
turn meanwhile."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from app.blobs import collector as collecting
from app.blobs.collector import Collector
from app.blobs.content import ContentStore, blob_key
from app.blobs.references import keep_result
from app.db.base import make_engine, utcnow
from app.db.migrate import upgrade
from app.db.orm import LOCAL_TENANT, Blob, StageResult
from app.db.uow import Database
from app.errors import AppError, storage_unavailable
from app.settings import CollectorSettings, Settings, WorkerSettings
from app.storage.local import LocalStore
from app.storage.s3 import S3Store
from tests.conftest import S3Bucket
from workers.pipeline.machine import MachineLock, Place
from workers.service import WorkerService

_LONG_AGO_S = 48 * 3600
_FILES = 40  # that one pass removes here: as in the service, and with fewer to begin with


@pytest.fixture
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_FILES", _FILES)


def _digests(name: str, count: int) -> list[str]:
    return [hashlib.sha256(f"{name} {i}".encode()).hexdigest() for i in range(count)]


def _leave(store: LocalStore, digests: list[str]) -> None:
    """Files of long ago without a row: what workers leave that are killed between storing and noting."""
    then = time.time() - _LONG_AGO_S
    for sha256 in digests:
        path = store.local_path(blob_key(LOCAL_TENANT, sha256))
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (then, then))


def _note(db: Database, digests: list[str], key: str = "") -> None:
    """Rows of long ago; held by a result where a key is given."""
    then = utcnow() - timedelta(seconds=_LONG_AGO_S)
    with db.write() as uow:
        uow.session.add_all(
            Blob(tenant_id=LOCAL_TENANT, sha256=sha256, size_bytes=1, created_at=then) for sha256 in digests
        )
        if key:
            files = [{"name": sha256, "sha256": sha256, "size_bytes": 1} for sha256 in digests]
            row = StageResult(
                tenant_id=LOCAL_TENANT, key=key, stage="export", outputs={"model": files}, data={}, seconds=1.0
            )
            keep_result(uow.session, row)


def _stored(content: ContentStore) -> set[str]:
    return {found.key.rpartition("/")[2] for found in content.store.list(f"tenants/{LOCAL_TENANT}/blobs/")}


def _round(collector: Collector) -> list[dict[str, int]]:
    passes = [collector.collect()]
    while not collector.round_over:
        passes.append(collector.collect())
    return passes


@pytest.mark.usefixtures("small_passes")
def test_a_round_removes_all_that_is_left(database: Database, tmp_path: Path) -> None:
    """Beside a writer whose every transaction is answered, and without what is young or needed."""
    store = LocalStore(tmp_path / "blobs")
    content = ContentStore(store)
    orphans, unneeded, needed, young = (
        _digests(name, count) for name, count in (("orphan", 120), ("unneeded", 120), ("needed", 60), ("young", 60))
    )
    _leave(store, [*orphans, *unneeded, *needed])
    _note(database, unneeded)
    _note(database, needed, key="1" * 64)
    for sha256 in young:
        (tmp_path / "young").write_bytes(b"x")
        content.put(LOCAL_TENANT, tmp_path / "young", sha256, move=True)
    done, written = threading.Event(), [0]
    errors: list[Exception] = []

    def write() -> None:
        try:
            while not done.is_set():
                written[0] += 1
                keep = StageResult(
                    tenant_id=LOCAL_TENANT, key=f"{written[0]:064d}", stage="x", outputs={}, data={}, seconds=1.0
                )
                with database.write() as uow:
                    keep_result(uow.session, keep)
        except Exception as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        collector = Collector(database, content, Settings(home=tmp_path, collector=CollectorSettings(grace_s=3600)))
        passes = _round(collector)
    finally:
        done.set()
        writer.join(60)
    assert not errors
    assert written[0] > 10
    assert len(passes) >= 120 // _FILES
    for kind in ("blobs", "orphans"):
        assert sum(p[kind] for p in passes) == 120
        assert max(p[kind] for p in passes) <= _FILES + 10
    assert _stored(content) == {*needed, *young}
    assert all(p["blobs"] == p["orphans"] == 0 for p in _round(collector)), "the next one finds nothing"


@pytest.mark.usefixtures("small_passes")
def test_a_round_on_s3(fresh_bucket: S3Bucket, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'test.db'}"
    upgrade(url)
    db, store = Database(make_engine(url)), S3Store(fresh_bucket.name, "anneal", fresh_bucket.settings())
    content = ContentStore(store)
    (tmp_path / "file").write_bytes(b"x")
    orphans, needed = _digests("orphan", 50), _digests("needed", 5)
    try:
        with ThreadPoolExecutor(8) as threads:
            keys = [blob_key(LOCAL_TENANT, sha256) for sha256 in (*orphans, *needed)]
            list(threads.map(lambda key: store.put_file(key, tmp_path / "file"), keys))
        _note(db, needed, key="1" * 64)
        time.sleep(1.1)  # S3 tells times in seconds
        careful = Settings(home=tmp_path, collector=CollectorSettings(grace_s=3600))
        assert sum(p["orphans"] for p in _round(Collector(db, content, careful))) == 0
        passes = _round(Collector(db, content, Settings(home=tmp_path, collector=CollectorSettings(grace_s=0))))
        assert sum(p["orphans"] for p in passes) == 50
        assert len(passes) >= 2
        assert _stored(content) == set(needed)
    finally:
        store.close()
        db.close()


def test_a_round_that_the_storage_broke_begins_again(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path / "blobs")
    orphans = _digests("orphan", 5)
    _leave(store, orphans)
    collector = Collector(database, ContentStore(store), Settings(home=tmp_path))
    with monkeypatch.context() as patch:

        def away(_prefix: str) -> None:
            raise storage_unavailable("listing files")

        patch.setattr(store, "list", away)
        with pytest.raises(AppError):
            collector.collect()
    assert not collector.round_over
    assert collector.collect()["orphans"] == 5


def test_a_worker_goes_on_by_itself_but_not_beside_a_measurement(tmp_path: Path) -> None:
    """One start of the thread removes all, though the next round is an hour away."""
    home, locks = tmp_path / "home", tmp_path / "locks"
    settings = Settings(
        home=home,
        worker=WorkerSettings(heartbeat_s=0.05, lock_dir=locks),
        collector=CollectorSettings(every_s=3600, grace_s=3600),
    )
    upgrade(settings.database)
    worker = WorkerService(settings)
    store = worker.content.store
    assert isinstance(store, LocalStore)
    orphans = _digests("orphan", 1000)
    _leave(store, orphans)
    thread = threading.Thread(target=worker.chores.collect)
    try:
        with MachineLock(locks, 60).hold(Place(alone=True), lambda: False, lambda: None):
            thread.start()
            time.sleep(0.5)
            assert len(_stored(worker.content)) == 1000, "not beside a measurement"
        deadline = time.monotonic() + 180
        while left := _stored(worker.content):
            assert time.monotonic() < deadline, len(left)
            assert thread.is_alive()
            time.sleep(0.1)
    finally:
        worker.shutdown.set()
        thread.join(30)
        worker.close()
    assert not thread.is_alive()
