"""Which rows still need a tenant's blob, and the lock under which a blob comes and goes. SQL only; every question is
answered from an index, however many jobs, engines and results there are.

The resources' own rows are the references. A table of them beside these would have to be written with every owner by
every version of this service that runs, and where one did not, a blob would go that is needed, or stay for ever; so
what is written of a resource and what keeps its blobs are one and the same row here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, Text, delete, func, insert, literal, select, union
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.db.orm import Dataset, Engine, Job, SourceModel, StageFile, StageResult, Upload
from app.domain.upload_state import UploadState


def lock_blob(session: Session, tenant_id: str, sha256: str) -> None:
    """Until the end of this transaction nobody else stores or removes this blob under the lock."""
    lock_blobs(session, tenant_id, [sha256])


def lock_blobs(session: Session, tenant_id: str, digests: Collection[str]) -> None:
    """The same of several, in one order everywhere: locks taken in turn cannot wait for each other.

    A writing transaction on SQLite is alone by itself; PostgreSQL takes advisory locks, one after the other as the
    array has them.
    """
    # Begins the transaction: a session that has asked nothing yet has none, and what it sees in storage proves nothing.
    if session.connection().dialect.name == "postgresql" and digests:
        names = literal([f"{tenant_id}/{sha256}" for sha256 in sorted(set(digests))], ARRAY(Text))
        name = func.unnest(names).column_valued("name")
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


@dataclass(frozen=True)
class Reference:
    """That a row of the tenant needs a blob. `kind` and `owner`: of which resource, and its id."""

    sha256: str
    kind: str
    owner: str


@dataclass(frozen=True)
class _Source:
    """A column that names blobs; which of its rows count."""

    kind: str
    sha256: InstrumentedAttribute[Any]
    owner: InstrumentedAttribute[str]
    rows: tuple[ColumnElement[bool], ...] = ()

    def rows_of(self, tenant_id: str) -> list[ColumnElement[bool]]:
        return [self.sha256.class_.tenant_id == tenant_id, *self.rows]


# What this service made. Most files are stages' outputs: a cache, which no resource of the tenant needs.
_CACHED = _Source("stage result", StageFile.sha256, StageFile.key)
_DELIVERED = (
    _Source("report", Job.report_sha256, Job.id),
    _Source("manifest", Job.manifest_sha256, Job.id),
    _Source("engine", Engine.sha256, Engine.id),
    _Source("bundle", Engine.bundle_sha256, Engine.id),
)
# What a client sent, and nobody else can make again.
_UPLOADED = (
    _Source("model", SourceModel.sha256, SourceModel.id, (SourceModel.deleted_at.is_(None),)),
    _Source("data set", Dataset.sha256, Dataset.id, (Dataset.deleted_at.is_(None),)),
    _Source("upload", Upload.sha256, Upload.id, (Upload.status == UploadState.COMPLETED,)),
)
_ALL = (_CACHED, *_DELIVERED, *_UPLOADED)
CACHED = _CACHED.kind
UPLOADED = frozenset(source.kind for source in _UPLOADED)


def held(tenant_id: str) -> CompoundSelect[str]:
    """The digests that the tenant's own resources need, as rows, each once; not what is only cached. That they are
    each once is said (UNION) for PostgreSQL: else it takes them for 200 whatever their number, and looks for each."""
    return union(
        *(
            select(source.sha256.expression).where(*source.rows_of(tenant_id), source.sha256.is_not(None))
            for source in (*_DELIVERED, *_UPLOADED)
        )
    )


def is_held(session: Session, tenant_id: str, sha256: str) -> bool:
    """Whether one of `held` is this blob."""
    return bool(_found(session, tenant_id, (*_DELIVERED, *_UPLOADED), [sha256]))


def references_between(session: Session, tenant_id: str, first: str, last: str) -> list[Reference]:
    """Those to blobs whose digest is in this range, both ends with it."""
    found: list[Reference] = []
    for source in _ALL:
        in_range = source.sha256.between(first, last)
        rows = session.execute(select(source.sha256, source.owner).where(*source.rows_of(tenant_id), in_range))
        found += [Reference(sha256, source.kind, owner) for sha256, owner in rows]
    return found


def has_many_references(session: Session, tenant_id: str, many: int) -> bool:
    """Whether one kind of row alone has so many; no more of them are counted."""
    for source in _ALL:
        some = select(source.owner).where(*source.rows_of(tenant_id), source.sha256.is_not(None)).limit(many).subquery()
        if (session.scalar(select(func.count()).select_from(some)) or 0) >= many:
            return True
    return False


def is_referenced(session: Session, tenant_id: str, sha256: str) -> bool:
    """Whether a live resource or a cached stage result of the tenant still needs the blob."""
    return bool(referenced(session, tenant_id, [sha256]))


def is_uploaded(session: Session, tenant_id: str, sha256: str) -> bool:
    """Whether a live model or data set, or an upload that may become one, is this blob: nobody else can make it."""
    return bool(_found(session, tenant_id, _UPLOADED, [sha256]))


def referenced(session: Session, tenant_id: str, digests: Collection[str]) -> set[str]:
    """Those of `digests` that a live resource or a cached stage result of the tenant still needs.

    An uploaded file may be one that this service made (an engine, the output of a stage that changed nothing), and the
    other way round. Asked of one kind of row after the other, the most frequent first: what is found needs no more.
    """
    return _found(session, tenant_id, _ALL, digests)


def _found(session: Session, tenant_id: str, sources: Sequence[_Source], digests: Collection[str]) -> set[str]:
    wanted, found = set(digests), set[str]()
    for source in sources:
        if wanted:
            column, rows = source.sha256.expression, source.rows_of(tenant_id)
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
