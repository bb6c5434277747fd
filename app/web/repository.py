"""SQL of the pages: what they show of many rows, without the large columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.orm import Engine, Job, JobEvent, SourceModel
from app.jobs.family import PARENTS
from app.jobs.repository import ACTIVE, filtered


@dataclass(frozen=True)
class JobLine:
    """A job in a list. `chain`: as in its spec. `engine`: final metrics of what it delivered, None where there is
    none."""

    id: str
    status: str
    stage: str | None
    progress: float
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expected_end: datetime | None
    error: dict[str, Any] | None
    queue: str
    model_id: str
    model: str
    objective: str | None
    chain: dict[str, Any] | None
    engine: dict[str, Any] | None = None

    @property
    def behind(self) -> int:
        """How many models follow the first one."""
        return len((self.chain or {}).get("then") or ())

    @property
    def active(self) -> bool:
        return self.status in ACTIVE

    @property
    def compares(self) -> bool:
        """Whether it compares targets, and is no job of one."""
        return self.queue == PARENTS


@dataclass(frozen=True)
class EngineLine:
    """An engine in a list. `job_id` is None where the job was deleted."""

    engine: Engine
    model: str
    job_id: str | None


class PageRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    def lines(
        self,
        tenant_id: str,
        *,
        limit: int,
        before: str | None = None,
        status: str | None = None,
        model_id: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> list[JobLine]:
        """Newest first."""
        query = select(
            Job.id, Job.status, Job.stage, Job.progress, Job.created_at, Job.started_at, Job.finished_at,
            Job.expected_end, Job.error, Job.queue, Job.model_id, SourceModel.name.label("model"),
            Job.spec["objective"].as_string().label("objective"), Job.spec["chain"].label("chain"),
        ).join(SourceModel, SourceModel.id == Job.model_id)  # fmt: skip
        query = filtered(query, tenant_id, limit=limit, before=before, status=status, model_id=model_id)
        if ids is not None:
            query = query.where(Job.id.in_(ids))
        rows = self.session.execute(query).all()
        found = self.engines(tenant_id, [row.id for row in rows if row.status == "succeeded"])
        return [JobLine(**row._mapping, engine=found[row.id].metrics if row.id in found else None) for row in rows]

    def model_name(self, tenant_id: str, model_id: str) -> str | None:
        """Of an uploaded model, also of one that was deleted since."""
        query = select(SourceModel.name).where(SourceModel.id == model_id, SourceModel.tenant_id == tenant_id)
        return self.session.scalar(query)

    def engines(self, tenant_id: str, job_ids: Sequence[str]) -> dict[str, Engine]:
        """Of these jobs, by their ids; a job's newest one."""
        if not job_ids:
            return {}
        query = select(Engine).where(Engine.tenant_id == tenant_id, Engine.job_id.in_(job_ids)).order_by(Engine.id)
        return {engine.job_id: engine for engine in self.session.scalars(query)}

    def engine_lines(
        self, tenant_id: str, *, limit: int, before: str | None = None, ids: Sequence[str] | None = None
    ) -> list[EngineLine]:
        """Newest first."""
        query = (
            select(Engine, SourceModel.name, Job.id)
            .join(SourceModel, SourceModel.id == Engine.model_id)
            .outerjoin(Job, Job.id == Engine.job_id)
            .where(Engine.tenant_id == tenant_id)
        )
        if before is not None:
            query = query.where(Engine.id < before)
        if ids is not None:
            query = query.where(Engine.id.in_(ids))
        rows = self.session.execute(query.order_by(Engine.id.desc()).limit(limit))
        return [EngineLine(*row) for row in rows]

    def active(self, tenant_id: str) -> dict[str, int]:
        """How many jobs wait and run."""
        query = select(Job.status, func.count()).where(Job.tenant_id == tenant_id, Job.status.in_(ACTIVE))
        return {row[0]: row[1] for row in self.session.execute(query.group_by(Job.status))}

    def told(self, job_id: str, event_type: str) -> list[dict[str, Any]]:
        """The data of a job's events of this type, in order."""
        query = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == event_type)
        return [*self.session.scalars(query.order_by(JobEvent.seq))]
