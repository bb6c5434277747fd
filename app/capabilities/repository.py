"""All SQL on workers, and the counts that operators watch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import String, cast, func, null, select, text, union_all, update
from sqlalchemy.orm import Session

from app.db.base import utcnow
from app.db.orm import Job, JobTally, Worker
from app.domain.job_state import TERMINAL, JobStatus

_ENDED = sorted(status.value for status in TERMINAL)


class WorkerRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    def upsert(self, worker_id: str, fields: Mapping[str, Any]) -> None:
        """Write the worker's row; a worker that comes back under its old name counts as started anew."""
        now = utcnow()
        row = self.session.get(Worker, worker_id)
        if row is None:
            self.session.add(Worker(id=worker_id, started_at=now, last_seen_at=now, **fields))
            return
        for name, value in fields.items():
            setattr(row, name, value)
        row.started_at = row.last_seen_at = now
        row.stopped_at = row.draining_at = None

    def touch(self, worker_id: str) -> bool | None:
        """A sign of life; whether it is to take no more jobs, or None where there is no such worker."""
        statement = update(Worker).where(Worker.id == worker_id).values(last_seen_at=utcnow(), stopped_at=None)
        row = self.session.execute(statement.returning(Worker.id, Worker.draining_at)).one_or_none()
        return None if row is None else row.draining_at is not None

    def drain(self, worker_id: str, *, draining: bool) -> bool:
        at = utcnow() if draining else None
        statement = update(Worker).where(Worker.id == worker_id).values(draining_at=at)
        return self.session.scalar(statement.returning(Worker.id)) is not None

    def stop(self, worker_id: str) -> None:
        self.session.execute(update(Worker).where(Worker.id == worker_id).values(stopped_at=utcnow()))

    def seen_since(self, since: datetime, *, stopped: bool) -> list[Worker]:
        """Workers that gave a sign of life after `since`, by name; with `stopped` also those that have said goodbye."""
        query = select(Worker).where(Worker.last_seen_at >= since).order_by(Worker.id)
        if not stopped:
            query = query.where(Worker.stopped_at.is_(None))
        return [*self.session.scalars(query)]


class StatisticsRepository:
    """Counts over all tenants, for the operator's metrics. They name no tenant."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def job_counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Jobs by status, and those that wait by queue (the row, not the broker's message, is what waits).

        Those that have been tallied are not counted again; those that live or have ended lately lie together in
        an index. In one statement, so that a job is seen on one side of the tally or the other.
        """
        counted = select(Job.status, Job.queue, func.count()).where(Job.tallied_at.is_(None))
        tallied = select(JobTally.status, cast(null(), String), JobTally.jobs)
        jobs: Counter[str] = Counter()
        queued: Counter[str] = Counter()
        for status, queue, count in self.session.execute(union_all(counted.group_by(Job.status, Job.queue), tallied)):
            jobs[status] += count
            if status == JobStatus.QUEUED:
                queued[queue] += count
        return dict(jobs), dict(queued)

    def tally(self, limit: int) -> int:
        """Count so many jobs that have ended once and for all. How many that were: each by one caller, however many
        there are, and all or none of it is committed."""
        ended = select(Job.id).where(Job.tallied_at.is_(None), Job.status.in_(_ENDED)).limit(limit)
        ids = list(self.session.scalars(ended.with_for_update(skip_locked=True)))
        if not ids:
            return 0
        marked = update(Job).where(Job.id.in_(ids)).values(tallied_at=utcnow()).returning(Job.status)
        counts = Counter(self.session.scalars(marked, execution_options={"synchronize_session": False}))
        for status in sorted(counts):  # in one order everywhere: nobody waits in a circle
            more = update(JobTally).where(JobTally.status == status).values(jobs=JobTally.jobs + counts[status])
            self.session.execute(more, execution_options={"synchronize_session": False})
        return len(ids)

    def ping(self) -> None:
        self.session.execute(text("SELECT 1"))
