"""All SQL on delivered engines."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Select, select, union
from sqlalchemy.orm import Session

from app.db.chains import ChainMember
from app.db.orm import Engine


class EngineRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    def get(self, tenant_id: str, engine_id: str) -> Engine | None:
        return self.session.scalar(select(Engine).where(Engine.id == engine_id, Engine.tenant_id == tenant_id))

    def page(
        self, tenant_id: str, *, limit: int, before: str | None, job_id: str | None, model_id: str | None
    ) -> list[Engine]:
        """Newest first. `model_id`: of the engine's job, or any of its chain's."""
        wanted = [Engine.tenant_id == tenant_id]
        if before is not None:
            wanted.append(Engine.id < before)
        if job_id is not None:
            wanted.append(Engine.job_id == job_id)
        if model_id is not None:
            # A page of each, by an index of its own: whoever asks for either at once reads all of the tenant's.
            behind = Engine.job_id.in_(select(ChainMember.job_id).where(ChainMember.model_id == model_id))
            pages = _newest(limit, *wanted, Engine.model_id == model_id), _newest(limit, *wanted, behind)
            wanted = [Engine.id.in_(union(*pages))]
        return list(self.session.scalars(select(Engine).where(*wanted).order_by(Engine.id.desc()).limit(limit)))


def _newest(limit: int, *wanted: ColumnElement[bool]) -> Select[tuple[str]]:
    page = select(Engine.id).where(*wanted).order_by(Engine.id.desc()).limit(limit).subquery()
    return select(page.c.id)
