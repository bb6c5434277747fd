"""A job goes on soon after its worker is gone, whatever the clocks say; on SQLite and PostgreSQL."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from app.db import clock
from app.db.base import utcnow
from app.db.orm import Job
from app.jobs.ledger import Claim, LeaseLost
from app.jobs.schedule import Offer
from tests.factories.deployment import deployment, job_row, kill, submit_case, wait_for_stage
from tests.integration.conftest import Desk
from workers.pipeline.lease import LeaseKeeper, StopReason

LOCK = "kernel-process"


def _claim(desk: Desk, job: Job, lock: str | None = LOCK) -> Claim:
    claim = desk.ledger.claim(Offer("w1", (job.queue,), lock))
    assert claim is not None
    return claim


def _lasting(desk: Desk) -> None:
    """No lease runs out by itself."""
    desk.ledger.settings.lease_s = 600


def test_what_a_dead_process_had_goes_on_before_its_lease_ends(desk: Desk) -> None:
    _lasting(desk)
    job = desk.submit()
    claim = _claim(desk, job)
    desk.sent.clear()
    assert desk.ledger.sweep()["expired"] == 0
    assert desk.ledger.take_from_dead("another-process") == 0
    assert desk.ledger.take_from_dead(LOCK[:-1]) == 0, "not one whose name only begins so"
    assert desk.ledger.take_from_dead(LOCK) == 1
    assert desk.sent == [job.id]
    found = desk.job(job.id)
    assert (found.status, found.lease_lock, found.lease_owner) == ("queued", None, None)
    with pytest.raises(LeaseLost):
        desk.ledger.progress(claim, {}, "progress", {})
    assert desk.ledger.take_from_dead(LOCK) == 0


def test_a_lock_counts_for_the_claim_that_was_made_with_it(desk: Desk) -> None:
    """A worker of the previous release leaves the column as it is."""
    _lasting(desk)
    job = desk.submit()
    _claim(desk, job)
    with desk.db.write() as uow:
        uow.session.get_one(Job, job.id).fencing_token += 1
    assert desk.ledger.take_from_dead(LOCK) == 0
    assert desk.job(job.id).status == "running"


def test_a_dead_process_costs_an_attempt_and_ends_what_was_cancelled(desk: Desk) -> None:
    _lasting(desk)
    job = desk.submit()
    for _ in range(desk.ledger.settings.max_attempts):
        _claim(desk, job)
        assert desk.ledger.take_from_dead(LOCK) == 1
    assert (desk.job(job.id).status, (desk.job(job.id).error or {})["code"]) == ("failed", "worker_lost")
    other = desk.submit()
    _claim(desk, other)
    desk.service.cancel(other.tenant_id, other.id)
    assert desk.ledger.take_from_dead(LOCK) == 1
    assert desk.job(other.id).status == "cancelled"


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@pytest.mark.parametrize("off", [timedelta(minutes=-5), timedelta(minutes=5)], ids=["behind", "ahead"])
def test_a_worker_whose_clock_is_off_takes_nothing_from_others(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, off: timedelta
) -> None:
    _lasting(desk)
    desk.ledger.settings.lease_s = 60
    job = desk.submit()
    claim = _claim(desk, job, None)
    right = clock._own
    monkeypatch.setattr(clock, "_own", lambda: right() + off.total_seconds())
    assert desk.ledger.sweep()["expired"] == 0, "as seen by that worker"
    assert not desk.ledger.renew(claim)
    other = desk.submit()
    theirs = _claim(desk, other, None)
    monkeypatch.setattr(clock, "_own", right)
    assert desk.ledger.sweep()["expired"] == 0, "as seen by the others"
    for row in (desk.job(job.id), desk.job(other.id)):
        assert row.lease_expires_at is not None
        assert abs((row.lease_expires_at - utcnow()).total_seconds() - 60) < 10
    assert not desk.ledger.renew(theirs)


def test_at_a_shutdown_nobody_waits_for_a_thread_that_hangs(desk: Desk) -> None:
    """In the middle of a large file, say, or of a storage that answers nothing: the job is another's meanwhile."""
    job = desk.submit()
    shutdown, stuck, ended = threading.Event(), threading.Event(), list[str]()
    _lasting(desk)
    claim = _claim(desk, job)

    def hand_back() -> None:
        desk.ledger.release(claim, "the worker shuts down")
        ended.append("handed back")

    keeper = LeaseKeeper(
        desk.ledger,
        claim,
        shutdown,
        asked=time.monotonic(),
        on_lost=lambda: ended.append("stage ended"),
        hand_back=hand_back,
    )
    desk.sent.clear()
    with keeper:
        shutdown.set()
        assert keeper.reason is StopReason.SHUTDOWN
        while len(ended) < 2 and not stuck.wait(0.05):
            assert time.monotonic() < keeper._good_until
        assert ended == ["stage ended", "handed back"]
        assert desk.job(job.id).status == "queued"
        assert desk.sent == [job.id]
        with pytest.raises(LeaseLost):
            desk.ledger.progress(claim, {}, "progress", {})
    assert len(ended) == 2


def test_a_worker_killed_beside_another_is_followed_at_once(tmp_path: Path, fresh_postgres: str) -> None:
    """Long before its lease would end; also by one that comes back under its name."""
    extra = {"DATABASE_URL": fresh_postgres, "WORKER_LEASE_S": "120", "WORKER_NAME": "same"}
    with deployment(tmp_path / "home", extra) as deployed, deployed.client() as client:
        db = deployed.database()
        worker = deployed.start_worker()
        job_id = submit_case(client, tmp_path, 60)["id"]
        assert wait_for_stage(db, job_id, {"export", "simplify", "quantize", "build"}) is not None
        token = job_row(db, job_id).fencing_token
        kill(worker)
        deployed.start_worker()
        deployed.wait_for(lambda: job_row(db, job_id).fencing_token > token, timeout_s=60)
        client.cancel(job_id)
        db.close()
