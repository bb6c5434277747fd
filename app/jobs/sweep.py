"""What has to happen to jobs without anybody asking for it: those of dead workers go on, those that cannot go on end,
and those that waited too long end. Any number of processes may sweep at once: each change is a compare-and-set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy import ColumnElement, select

from app.db.base import utcnow
from app.db.orm import Job
from app.db.uow import Database
from app.domain.job_state import JobStatus, Trigger, transition
from app.jobs.columns import LEAN
from app.jobs.repository import JobRepository
from app.jobs.schedule import QUEUED
from app.queue.producer import Dispatch
from app.settings import WorkerSettings

log = structlog.get_logger(__name__)

_AT_ONCE = 200  # by one sweep, of each kind
_ROUNDS = 4  # so often an attempt counts anew after a finished stage, for failures of infrastructure


def exhausted(settings: WorkerSettings, attempts: int, in_all: int) -> bool:
    """Whether a job has been tried often enough: without a stage finished in between, or for all it finished. What it
    finishes may be lost each time, by a storage that damages it."""
    return attempts >= settings.max_attempts or in_all >= _ROUNDS * settings.max_attempts


def end_overdue(db: Database) -> int:
    """Fail the jobs that no worker took by their `start_by`; how many. Of the API's errands too: it is where no worker
    lives that jobs wait too long."""
    now = utcnow()
    waits = (Job.status == QUEUED, Job.start_by < now, Job.started_at.is_(None))
    with db.read() as session:
        overdue = [*session.scalars(select(Job).options(*LEAN).where(*waits).order_by(Job.start_by).limit(_AT_ONCE))]
    done = 0
    for job in overdue:
        error = _queued_too_long(job)
        guard = [Job.start_by < now, Job.started_at.is_(None)]
        with db.write() as uow:
            jobs, source = JobRepository(uow.session), JobStatus.QUEUED
            ended = jobs.apply(
                job.id, Trigger.FAIL, source=source, where=guard, values={"error": error}, event={"error": error}
            )
            done += ended is not None
    return done


def _queued_too_long(job: Job) -> dict[str, Any]:
    assert job.start_by is not None
    seconds = round((job.start_by - job.created_at).total_seconds())
    return {
        "code": "queued_too_long",
        "detail": f"No worker took the job within max_queue_seconds ({seconds} s).",
        "remedy": "Submit it again with a larger `max_queue_seconds`, or without; GET /v1/capabilities tells which "
        "workers are live, and `queue` of a queued job what it waits for.",
    }


class Sweeper:
    """Of workers. `dispatch` wakes one for a job that goes on."""

    def __init__(self, db: Database, dispatch: Dispatch, settings: WorkerSettings) -> None:
        self.db = db
        self.dispatch = dispatch
        self.settings = settings

    def sweep(self) -> dict[str, int]:
        """How many were `expired` (their worker is dead) and `overdue` (they waited too long)."""
        now = utcnow()
        with self.db.read() as session:
            expired = JobRepository(session).expired(now, limit=_AT_ONCE)
        changed = self._give_on(expired, [Job.lease_expires_at < now])
        counts = {"expired": len(changed), "overdue": end_overdue(self.db)}
        if any(counts.values()):
            log.info("swept", **counts)
        self._wake_for(changed)
        return counts

    def take_from_dead(self, lock: str) -> int:
        """How many jobs the process had whose liveness lock this was. It is gone, so nobody waits for the leases."""
        with self.db.read() as session:
            left = JobRepository(session).under_lock(lock, limit=_AT_ONCE)
        changed = self._give_on(left, [])
        self._wake_for(changed)
        return len(changed)

    def _give_on(self, jobs: Sequence[Job], still: Sequence[ColumnElement[bool]]) -> list[tuple[Job, JobStatus]]:
        """Those that were taken from their worker, and what they are afterwards."""
        done = [(job, self._expire(job, still)) for job in jobs]
        return [(job, now_is) for job, now_is in done if now_is is not None]

    def _wake_for(self, changed: Sequence[tuple[Job, JobStatus]]) -> None:
        """Last, and not for long: leases are to be looked after again soon, however slow the broker is. Whoever is idle
        finds what nobody was woken for."""
        until = time.monotonic() + self.settings.sweep_s
        for job in (job for job, now_is in changed if now_is is JobStatus.QUEUED):
            if time.monotonic() > until or not self.dispatch(job):
                break

    def _expire(self, job: Job, still: Sequence[ColumnElement[bool]]) -> JobStatus | None:
        """What it is afterwards; None where somebody else was faster, or it is not `still` so."""
        guard = [Job.fencing_token == job.fencing_token, *still]
        trigger, values, event = self._fate(job)
        with self.db.write() as uow:
            jobs = JobRepository(uow.session)
            done = jobs.apply(job.id, trigger, source=JobStatus.RUNNING, where=guard, values=values, event=event)
        return None if done is None else transition(JobStatus.RUNNING, trigger)

    def _fate(self, job: Job) -> tuple[Trigger, dict[str, Any], dict[str, Any]]:
        """What becomes of a job whose worker died: cancelled where the user wanted that, failed after too many lost
        workers with no stage finished in between (it may be what kills them), else queued again."""
        if job.cancel_requested_at is not None:
            return Trigger.CANCEL, {}, {}
        if exhausted(self.settings, job.attempts, job.attempts_in_all):
            error = {
                "code": "worker_lost",
                "detail": "Worker after worker was lost while it ran this job: the last "
                f"{job.attempts} attempts finished no stage; {job.attempts_in_all} were made in all.",
                "stage": job.stage,
                "remedy": "Ask the operator to look at the workers' logs; submit again once they are well.",
            }
            return Trigger.FAIL, {"error": error}, {"error": error}
        return Trigger.LEASE_EXPIRED, requeued(job, self.settings), {"reason": "worker_lost", "worker": job.lease_owner}


def requeued(job: Job, settings: WorkerSettings) -> dict[str, Any]:
    """Columns of a job that is taken from its worker."""
    return {"not_before": None, "spent_seconds": _spent(job, settings), "expected_end": None}


def _spent(job: Job, settings: WorkerSettings) -> float:
    """Of the job's budget, with the attempt that was lost: until it last renewed its lease."""
    if job.claimed_at is None or job.lease_expires_at is None:
        return job.spent_seconds
    renewed = job.lease_expires_at - timedelta(seconds=settings.lease_s)
    return job.spent_seconds + max((renewed - job.claimed_at).total_seconds(), 0.0)
