"""Which rows still need a tenant's blob, and the lock under which a blob comes and goes. SQL only."""

from __future__ import annotations

from sqlalchemy import ColumnElement, String, cast, exists, func, or_, select
from sqlalchemy.orm import Session

from app.db.orm import Dataset, Engine, Job, SourceModel, StageResult, Upload


def lock_blob(session: Session, tenant_id: str, sha256: str) -> None:
    """Until the end of this transaction nobody else stores or removes this blob under the lock.

    A writing transaction on SQLite is alone by itself; PostgreSQL takes an advisory lock.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"{tenant_id}/{sha256}", 0))))


def is_referenced(session: Session, tenant_id: str, sha256: str) -> bool:
    """Whether a live resource or a cached stage result of the tenant still needs the blob.

    An uploaded file may be one that this service made (an engine, the output of a stage that changed nothing), so
    those are asked as well. Stage results hold their files in JSON; the search through it runs on deletion only.
    """
    wanted: list[ColumnElement[bool]] = [
        exists().where(
            SourceModel.tenant_id == tenant_id, SourceModel.sha256 == sha256, SourceModel.deleted_at.is_(None)
        ),
        exists().where(Dataset.tenant_id == tenant_id, Dataset.sha256 == sha256, Dataset.deleted_at.is_(None)),
        exists().where(Upload.tenant_id == tenant_id, Upload.sha256 == sha256, Upload.status == "completed"),
        exists().where(Engine.tenant_id == tenant_id, or_(Engine.sha256 == sha256, Engine.bundle_sha256 == sha256)),
        exists().where(Job.tenant_id == tenant_id, or_(Job.report_sha256 == sha256, Job.manifest_sha256 == sha256)),
        exists().where(StageResult.tenant_id == tenant_id, cast(StageResult.outputs, String).contains(sha256)),
    ]
    return any(session.scalar(select(condition)) for condition in wanted)
