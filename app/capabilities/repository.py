"""All SQL on workers, and the counts that operators watch."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from app.db.base import utcnow
from app.db.orm import Job, Worker


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
        row.stopped_at = None

    def touch(self, worker_id: str) -> bool:
        statement = update(Worker).where(Worker.id == worker_id).values(last_seen_at=utcnow(), stopped_at=None)
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

    def jobs_by_status(self) -> dict[str, int]:
        query = select(Job.status, func.count()).group_by(Job.status)
        return {row[0]: row[1] for row in self.session.execute(query)}

    def queue_depth(self) -> dict[str, int]:
        """Jobs waiting in each queue. The row, not the broker's message, is what waits."""
        query = select(Job.queue, func.count()).where(Job.status == "queued").group_by(Job.queue)
        return {row[0]: row[1] for row in self.session.execute(query)}

    def ping(self) -> None:
        self.session.execute(text("SELECT 1"))
