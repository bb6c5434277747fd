"""All SQL on examinations. The row is the question, the queue and the answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import and_, or_, select, update
from sqlalchemy.orm import Session

from app.db.base import utcnow
from app.db.orm import Examination, SourceModel


class ExaminationRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    def of_model(self, tenant_id: str, model_id: str) -> list[Examination]:
        query = select(Examination).where(Examination.tenant_id == tenant_id, Examination.model_id == model_id)
        return [*self.session.scalars(query.order_by(Examination.backend))]

    def ask(self, tenant_id: str, model_id: str, backend: str, version: str) -> None:
        """Ask, or ask anew: what another version answered no longer counts."""
        row = self.session.get(Examination, (model_id, backend))
        if row is None:
            row = Examination(tenant_id=tenant_id, model_id=model_id, backend=backend)
            self.session.add(row)
        row.version, row.status, row.answer, row.error = version, "asked", None, None
        row.attempts, row.lease_owner, row.lease_expires_at = 0, None, None
        row.asked_at, row.answered_at = utcnow(), None

    def oldest_free(self, backends: Collection[str], formats: Collection[str]) -> SourceModel | None:
        """The model whose question waits longest, of those that a worker with these can answer."""
        query = (
            select(SourceModel)
            .join(Examination, Examination.model_id == SourceModel.id)
            .where(_free(utcnow()), Examination.backend.in_(backends), SourceModel.format.in_(formats))
            .where(SourceModel.deleted_at.is_(None))
            .order_by(Examination.asked_at)
            .limit(1)
        )
        return self.session.scalar(query)

    def take(self, model_id: str, backends: Collection[str], owner: str, until: datetime) -> list[str]:
        """The backends whose questions on this model are now `owner`'s to answer: of those that nobody else has."""
        statement = (
            update(Examination)
            .where(Examination.model_id == model_id, Examination.backend.in_(backends), _free(utcnow()))
            .values(lease_owner=owner, lease_expires_at=until, attempts=Examination.attempts + 1)
            .returning(Examination.backend)
            .execution_options(synchronize_session=False)
        )
        return sorted(self.session.scalars(statement))

    def update(self, model_id: str, backends: Collection[str], owner: str, values: Mapping[str, Any]) -> int:
        """Change what is still `owner`'s; how many that were."""
        statement = (
            update(Examination)
            .where(Examination.model_id == model_id, Examination.backend.in_(backends))
            .where(Examination.lease_owner == owner, Examination.status == "asked")
            .values(**values)
            .returning(Examination.backend)
            .execution_options(synchronize_session=False)
        )
        return len([*self.session.scalars(statement)])


def _free(now: datetime) -> Any:
    unheld = or_(Examination.lease_expires_at.is_(None), Examination.lease_expires_at < now)
    return and_(Examination.status == "asked", unheld)
