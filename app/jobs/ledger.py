"""What a worker writes about a job. Every write is guarded by the lease's fencing token: a worker that was thought dead
and comes back finds its token outdated and stops."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar, cast

import structlog
from sqlalchemy import ColumnElement, bindparam, select

from app.blobs.content import ContentStore
from app.blobs.references import keep_result
from app.blobs.removal import discard
from app.db.base import utcnow
from app.db.orm import Dataset, Engine, Job, SourceModel, StageResult
from app.db.uow import Database, patiently
from app.domain.chain import models_of
from app.domain.failures import infrastructure_failure
from app.domain.job_state import JobStatus, Trigger
from app.domain.spec import datasets_of
from app.jobs.columns import LEAN
from app.jobs.holds import Hold
from app.jobs.repository import JobRepository
from app.jobs.schedule import Offer, in_line, may_take, note_service
from app.jobs.sweep import Sweeper, exhausted
from app.queue.producer import Dispatch
from app.settings import WorkerSettings
from app.storage.base import BlobNotFound

log = structlog.get_logger(__name__)

_LONGEST_PAUSE_S = 3600.0
_LOOK_AGAIN_S = (0.005, 0.02, 0.05, 0.1)  # another's claim takes some milliseconds

# Composed once.
_WITH_ITS_MODEL = (
    select(Job, SourceModel).join(SourceModel, SourceModel.id == Job.model_id).where(Job.id == bindparam("job_id"))
)

_JOB = Job.metadata.tables[Job.__tablename__]  # in a statement of each stage; of the mapped class it takes longer

F = TypeVar("F", bound=Callable[..., Any])


class LeaseLost(Exception):
    """The job is no longer this worker's: the lease ran out and it was given on, or it was ended."""


