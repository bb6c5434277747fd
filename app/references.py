"""Which rows still need a tenant's blob, and the lock under which a blob comes and goes. SQL only; every question is
answered from an index, however many jobs, engines and results there are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, delete, func, insert, select
from sqlalchemy.orm import Session

from app.db.orm import Dataset, Engine, Job, SourceModel, StageFile, StageResult, Upload
from app.domain.upload_state import UploadState


def lock_blob(session: Session, tenant_id: str, sha256: str) -> None:
    """Until the end of this transaction nobody else stores or removes this blob under the lock.

    A writing transaction on SQLite is alone by itself; PostgreSQL takes an advisory lock.
    """
    # Begins the transaction: a session that has asked nothing yet has none, and what it sees in storage proves nothing.
    if session.connection().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"{tenant_id}/{sha256}", 0))))


_Column = tuple[ColumnElement[Any], list[ColumnElement[bool]]]


def _made(tenant_id: str) -> list[_Column]:
    """The columns that name what this service made, and which of their rows count. Most files are stages' outputs."""
    return [
        (StageFile.sha256.expression, [StageFile.tenant_id == tenant_id]),
        (Job.report_sha256.expression, [Job.tenant_id == tenant_id]),
        (Job.manifest_sha256.expression, [Job.tenant_id == tenant_id]),
        (Engine.sha256.expression, [Engine.tenant_id == tenant_id]),
        (Engine.bundle_sha256.expression, [Engine.tenant_id == tenant_id]),
    ]


def _uploaded(tenant_id: str) -> list[_Column]:
    """Those that name what a client sent."""
    return [
        (SourceModel.sha256.expression, [SourceModel.tenant_id == tenant_id, SourceModel.deleted_at.is_(None)]),
        (Dataset.sha256.expression, [Dataset.tenant_id == tenant_id, Dataset.deleted_at.is_(None)]),
        (Upload.sha256.expression, [Upload.tenant_id == tenant_id, Upload.status == UploadState.COMPLETED]),
    ]


def is_referenced(session: Session, tenant_id: str, sha256: str) -> bool:
    """Whether a live resource or a cached stage result of the tenant still needs the blob."""
    return bool(referenced(session, tenant_id, [sha256]))


def is_uploaded(session: Session, tenant_id: str, sha256: str) -> bool:
    """Whether a live model or data set, or an upload that may become one, is this blob: nobody else can make it."""
    return bool(_found(session, _uploaded(tenant_id), [sha256]))


def referenced(session: Session, tenant_id: str, digests: Collection[str]) -> set[str]:
    """Those of `digests` that a live resource or a cached stage result of the tenant still needs.

    An uploaded file may be one that this service made (an engine, the output of a stage that changed nothing), and the
    other way round.
    """
    return _found(session, [*_made(tenant_id), *_uploaded(tenant_id)], digests)


def _found(session: Session, columns: list[_Column], digests: Collection[str]) -> set[str]:
    wanted, found = set(digests), set[str]()
    for column, rows in columns:
        if wanted:
            found.update(session.scalars(select(column).where(column.in_(wanted), *rows).distinct()))
            wanted -= found
    return found


def keep_result(session: Session, result: StageResult) -> None:
    """Add a stage's result, or put it in the place of an earlier one, together with the files that it holds.

    A result that another version of this service wrote without them is none the worse for it: its files may go after
    their grace, and then it is made again.
    """
    tenant_id, key = result.tenant_id, result.key
    lock_blob(session, tenant_id, key)  # a digest like any other: two workers may come with the same key
    session.get(StageResult, (tenant_id, key), with_for_update=True)  # or it may be collected at this moment
    session.merge(result)
    session.flush()
    session.execute(delete(StageFile).where(StageFile.tenant_id == tenant_id, StageFile.key == key))
    digests = {file["sha256"] for files in result.outputs.values() for file in files}
    if digests:
        rows = [{"tenant_id": tenant_id, "key": key, "sha256": sha256} for sha256 in sorted(digests)]
        session.execute(insert(StageFile), rows)


def forget_results(session: Session, tenant_id: str, sha256: str) -> None:
    """Drop the cached stage results that hold the blob."""
    holding = select(StageFile.key).where(StageFile.tenant_id == tenant_id, StageFile.sha256 == sha256)
    session.execute(delete(StageResult).where(StageResult.tenant_id == tenant_id, StageResult.key.in_(holding)))
