"""Which rows still need a tenant's blob, and the lock under which a blob comes and goes. SQL only."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, String, cast, delete, func, select
from sqlalchemy.orm import Session

from app.db.orm import Dataset, Engine, Job, SourceModel, StageResult, Upload
from app.domain.upload_state import UploadState

_STREAMED_ROWS = 1000


def lock_blob(session: Session, tenant_id: str, sha256: str) -> None:
    """Until the end of this transaction nobody else stores or removes this blob under the lock.

    A writing transaction on SQLite is alone by itself; PostgreSQL takes an advisory lock.
    """
    # Begins the transaction: a session that has asked nothing yet has none, and what it sees in storage proves nothing.
    if session.connection().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"{tenant_id}/{sha256}", 0))))


def _columns(tenant_id: str) -> list[tuple[ColumnElement[Any], list[ColumnElement[bool]]]]:
    """Every column that names a blob, and which of the tenant's rows count.

    An uploaded file may be one that this service made (an engine, the output of a stage that changed nothing), so
    those are asked as well.
    """
    return [
        (SourceModel.sha256.expression, [SourceModel.tenant_id == tenant_id, SourceModel.deleted_at.is_(None)]),
        (Dataset.sha256.expression, [Dataset.tenant_id == tenant_id, Dataset.deleted_at.is_(None)]),
        (Upload.sha256.expression, [Upload.tenant_id == tenant_id, Upload.status == UploadState.COMPLETED]),
        (Engine.sha256.expression, [Engine.tenant_id == tenant_id]),
        (Engine.bundle_sha256.expression, [Engine.tenant_id == tenant_id]),
        (Job.report_sha256.expression, [Job.tenant_id == tenant_id]),
        (Job.manifest_sha256.expression, [Job.tenant_id == tenant_id]),
    ]


def is_referenced(session: Session, tenant_id: str, sha256: str) -> bool:
    """Whether a live resource or a cached stage result of the tenant still needs the blob.

    Stage results hold their files in JSON, and the search goes through all of the tenant's: for one blob, on deletion.
    """
    for column, rows in _columns(tenant_id):
        if session.scalar(select(column).where(column == sha256, *rows).limit(1)) is not None:
            return True
    query = select(StageResult.key).where(*_results_with(tenant_id, sha256))
    return session.scalar(query.limit(1)) is not None


def is_uploaded(session: Session, tenant_id: str, sha256: str) -> bool:
    """Whether a live model or data set, or an upload that may become one, is this blob: nobody else can make it."""
    uploads = _columns(tenant_id)[:3]
    return any(session.scalar(select(c).where(c == sha256, *rows).limit(1)) is not None for c, rows in uploads)


def forget_results(session: Session, tenant_id: str, sha256: str) -> None:
    """Drop the cached stage results that hold the blob."""
    session.execute(delete(StageResult).where(*_results_with(tenant_id, sha256)))


def _results_with(tenant_id: str, sha256: str) -> list[ColumnElement[bool]]:
    return [StageResult.tenant_id == tenant_id, cast(StageResult.outputs, String).contains(sha256)]


def referenced(
    session: Session, tenant_id: str, digests: Collection[str], *, results_since: datetime | None = None
) -> set[str]:
    """Those of `digests` that `is_referenced`, in one pass over the tenant's stage results, whose rows are streamed.

    With `results_since` only results used since then are looked through: for a second look at what the first one, at a
    later time than that, has found to be unreferenced.
    """
    wanted = set(digests)
    found: set[str] = set()
    for column, rows in _columns(tenant_id):
        found.update(sha256 for sha256 in session.scalars(select(column).where(column.in_(wanted), *rows)) if sha256)
    query = select(StageResult.outputs).where(StageResult.tenant_id == tenant_id)
    if results_since is not None:
        query = query.where(StageResult.used_at >= results_since)
    for outputs in session.scalars(query.execution_options(yield_per=_STREAMED_ROWS)):
        found.update(file["sha256"] for files in outputs.values() for file in files if file["sha256"] in wanted)
    return found
