"""Delivered engines."""

from __future__ import annotations

from app.artifacts.ensembles import Chains
from app.artifacts.repository import EngineRepository
from app.audit import current_actor, record
from app.blobs.content import ContentStore
from app.blobs.removal import release
from app.db.orm import Engine
from app.db.uow import Database
from app.errors import not_found
from app.jobs.removal import remove_engine


class EngineService:
    """Calls block."""

    def __init__(self, db: Database, content: ContentStore) -> None:
        self._db = db
        self._content = content
        self.chains = Chains()

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

    def delete(self, tenant_id: str, engine_id: str) -> None:
        """Remove the engine, and its files where nothing else of the tenant needs them."""
        with self._db.write() as uow:
            digests = remove_engine(uow.session, tenant_id, engine_id)
            if digests is None:
                raise not_found("engine", engine_id)
            record(uow.session, tenant_id, current_actor(), "engine.delete", engine_id)
        release(self._db, self._content, tenant_id, digests)
