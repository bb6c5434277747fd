"""All SQL on delivered engines."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.orm import Engine


class EngineRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    def get(self, tenant_id: str, engine_id: str) -> Engine | None:
        return self.session.scalar(select(Engine).where(Engine.id == engine_id, Engine.tenant_id == tenant_id))

    def page(
        self, tenant_id: str, *, limit: int, before: str | None, job_id: str | None, model_id: str | None
    ) -> list[Engine]:
        query = select(Engine).where(Engine.tenant_id == tenant_id)
        if before is not None:
            query = query.where(Engine.id < before)
        if job_id is not None:
            query = query.where(Engine.job_id == job_id)
        if model_id is not None:
            query = query.where(Engine.model_id == model_id)
        return list(self.session.scalars(query.order_by(Engine.id.desc()).limit(limit)))
