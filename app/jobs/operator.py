"""What an operator does to jobs, whichever tenant's they are: take them from a worker that will not end them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from app.audit import current_actor, record
from app.db.orm import Job
from app.db.uow import Database
from app.domain.job_state import JobStatus, Trigger
from app.errors import AppError, conflict, not_found
from app.jobs.columns import LEAN
from app.jobs.family import PARENTS
from app.jobs.repository import JobRepository
from app.jobs.schedule import RUNNING
from app.jobs.sweep import requeued
from app.queue.producer import Dispatch
from app.settings import WorkerSettings

_REASON = "requeued by the operator"


class JobOperator:
    """Safe also where the worker lives: its next write finds the job gone, and it stops. `dispatch` wakes another."""

    def __init__(self, db: Database, dispatch: Dispatch, settings: WorkerSettings) -> None:
        self._db = db
        self._dispatch = dispatch
        self._settings = settings

    def requeue(self, job_id: str) -> None:
        """A running job goes back to the queue, to be begun at once by whoever is free, or to its end where its user
        has asked for that; a queued one's pause ends. Raises `AppError` for a job that has ended, or that compares
        others."""
        with self._db.read() as session:
            job = session.get(Job, job_id)
        if job is None:
            raise not_found("job", job_id)
        if job.queue == PARENTS:
            raise conflict("job_compares", f"{job_id} compares other jobs; no worker has it.", "Requeue one of those.")
        if job.status == JobStatus.QUEUED.value:
            with self._db.write() as uow:
                JobRepository(uow.session).touch(job_id, [Job.status == job.status], {"not_before": None})
                record(uow.session, job.tenant_id, current_actor(), "job.requeue", job_id)
                uow.after_commit(lambda: self._dispatch(job))
            return
        if not self._take(job):
            raise _ended(job_id)

    def requeue_all(self, worker_id: str) -> Sequence[str]:
        """Every job that this worker holds, as `requeue` does it; their ids."""
        query = select(Job).options(*LEAN).where(Job.status == RUNNING, Job.lease_owner == worker_id).order_by(Job.id)
        with self._db.read() as session:
            held = [*session.scalars(query)]
        return [job.id for job in held if self._take(job)]

    def _take(self, job: Job) -> bool:
        """False where it is not that worker's any more."""
        held, values = Job.fencing_token == job.fencing_token, requeued(job, self._settings)
        event = {"reason": _REASON, "worker": job.lease_owner}
        with self._db.write() as uow:
            jobs, source = JobRepository(uow.session), JobStatus.RUNNING
            guard = [held, Job.cancel_requested_at.is_(None)]
            done = jobs.apply(job.id, Trigger.RELEASE, source=source, where=guard, values=values, event=event)
            if done is not None:
                uow.after_commit(lambda: self._dispatch(job))
            else:  # nobody wants it done: its worker, which might hang, is not waited for
                done = jobs.apply(job.id, Trigger.CANCEL, source=source, where=[held], values=values, event=event)
            if done is not None:
                detail = {"worker": job.lease_owner}
                record(uow.session, job.tenant_id, current_actor(), "job.requeue", job.id, detail)
            return done is not None


def _ended(job_id: str) -> AppError:
    return conflict("job_ended", f"{job_id} has ended.", "Submit it again.")
