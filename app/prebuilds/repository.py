"""All SQL on prebuilds. A row counts as long as its job is queued."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from app.db.base import utcnow
from app.db.orm import Job, Prebuild, SourceModel
from app.domain.job_state import JobStatus

WAITS = and_(Job.status == JobStatus.QUEUED.value, Job.cancel_requested_at.is_(None))


class PrebuildRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    def add(self, job_id: str, backend: str, target: str) -> None:
        self.session.add(Prebuild(job_id=job_id, backend=backend, target=target))

    def longest_waiting(
        self, targets: Mapping[str, Collection[str]], formats: Collection[str], attempts: int
    ) -> tuple[Prebuild, Job] | None:
        """Of those that a worker with these targets (by backend) and formats can build, tried fewer times than that."""
        mine = [and_(Prebuild.backend == backend, Prebuild.target.in_(names)) for backend, names in targets.items()]
        query = (
            select(Prebuild, Job)
            .join(Job, Job.id == Prebuild.job_id)
            .join(SourceModel, SourceModel.id == Job.model_id)
            .where(WAITS, _free(utcnow()), Prebuild.attempts < attempts, or_(*mine), SourceModel.format.in_(formats))
            .order_by(Job.created_at, Job.id, Prebuild.backend)
            .limit(1)
        )
        found = self.session.execute(query).first()
        return None if found is None else (found[0], found[1])

    def take(self, prebuild: Prebuild, owner: str, until: datetime) -> bool:
        """False where somebody else was faster."""
        statement = (
            update(Prebuild)
            .where(Prebuild.job_id == prebuild.job_id, Prebuild.backend == prebuild.backend, _free(utcnow()))
            .values(lease_owner=owner, lease_expires_at=until, attempts=Prebuild.attempts + 1)
            .returning(Prebuild.job_id)
            .execution_options(synchronize_session=False)
        )
        return self.session.scalar(statement) is not None

    def update(self, job_id: str, backend: str, owner: str, values: Mapping[str, Any]) -> bool:
        """Change what is still `owner`'s; False where it is not, or the job does not wait any more."""
        statement = (
            update(Prebuild)
            .where(*_held(job_id, backend, owner), select(Job.id).where(Job.id == job_id, WAITS).exists())
            .values(**values)
            .returning(Prebuild.job_id)
            .execution_options(synchronize_session=False)
        )
        return self.session.scalar(statement) is not None


def held(job_id: str, backend: str, owner: str) -> list[ColumnElement[bool]]:
    """Conditions on the job: it waits, and this prebuild of it is `owner`'s."""
    return [WAITS, select(Prebuild.job_id).where(*_held(job_id, backend, owner)).exists()]


def _held(job_id: str, backend: str, owner: str) -> list[ColumnElement[bool]]:
    return [
        Prebuild.job_id == job_id,
        Prebuild.backend == backend,
        Prebuild.lease_owner == owner,
        Prebuild.ended_at.is_(None),
    ]


def _free(now: datetime) -> ColumnElement[bool]:
    unheld = or_(Prebuild.lease_expires_at.is_(None), Prebuild.lease_expires_at < now)
    return and_(Prebuild.ended_at.is_(None), unheld)
