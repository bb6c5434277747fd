"""Leases, fencing tokens and the sweeper, on SQLite and PostgreSQL: a job ends once, and never gets lost."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from app.blobs.content import blob_key
from app.db.base import utcnow
from app.db.ids import new_id
from app.db.orm import LOCAL_TENANT, Engine, Job, JobEvent, StageResult
from app.domain.job_state import JobStatus
from app.domain.spec import OptimizationSpec
from app.errors import AppError
from app.idempotency import Idempotency
from app.jobs.ledger import Claim, LeaseLost
from app.jobs.schedule import Offer
from tests.factories.statements import statements
from tests.integration.conftest import Desk


def _claim(desk: Desk, job: Job, owner: str = "w1") -> Claim:
    claim = desk.claim(job, owner)
    assert claim is not None
    return claim


def _expire(desk: Desk, job: Job) -> None:
    with desk.db.write() as uow:
        uow.session.get_one(Job, job.id).lease_expires_at = utcnow() - timedelta(seconds=1)


def _events(desk: Desk, job: Job) -> list[JobEvent]:
    return [*desk.service.events_after(LOCAL_TENANT, job.id, 0)]


def _engine(job: Job) -> Engine:
    return Engine(
        id=new_id("eng"),
        tenant_id=LOCAL_TENANT,
        job_id=job.id,
        model_id=job.model_id,
        backend="onnxruntime",
        format="onnx",
        precision="int8",
        filename="net.onnx",
        sha256="2" * 64,
        size_bytes=1,
        bundle_filename="net.zip",
        bundle_sha256="3" * 64,
        bundle_size_bytes=1,
        hardware={},
        runtime={},
        metrics={},
        created_at=utcnow(),
    )


def _complete(desk: Desk, claim: Claim, job: Job) -> None:
    for digit in "2345":
        desk.put_blob(digit * 64)
    desk.ledger.complete(claim, engine=_engine(job), report=("4" * 64, 1), manifest=("5" * 64, 1), changes={}, event={})


def test_an_end_with_an_engine_is_few_trips_to_the_database(desk: Desk) -> None:
    job = desk.submit()
    claim = _claim(desk, job)
    for digit in "2345":
        desk.put_blob(digit * 64)
    with statements(desk.db.engine) as sent:
        desk.ledger.complete(
            claim, engine=_engine(job), report=("4" * 64, 1), manifest=("5" * 64, 1), changes={}, event={}
        )
    assert len(sent) <= 10, [sql for sql, _ in sent]


def test_submission_queues_and_dispatches_after_the_commit(desk: Desk) -> None:
    job = desk.submit()
    assert desk.sent == [job.id]
    assert desk.job(job.id).status == JobStatus.QUEUED
    assert [e.data["status"] for e in _events(desk, job)] == ["queued"]


def test_only_one_of_many_workers_gets_the_job(desk: Desk) -> None:
    job = desk.submit()
    claims: list[Claim | None] = []
    barrier = threading.Barrier(6)

    def take(owner: str) -> None:
        barrier.wait()
        claims.append(desk.claim(job, owner))

    threads = [threading.Thread(target=take, args=(f"w{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([c for c in claims if c is not None]) == 1


def test_a_dead_workers_job_goes_on_with_the_next_and_the_dead_one_cannot_write(desk: Desk) -> None:
    job = desk.submit()
    first = _claim(desk, job)
    _expire(desk, job)
    assert desk.ledger.sweep()["expired"] == 1
    assert desk.sent == [job.id, job.id]
    second = _claim(desk, job, "w2")
    assert second.token > first.token
    for write in (
        lambda: desk.ledger.renew(first),
        lambda: desk.ledger.progress(first, {"progress": 0.5}, "progress", {}),
        lambda: desk.ledger.fail(first, {"code": "x"}, {}),
        lambda: _complete(desk, first, job),
    ):
        with pytest.raises(LeaseLost):
            write()
    _complete(desk, second, job)
    done = desk.job(job.id)
    assert (done.status, len(done.engine_ids)) == (JobStatus.SUCCEEDED, 1)
    with desk.db.read() as session:
        assert session.query(Engine).count() == 1


def test_a_living_lease_is_left_alone_and_renewal_keeps_it(desk: Desk) -> None:
    job = desk.submit()
    claim = _claim(desk, job)
    for _ in range(4):
        time.sleep(0.15)
        assert desk.ledger.renew(claim) is False
        assert desk.ledger.sweep()["expired"] == 0


def test_many_sweepers_requeue_once(desk: Desk) -> None:
    job = desk.submit()
    _claim(desk, job)
    _expire(desk, job)
    counts: list[int] = []
    threads = [threading.Thread(target=lambda: counts.append(desk.ledger.sweep()["expired"])) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 1


def test_a_job_that_loses_worker_after_worker_fails_in_the_end(desk: Desk) -> None:
    job = desk.submit()
    for _ in range(3):
        _claim(desk, job)
        _expire(desk, job)
        desk.ledger.sweep()
    failed = desk.job(job.id)
    assert failed.status == JobStatus.FAILED
    assert failed.error is not None
    assert failed.error["code"] == "worker_lost"


def test_finished_stages_make_an_attempt_count_anew(desk: Desk) -> None:
    job = desk.submit()
    for i in range(5):
        claim = _claim(desk, job)
        row = StageResult(
            tenant_id=LOCAL_TENANT, key=f"{i:064d}", stage="export", outputs={}, data={}, failure=None, seconds=0.1
        )
        desk.ledger.remember(claim, row)
        _expire(desk, job)
        desk.ledger.sweep()
    assert desk.job(job.id).status == JobStatus.QUEUED


def test_cancel_in_every_state(desk: Desk) -> None:
    queued = desk.submit()
    assert desk.service.cancel(LOCAL_TENANT, queued.id).status == JobStatus.CANCELLED
    assert desk.claim(queued) is None
    running = desk.submit()
    claim = _claim(desk, running)
    asked = desk.service.cancel(LOCAL_TENANT, running.id)
    assert asked.status == JobStatus.RUNNING
    assert asked.cancel_requested_at is not None
    assert desk.ledger.renew(claim) is True
    desk.ledger.cancelled(claim, {})
    again = desk.service.cancel(LOCAL_TENANT, running.id)
    assert again.status == JobStatus.CANCELLED
    finished = desk.submit()
    _complete(desk, _claim(desk, finished), finished)
    assert desk.service.cancel(LOCAL_TENANT, finished.id).status == JobStatus.SUCCEEDED


def test_cancel_of_a_dead_workers_job_is_kept_by_the_sweeper(desk: Desk) -> None:
    job = desk.submit()
    _claim(desk, job)
    desk.service.cancel(LOCAL_TENANT, job.id)
    _expire(desk, job)
    desk.ledger.sweep()
    assert desk.job(job.id).status == JobStatus.CANCELLED


def test_release_gives_the_job_back_without_counting_an_attempt(desk: Desk) -> None:
    job = desk.submit()
    for _ in range(5):
        desk.ledger.release(_claim(desk, job), "shutdown")
    assert desk.job(job.id).attempts == 0
    assert desk.sent == [job.id] * 6


@pytest.mark.parametrize("how", ["release", "retry_later"])
def test_a_job_that_is_given_back_after_a_cancel_is_cancelled(desk: Desk, how: str) -> None:
    job = desk.submit()
    claim = _claim(desk, job)
    desk.service.cancel(LOCAL_TENANT, job.id)
    getattr(desk.ledger, how)(claim, "because")
    assert desk.job(job.id).status == JobStatus.CANCELLED


def test_a_broker_that_is_away_holds_up_the_sweeper_once(desk: Desk) -> None:
    jobs = [desk.submit() for _ in range(3)]
    while desk.ledger.claim(Offer("w1", (jobs[0].queue,))) is not None:
        pass
    for job in jobs:
        _expire(desk, job)
    asked: list[str] = []

    def refused(job: Job) -> bool:
        asked.append(job.id)
        return False

    desk.ledger.dispatch = refused
    assert desk.ledger.sweep()["expired"] == len(jobs)
    assert len(asked) == 1, "one refusal is enough"
    assert {desk.job(job.id).status for job in jobs} == {"queued"}


def test_every_change_leaves_an_event_with_the_version(desk: Desk) -> None:
    job = desk.submit()
    claim = _claim(desk, job)
    desk.ledger.progress(claim, {"progress": 0.5, "stage": "export"}, "progress", {"progress": 0.5})
    desk.ledger.fail(claim, {"code": "x", "detail": "y"}, {})
    events = _events(desk, job)
    assert [e.seq for e in events] == [1, 2, 3, 4]
    assert desk.job(job.id).version == 4
    assert [e.data.get("status") for e in events] == ["queued", "running", None, "failed"]


def test_a_cached_result_whose_bytes_are_gone_is_no_hit(desk: Desk) -> None:
    job = desk.submit()
    claim = _claim(desk, job)
    files = [{"name": "model.onnx", "sha256": "9" * 64, "size_bytes": 3}]
    row: dict[str, Any] = {"tenant_id": LOCAL_TENANT, "stage": "export", "data": {}, "failure": None, "seconds": 0.1}
    desk.put_blob("9" * 64)
    desk.ledger.remember(claim, StageResult(**row, key="7" * 64, outputs={"model": files}))
    assert desk.ledger.recall(LOCAL_TENANT, "7" * 64) is not None
    desk.content.store.delete(blob_key(LOCAL_TENANT, "9" * 64))
    assert desk.ledger.recall(LOCAL_TENANT, "7" * 64) is None
    desk.ledger.remember(claim, StageResult(**row, key="8" * 64, outputs={}))
    assert desk.ledger.recall(LOCAL_TENANT, "8" * 64) is not None
    assert desk.ledger.recall("tnt_other", "8" * 64) is None


def test_the_same_idempotency_key_gives_the_same_job_also_in_a_race(desk: Desk) -> None:
    spec = OptimizationSpec(model_id=desk.add_model().id)
    key = Idempotency("key-1", "a" * 64)
    ids: list[str] = []
    barrier = threading.Barrier(5)

    def send() -> None:
        barrier.wait()
        ids.append(desk.service.submit(LOCAL_TENANT, spec, correlation_id="t", idempotency=key)[0].id)

    threads = [threading.Thread(target=send) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 5
    assert len(set(ids)) == 1
    other = Idempotency("key-1", "b" * 64)
    with pytest.raises(AppError) as caught:
        desk.service.submit(LOCAL_TENANT, spec, correlation_id="t", idempotency=other)
    assert caught.value.code == "idempotency_conflict"


def test_another_tenants_model_and_data_are_unknown(desk: Desk) -> None:
    from app.db.orm import Tenant

    with desk.db.write() as uow:
        uow.session.add(Tenant(id="tnt_b", name="b", created_at=utcnow()))
    foreign = desk.add_model("tnt_b")
    spec = OptimizationSpec(model_id=foreign.id)
    with pytest.raises(AppError, match="no model"):
        desk.service.submit(LOCAL_TENANT, spec, correlation_id="t", idempotency=None)
    body = {"model_id": desk.add_model().id, "validation": {"dataset_id": desk.add_dataset("tnt_b").id}}
    with pytest.raises(AppError, match="no data set"):
        desk.service.submit(LOCAL_TENANT, OptimizationSpec.model_validate(body), correlation_id="t", idempotency=None)
    with pytest.raises(AppError) as caught:
        desk.service.get("tnt_b", desk.submit().id)
    assert caught.value.status == 404


def test_a_job_taken_up_again_has_spent_what_its_lost_attempts_took(desk: Desk) -> None:
    job = desk.submit()
    first = _claim(desk, job)
    assert first.spent_seconds == 0.0
    lease = timedelta(seconds=desk.ledger.settings.lease_s)
    with desk.db.write() as uow:  # it worked for 40 s, renewed its lease for the last time, and died
        row = uow.session.get_one(Job, job.id)
        row.claimed_at = utcnow() - timedelta(seconds=50)
        row.lease_expires_at = row.claimed_at + timedelta(seconds=40) + lease
    assert desk.ledger.sweep()["expired"] == 1
    second = _claim(desk, job, "w2")
    assert second.spent_seconds == pytest.approx(40.0, abs=0.01)
    desk.ledger.release(replace(second, claimed_at=second.claimed_at - timedelta(seconds=5)), "the worker shuts down")
    assert _claim(desk, job, "w3").spent_seconds == pytest.approx(45.0, abs=0.5)
