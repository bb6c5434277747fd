"""Delivered engines."""

from __future__ import annotations

from app.artifacts.repository import EngineRepository
from app.db.orm import Engine
from app.db.uow import Database
from app.errors import not_found


class EngineService:
    """Calls block."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def get(self, tenant_id: str, engine_id: str) -> Engine:
        with self._db.read() as session:
            engine = EngineRepository(session).get(tenant_id, engine_id)
        if engine is None:
            raise not_found("engine", engine_id)
        return engine

    def page(
        self, tenant_id: str, *, limit: int, before: str | None, job_id: str | None, model_id: str | None
    ) -> list[Engine]:
        """Newest first."""
        with self._db.read() as session:
            return EngineRepository(session).page(
                tenant_id, limit=limit, before=before, job_id=job_id, model_id=model_id
            )
