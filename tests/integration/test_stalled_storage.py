"""Storage that stalls while a worker asks it: the job keeps its lease, and others write meanwhile."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta

import pytest

from app.blobs.collector import Collector
from app.blobs.content import blob_key
from app.db.base import utcnow
from app.db.ids import new_id
from app.db.orm import LOCAL_TENANT, Engine, StageResult, Upload
from app.errors import AppError, storage_unavailable
from app.jobs.ledger import Claim, JobLedger
from app.settings import CollectorSettings, Settings, WorkerSettings
from app.storage.base import BlobNotFound
from app.storage.local import LocalStore
from app.storage.s3 import S3Store
from app.uploads.service import UploadService
from tests.conftest import S3Bucket
from tests.factories.stalling import Staller, stalling
from tests.integration.conftest import Desk
from workers.pipeline.lease import LeaseKeeper

LEASE_S = 2.0
FILES = {digit: hashlib.sha256(digit.encode()).hexdigest() for digit in "12345"}


@dataclass
class Stalled:
    """A desk whose files lie on an S3 server behind a staller, and a job claimed there."""

    desk: Desk
    staller: Staller
    ledger: JobLedger
    claim: Claim
    asked: float

    def put(self, digit: str) -> str:
        path = self.desk.scratch / digit
        path.write_text(digit)
        self.desk.content.put(LOCAL_TENANT, path, FILES[digit])
        return FILES[digit]

    def result(self) -> StageResult:
        files = [{"name": "model.onnx", "sha256": FILES["1"], "size_bytes": 1}]
        return StageResult(
            tenant_id=LOCAL_TENANT, key="7" * 64, stage="export", outputs={"model": files}, data={}, seconds=0.1
        )


@pytest.fixture
def stalled(desk: Desk, fresh_bucket: S3Bucket) -> Iterator[Stalled]:
    with stalling(fresh_bucket.server.endpoint_url) as staller:
        store = S3Store(fresh_bucket.name, "", fresh_bucket.settings(S3_ENDPOINT_URL=staller.url))
        with closing(store):
            desk.content.store = store
            settings = WorkerSettings(lease_s=LEASE_S)
            ledger = JobLedger(desk.db, desk.content, desk.ledger.dispatch, settings)
            job, asked = desk.submit(), time.monotonic()
            claim = desk.claim(job, ledger=ledger)
            assert claim is not None
            yield Stalled(desk, staller, ledger, claim, asked)


def remember(at: Stalled) -> Callable[[], object]:
    at.put("1")
    return lambda: at.ledger.remember(at.claim, at.result())


def recall(at: Stalled) -> Callable[[], object]:
    remember(at)()
    return lambda: at.ledger.recall(LOCAL_TENANT, "7" * 64)


def complete(at: Stalled) -> Callable[[], object]:
    for digit in "2345":
        at.put(digit)
    engine = Engine(
        id=new_id("eng"),
        tenant_id=LOCAL_TENANT,
        job_id=at.claim.job_id,
        model_id=at.desk.job(at.claim.job_id).model_id,
        backend="onnxruntime",
        format="onnx",
        precision="int8",
        filename="net.onnx",
        sha256=FILES["2"],
        size_bytes=1,
        bundle_filename="net.zip",
        bundle_sha256=FILES["3"],
        bundle_size_bytes=1,
        hardware={},
        runtime={},
        metrics={},
    )
    report, manifest = (FILES["4"], 1), (FILES["5"], 1)
    return lambda: at.ledger.complete(at.claim, engine=engine, report=report, manifest=manifest, changes={}, event={})


def discard(at: Stalled) -> Callable[[], object]:
    remember(at)()
    return lambda: at.ledger.discard(LOCAL_TENANT, FILES["1"])


def collect(at: Stalled) -> Callable[[], object]:
    at.put("1")
    settings = Settings(home=at.desk.scratch, collector=CollectorSettings(grace_s=0))
    time.sleep(1.1)  # S3 tells times in seconds
    return Collector(at.desk.db, at.desk.content, settings).collect


@pytest.mark.parametrize("doing", [remember, recall, complete, discard, collect])
def test_no_lease_is_lost_and_no_writer_blocked(
    stalled: Stalled, doing: Callable[[Stalled], Callable[[], object]]
) -> None:
    desk, staller, ledger = stalled.desk, stalled.staller, stalled.ledger
    act = doing(stalled)
    method = "DELETE" if doing in (discard, collect) else "HEAD"
    staller.holds = lambda asked, _path: asked == method
    assert not ledger.renew(stalled.claim)
    keeper = LeaseKeeper(ledger, stalled.claim, threading.Event(), asked=time.monotonic(), on_lost=lambda: None)
    with ThreadPoolExecutor(1) as threads, keeper:
        working = threads.submit(act)
        try:
            staller.wait_held()
            until = time.monotonic() + 1.5 * LEASE_S
            while time.monotonic() < until:
                desk.submit()
                time.sleep(0.1)
            assert ledger.sweep()["expired"] == 0
            assert keeper.reason is None
            assert not working.done()
        finally:
            staller.release()
        working.result(timeout=30)


def test_what_is_removed_between_the_look_and_the_note_is_not_noted(desk: Desk) -> None:
    """Whoever stores a file, and whoever removes it: each asks the storage outside of its transaction."""
    sha256 = FILES["1"]

    def put() -> None:
        path = desk.scratch / "file"
        path.write_text("1")
        desk.content.put(LOCAL_TENANT, path, sha256)

    def remove() -> None:
        with desk.db.write() as uow:
            condemned = desk.content.condemn(uow.session, LOCAL_TENANT, sha256)
        with pytest.raises(BlobNotFound):  # as long as it is under way
            desk.content.sight(desk.db, LOCAL_TENANT, [sha256])
        desk.content.remove(desk.db, [condemned])

    for stored_again in (False, True):
        put()
        seen = desk.content.sight(desk.db, LOCAL_TENANT, [sha256])
        remove()
        if stored_again:
            put()
        with pytest.raises(BlobNotFound), desk.db.write() as uow:
            desk.content.record(uow.session, seen, {sha256: 1})
    seen = desk.content.sight(desk.db, LOCAL_TENANT, [sha256])
    with desk.db.write() as uow:
        desk.content.record(uow.session, seen, {sha256: 1})
    with desk.db.read() as session:
        assert desk.content.known(session, LOCAL_TENANT, sha256)
    assert desk.content.store.size(blob_key(LOCAL_TENANT, sha256)) == 1


class Refusing(LocalStore):
    """A real folder that cannot delete one of its objects."""

    key = ""

    def delete(self, key: str) -> None:
        if key == self.key:
            raise storage_unavailable("it does not answer")
        super().delete(key)


def test_an_upload_that_cannot_be_cleared_up_holds_up_no_other(desk: Desk) -> None:
    store = Refusing(desk.scratch / "refusing")
    desk.content.store = store
    service = UploadService(desk.db, desk.content, Settings(home=desk.scratch))
    uploads = [service.create(LOCAL_TENANT, "a.onnx", 10, None, None)[0] for _ in range(3)]
    with desk.db.write() as uow:
        for age, upload in enumerate(uploads):
            row = uow.session.get_one(Upload, upload.id)
            row.status, row.lease_expires_at = "aborting", utcnow() - timedelta(hours=9 - age)
    store.key = uploads[0].storage_key
    for passes in range(3):
        with contextlib.suppress(AppError) if passes else pytest.raises(AppError):
            service.expire_uploads()
    assert [service.get(LOCAL_TENANT, upload.id).status for upload in uploads] == ["aborting", "aborted", "aborted"]
    store.key = ""
    with desk.db.write() as uow:
        uow.session.get_one(Upload, uploads[0].id).lease_expires_at = utcnow() - timedelta(hours=1)
    service.expire_uploads()
    assert service.get(LOCAL_TENANT, uploads[0].id).status == "aborted"