@dataclass(frozen=True)
class Claim:
    """A worker's right to a job: id, fencing token, and what does not change while it runs."""

    job_id: str
    tenant_id: str
    token: int
    owner: str
    attempt: int
    claimed_at: datetime
    spent_seconds: float  # of the job's budget, by the attempts before this one
    attempts_in_all: int = 1  # of those, `attempt` came after a stage was finished last

    def holds(self) -> list[ColumnElement[bool]]:
        return [_JOB.c.fencing_token == self.token, _JOB.c.status == JobStatus.RUNNING.value]

    def with_a_result(self) -> dict[str, Any]:
        return {"attempts": 1}

    def seen(self, changes: dict[str, Any], event: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return changes, event


def _patient(write: F) -> F:
    """A method that waits for a database that is away, as long as a lease can hold: a restart of it is no reason to do
    the work once more. Twice is harmless: the second time the first one's result stands, or the claim is over."""

    @functools.wraps(write)
    def wrapped(self: JobLedger, *args: Any, **kwargs: Any) -> Any:
        return patiently(lambda: write(self, *args, **kwargs), self.settings.lease_s)

    return cast("F", wrapped)


class JobLedger:
    def __init__(self, db: Database, content: ContentStore, dispatch: Dispatch, settings: WorkerSettings) -> None:
        self.db = db
        self.content = content
        self.dispatch = dispatch
        self.settings = settings

    # The lease

    def claim(self, offer: Offer) -> Claim | None:
        """Take the best of the queued jobs that this worker can run, or None where there is nothing to take."""
        for pause in _LOOK_AGAIN_S:
            claim, passed_over = self._look(offer)
            if claim is not None or not passed_over:
                return claim
            time.sleep(pause)
        return self._look(offer)[0]

    def _look(self, offer: Offer) -> tuple[Claim | None, bool]:
        """One look at the queues; and whether a tenant was passed over at which another worker was at this moment:
        where there was nothing else, another look may find a job of it."""
        now, queues, passed_over = utcnow(), offer.queues, False
        until = now + timedelta(seconds=self.settings.lease_s)
        with self.db.write() as uow:
            for head in in_line(uow.session, queues, now):
                tenant_id = head.job.tenant_id
                may = may_take(uow.session, head)
                passed_over = passed_over or may is None
                if not may:
                    continue  # as many of its jobs run as its plan allows
                jobs = JobRepository(uow.session)
                job = jobs.take(tenant_id, head.queues, offer.worker_id, offer.lock, now, until)
                if job is not None:
                    note_service(uow.session, tenant_id, now)
                    claim = Claim(
                        job.id,
                        tenant_id,
                        job.fencing_token,
                        offer.worker_id,
                        job.attempts,
                        now,
                        job.spent_seconds,
                        job.attempts_in_all,
                    )
                    return claim, passed_over
            return None, passed_over

    def waiting(self, offer: Offer) -> Job | None:
        """The job that `claim` would take now."""
        with self.db.read() as session:
            first = next(iter(in_line(session, offer.queues, utcnow())), None)
            return None if first is None else session.get(Job, first.job.job_id, options=LEAN)

    def renew(self, claim: Claim) -> bool:
        """Extend the lease; True when the user asked to cancel. Raises `LeaseLost`."""
        expires = utcnow() + timedelta(seconds=self.settings.lease_s)
        with self.db.write() as uow:
            renewed = JobRepository(uow.session).touch(claim.job_id, claim.holds(), {"lease_expires_at": expires})
            if renewed is None:
                raise LeaseLost(claim.job_id)
            return renewed.cancel_requested_at is not None

    def release(self, claim: Claim, reason: str) -> None:
        """Give the job back at shutdown, and wake another worker for it; it counts as no attempt."""
        values = {"attempts": max(0, claim.attempt - 1), "attempts_in_all": claim.attempts_in_all - 1}
        self._give_back(claim, reason, values, wake=True)

    def exhausted(self, claim: Claim) -> bool:
        """Whether this was the last attempt."""
        return exhausted(self.settings, claim.attempt, claim.attempts_in_all)

    def retry_later(self, claim: Claim, reason: str) -> None:
        """Queue the job again after a failure of infrastructure; nobody takes it before a pause that doubles with every
        attempt."""
        pause = min(self.settings.redispatch_s * 2 ** (claim.attempt - 1), _LONGEST_PAUSE_S)
        self._give_back(claim, reason, {"not_before": utcnow() + timedelta(seconds=pause)}, wake=False)

    @_patient
    def _give_back(self, claim: Claim, reason: str, values: dict[str, Any], *, wake: bool) -> None:
        """To the queue; or to its end, where the user has asked for that in the meantime."""
        worked = max((utcnow() - claim.claimed_at).total_seconds(), 0.0)
        values = {**values, "spent_seconds": claim.spent_seconds + worked, "expected_end": None}
        with self.db.write() as uow:
            jobs = JobRepository(uow.session)
            running = JobStatus.RUNNING
            wanted = [*claim.holds(), Job.cancel_requested_at.is_(None)]
            event = {"reason": reason}
            released = jobs.apply(
                claim.job_id, Trigger.RELEASE, source=running, where=wanted, values=values, event=event
            )
            if released is not None:
                if wake:
                    job = uow.session.get_one(Job, claim.job_id)
                    uow.after_commit(lambda: self.dispatch(job))
            elif jobs.apply(claim.job_id, Trigger.CANCEL, source=running, where=claim.holds()) is None:
                raise LeaseLost(claim.job_id)

    # Progress

    @_patient
    def load(self, claim: Hold) -> tuple[Job, list[SourceModel], dict[str, Dataset]]:
        """The job, its model (of a chain, all of them in order) and its data sets by id."""
        with self.db.read() as session:
            job, first = session.execute(_WITH_ITS_MODEL, {"job_id": claim.job_id}).one()
            models = [first, *(session.get_one(SourceModel, i) for i in models_of(job.spec))]
            wanted = set(datasets_of(job.spec).values())
            datasets = {i: session.get_one(Dataset, i) for i in wanted}
            return job, models, datasets

    @_patient
    def progress(self, claim: Hold, changes: dict[str, Any], event_type: str, event: dict[str, Any]) -> None:
        """Change what clients see of a job that is worked on (stage, progress, stages) and leave an event."""
        told = claim.seen(changes, event)
        if told is None:
            return
        changes, event = told
        with self.db.write() as uow:
            version = JobRepository(uow.session).update(claim.job_id, claim.holds(), changes, event_type, event)
            if version is None:
                raise LeaseLost(claim.job_id)

    # Stage results: the cache

    @_patient
    def recall(self, tenant_id: str, key: str) -> StageResult | None:
        """The stored result under this key whose files are all still there."""
        with self.db.write() as uow:
            row = uow.session.get(StageResult, (tenant_id, key), with_for_update=True)
            if row is None:
                return None
            row.used_at = utcnow()  # from here on the collector leaves it and its files alone
        missing = next((sha256 for sha256 in _digests(row) if not self.content.exists(tenant_id, sha256)), None)
        if missing is None:
            return row
        log.warning("cached_blob_missing", stage=row.stage, key=key, sha256=missing)
        with self.db.write() as uow:
            now = uow.session.get(StageResult, (tenant_id, key), with_for_update=True)
            if now is not None and now.outputs == row.outputs:  # else made again by somebody else meanwhile
                uow.session.delete(now)
        return None

    @_patient
    def discard(self, tenant_id: str, sha256: str) -> bool:
        """As `app.blobs.removal.discard`: have a damaged blob made again; False where it was uploaded."""
        return discard(self.db, self.content, tenant_id, sha256)

    @_patient
    def remember(self, claim: Hold, result: StageResult) -> None:
        """Store a stage's result, its files being in storage already. Two workers may do so with the same key: the
        results are interchangeable, the later one wins."""
        files = {f["sha256"]: f["size_bytes"] for files in result.outputs.values() for f in files}
        with _missing_blobs_told():
            seen = self.content.sight(self.db, claim.tenant_id, files)
            with self.db.write() as uow:
                if JobRepository(uow.session).touch(claim.job_id, claim.holds(), claim.with_a_result()) is None:
                    raise LeaseLost(claim.job_id)
                self.content.record(uow.session, seen, files)
                keep_result(uow.session, result)

    # The end

    @_patient
    def complete(
        self,
        claim: Claim,
        *,
        engine: Engine,
        report: tuple[str, int],
        manifest: tuple[str, int],
        changes: dict[str, Any],
        event: dict[str, Any],
    ) -> None:
        """Engine row, report and manifest (digest and size, already stored) and the final state, in one transaction."""
        blobs = dict((report, manifest, *_engine_blobs(engine)))
        values = {
            "report_sha256": report[0],
            "manifest_sha256": manifest[0],
            "engine_ids": [engine.id],
            "progress": 1.0,
            "stage": None,
            "expected_end": None,
            **changes,
        }
        with _missing_blobs_told():
            seen = self.content.sight(self.db, claim.tenant_id, blobs)
            with self.db.write() as uow:
                self.content.record(uow.session, seen, blobs)
                uow.session.merge(engine)
                uow.session.flush()
                event = {"engine_ids": [engine.id], **event}
                self._end(JobRepository(uow.session), claim, Trigger.COMPLETE, values, event)

    @_patient
    def fail(self, claim: Claim, error: dict[str, Any], changes: dict[str, Any]) -> None:
        """The job ends without an engine; a report of what was tried may stand in `changes`."""
        changes = dict(changes)
        names = [n for n in ("report_sha256", "manifest_sha256") if n in changes]
        blobs = {changes[n]: changes.pop(f"{n}_size") for n in names}
        values = {"error": error, **changes}
        with _missing_blobs_told():
            seen = self.content.sight(self.db, claim.tenant_id, blobs)
            with self.db.write() as uow:
                self.content.record(uow.session, seen, blobs)
                self._end(JobRepository(uow.session), claim, Trigger.FAIL, values, {"error": error})

    @_patient
    def cancelled(self, claim: Claim, changes: dict[str, Any]) -> None:
        with self.db.write() as uow:
            self._end(JobRepository(uow.session), claim, Trigger.CANCEL, changes, {})

    def _end(
        self, jobs: JobRepository, claim: Claim, trigger: Trigger, values: dict[str, Any], event: dict[str, Any]
    ) -> None:
        done = jobs.apply(
            claim.job_id, trigger, source=JobStatus.RUNNING, where=claim.holds(), values=values, event=event
        )
        if done is None:
            raise LeaseLost(claim.job_id)

    def sweep(self) -> dict[str, int]:
        """Give on the jobs of dead workers, end what cannot go on or waited too long."""
        return Sweeper(self.db, self.dispatch, self.settings).sweep()

    def take_from_dead(self, lock: str) -> int:
        """Give on at once what the process had that held this lock, and is gone; how many jobs."""
        return Sweeper(self.db, self.dispatch, self.settings).take_from_dead(lock)


@contextmanager
def _missing_blobs_told() -> Iterator[None]:
    try:
        yield
    except BlobNotFound as error:
        detail = f"A stored file was deleted in the meantime ({error})."
        raise infrastructure_failure("blob_missing", detail, remedy="Submit the job again.") from error


def _digests(row: StageResult) -> Iterable[str]:
    for files in row.outputs.values():
        for file in files:
            yield file["sha256"]


def _engine_blobs(engine: Engine) -> tuple[tuple[str, int], tuple[str, int]]:
    return (engine.sha256, engine.size_bytes), (engine.bundle_sha256, engine.bundle_size_bytes)
