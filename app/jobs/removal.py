"""How jobs go for good: their rows, and with them events, report and manifest. Engines stay, as they do when their
model is deleted, unless their job's deletion asks for them. SQL only; the bytes are for the caller, or the
collector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Row, delete, select, update
from sqlalchemy.orm import Session

from app.db.orm import Engine, Job, JobTally
from app.domain.job_state import TERMINAL
from app.jobs.repository import JobRepository

_ENDED = sorted(status.value for status in TERMINAL)
_ALONE = {"synchronize_session": False}


@dataclass
class Removed:
    """Jobs that are gone, and the blobs that they needed."""

    job_ids: list[str] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)


def remove_jobs(session: Session, tenant_id: str, job_ids: Collection[str], *, engines: bool = False) -> Removed:
    """Remove those of these jobs that have ended, and with one that compares targets the jobs of these. What is a part
    of another one stays, and so does what has not ended: that is asked here, under the rows' locks."""
    # From children to parents, as everywhere.
    children = _locked(session, tenant_id, Job.parent_id.in_(job_ids))
    parents = _locked(session, tenant_id, Job.id.in_(job_ids), Job.parent_id.is_(None))
    ended = {row.id for row in parents}
    rows = [*parents, *(row for row in children if row.parent_id in ended)]
    gone = Removed([row.id for row in rows])
    if not rows:
        return gone
    gone.digests.update(d for row in rows for d in (row.report_sha256, row.manifest_sha256) if d is not None)
    if engines:
        made = delete(Engine).where(Engine.tenant_id == tenant_id, Engine.job_id.in_(gone.job_ids))
        files = session.execute(made.returning(Engine.sha256, Engine.bundle_sha256), execution_options=_ALONE)
        gone.digests.update(sha256 for row in files for sha256 in row)
    session.execute(delete(Job).where(Job.id.in_(gone.job_ids)), execution_options=_ALONE)
    # The metrics count the jobs that there are; those that were tallied are not counted again.
    tallied = Counter(row.status for row in rows if row.tallied_at is not None)
    for status in sorted(tallied):
        fewer = update(JobTally).where(JobTally.status == status).values(jobs=JobTally.jobs - tallied[status])
        session.execute(fewer, execution_options=_ALONE)
    return gone


def remove_engine(session: Session, tenant_id: str, engine_id: str) -> set[str] | None:
    """Remove an engine; its job, and the one that compares that, name it no more. Its files' digests; None where there
    is no such engine."""
    query = select(Engine.job_id).where(Engine.id == engine_id, Engine.tenant_id == tenant_id)
    job_id = session.scalar(query)
    if job_id is None:
        return None
    _name_no_more(session, job_id, engine_id)
    gone = delete(Engine).where(Engine.id == engine_id, Engine.tenant_id == tenant_id)
    row = session.execute(
        gone.returning(Engine.sha256, Engine.bundle_sha256), execution_options=_ALONE
    ).one_or_none()  # another one may have been faster
    return None if row is None else set(row)


def _name_no_more(session: Session, job_id: str, engine_id: str) -> None:
    # Not through an object of the session: it may be an old one, and what is changed is what stands there now.
    columns = select(Job.engine_ids, Job.parent_id).where(Job.id == job_id)
    found = session.execute(columns.with_for_update()).one_or_none()
    if found is None:  # the job went before its engines
        return
    if engine_id in found.engine_ids:
        left = [other for other in found.engine_ids if other != engine_id]
        note = {"message": f"engine {engine_id} was deleted"}
        JobRepository(session).update(job_id, [], {"engine_ids": left}, "note", note)
    if found.parent_id is not None:
        _name_no_more(session, found.parent_id, engine_id)


def _locked(session: Session, tenant_id: str, *which: ColumnElement[bool]) -> list[Row[Any]]:
    columns = (Job.id, Job.parent_id, Job.status, Job.tallied_at, Job.report_sha256, Job.manifest_sha256)
    query = select(*columns).where(Job.tenant_id == tenant_id, Job.status.in_(_ENDED), *which)
    return [*session.execute(query.order_by(Job.id).with_for_update())]
