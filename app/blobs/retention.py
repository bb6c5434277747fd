"""When what a tenant has expires: so many days after it was made, a job after its end, its stages' results after their
last use. The settings say it for all tenants, a tenant's row for itself.

What expires is deleted as its owner would delete it, in small steps, by the collector: rows here, bytes where it finds
that nothing needs them. What a queued or running job uses stays until that has ended.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any, TypeAlias

from sqlalchemy import ColumnElement, and_, delete, or_, select, tuple_, union, update
from sqlalchemy.orm import Session

from app.db.accounts import Tenant
from app.db.base import utcnow
from app.db.chains import ChainMember
from app.db.orm import Dataset, Engine, Examination, Job, JobEvent, SourceModel, StageResult
from app.db.uow import Database
from app.domain.spec import DATASETS
from app.jobs.removal import remove_engine, remove_jobs
from app.jobs.repository import ACTIVE
from app.settings import Settings

_STEP = 50  # rows that one transaction deletes
_EVENTS_OF = 200  # jobs whose events one transaction deletes
_KNOWN_S = 5.0
_HIDDEN_DAYS = 1  # that the row of what was deleted stays at least
_ALONE = {"synchronize_session": False}
_Uploaded: TypeAlias = type[SourceModel] | type[Dataset]


@dataclass(frozen=True)
class Policy:
    """Days until each kind expires; None: never. `events`: of a job that stays, but for its changes of state."""

    jobs: int | None = None
    events: int | None = None
    engines: int | None = None
    models: int | None = None
    datasets: int | None = None
    uploads: int | None = None
    results: int | None = None

    def until(self, kind: str, since: datetime | None) -> datetime | None:
        """When it expires, of what was made (a job: has ended) then."""
        days: int | None = getattr(self, kind)
        return None if days is None or since is None else since + timedelta(days=days)


KINDS = tuple(field.name for field in fields(Policy))
LONGEST_DAYS = 36_500


def policy_of(settings: Settings, own: Mapping[str, Any] | None) -> Policy:
    """A tenant's policy, `own` being what its row says. What this version does not know is left out."""
    defaults = {kind: getattr(settings.retention, f"{kind}_days", None) for kind in KINDS}
    defaults["results"] = settings.collector.results_days
    named = {kind: days for kind, days in (own or {}).items() if kind in KINDS and _is_policy(days)}
    return Policy(**{**defaults, **named})


def _is_policy(days: Any) -> bool:
    return days is None or (isinstance(days, int) and 1 <= days <= LONGEST_DAYS)


def change_policy(session: Session, tenant_id: str, changes: Mapping[str, int | None], forget: Collection[str]) -> None:
    """Change what a tenant's row says: `forget` leaves to the settings what it names."""
    tenant = session.get_one(Tenant, tenant_id, with_for_update=True)
    for kind, days in changes.items():
        if kind not in KINDS or not _is_policy(days):
            raise ValueError(f"{kind}={days}: one of {', '.join(KINDS)}, 1 to {LONGEST_DAYS} days or never")
    kept = {kind: days for kind, days in {**(tenant.retention or {}), **changes}.items() if kind not in forget}
    tenant.retention = kept or None


class Policies:
    """The policies of tenants, as they were a few seconds ago at most. Threads may share it."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._settings = settings
        self._known: dict[str, tuple[float, Policy]] = {}

    def of(self, tenant_id: str) -> Policy:
        now = time.monotonic()
        found = self._known.get(tenant_id)
        if found is None or now - found[0] > _KNOWN_S:
            with self._db.read() as session:
                own = session.scalar(select(Tenant.retention).where(Tenant.id == tenant_id))
            self._known[tenant_id] = found = (now, policy_of(self._settings, own))
        return found[1]


class Retention:
    """Deletes what has expired."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._settings = settings

    def walk(self) -> Iterator[int]:
        """Through all tenants once; after each step, how many rows it deleted. No transaction is open in between."""
        with self._db.read() as session:
            tenants = session.execute(select(Tenant.id, Tenant.retention)).all()
        for tenant_id, own in tenants:
            policy = policy_of(self._settings, own)
            yield from self._jobs(tenant_id, policy.jobs)
            yield from self._events(tenant_id, policy.events)
            yield from self._engines(tenant_id, policy.engines)
            yield from self._uploaded(tenant_id, SourceModel, policy.models)
            yield from self._uploaded(tenant_id, Dataset, policy.datasets)
            yield from self._deleted(tenant_id, SourceModel)
            yield from self._deleted(tenant_id, Dataset)
            if "results" in (own or {}):  # of all others the collector removes them together
                yield from self._results(tenant_id, policy.results)

    def _jobs(self, tenant_id: str, days: int | None) -> Iterator[int]:
        while days is not None:
            old = [Job.tenant_id == tenant_id, Job.finished_at < _before(days), Job.parent_id.is_(None)]
            with self._db.read() as session:
                ids = [*session.scalars(select(Job.id).where(*old).order_by(Job.finished_at).limit(_STEP))]
            if not ids:
                return
            with self._db.write() as uow:
                gone = remove_jobs(uow.session, tenant_id, ids)
            yield len(gone.job_ids)
            if not gone.job_ids:
                return

    def _events(self, tenant_id: str, days: int | None) -> Iterator[int]:
        after: tuple[datetime, str] | None = None
        while days is not None:
            old = [Job.tenant_id == tenant_id, Job.finished_at < _before(days)]
            if after is not None:
                ended, last = after
                old.append(or_(Job.finished_at > ended, and_(Job.finished_at == ended, Job.id > last)))
            query = select(Job.id, Job.finished_at).where(*old).order_by(Job.finished_at, Job.id).limit(_EVENTS_OF)
            with self._db.read() as session:
                rows = session.execute(query).all()
            if not rows:
                return
            few = delete(JobEvent).where(JobEvent.job_id.in_([row.id for row in rows]), JobEvent.type != "state")
            with self._db.write() as uow:
                deleted = [*uow.session.scalars(few.returning(JobEvent.seq), execution_options=_ALONE)]
            after = (rows[-1].finished_at, rows[-1].id)
            yield len(deleted)

    def _engines(self, tenant_id: str, days: int | None) -> Iterator[int]:
        if days is None:
            return
        for ids in self._oldest(Engine, [Engine.tenant_id == tenant_id], days):
            gone = 0
            for engine_id in ids:
                with self._db.write() as uow:
                    gone += remove_engine(uow.session, tenant_id, engine_id) is not None
            yield gone

    def _uploaded(self, tenant_id: str, table: _Uploaded, days: int | None) -> Iterator[int]:
        if days is None:
            return
        live = [table.tenant_id == tenant_id, table.deleted_at.is_(None)]
        for ids in self._oldest(table, live, days):
            with self._db.write() as uow:
                # What a submission holds at this moment is left out; one that comes later finds it deleted.
                query = select(table.id).where(table.id.in_(ids), *live).with_for_update(skip_locked=True)
                unused = {*uow.session.scalars(query)} - _used(uow.session, tenant_id, table)
                gone = update(table).where(table.id.in_(unused)).values(deleted_at=utcnow())
                uow.session.execute(gone, execution_options=_ALONE)
            yield len(unused)

    def _deleted(self, tenant_id: str, table: _Uploaded) -> Iterator[int]:
        """Rows of what was deleted, by its owner or by the policy: a deletion hides a row, as jobs may point to it. One
        that no job and no engine points to any more is of no use to anybody. Nothing new can point to it."""
        old = [table.tenant_id == tenant_id, table.deleted_at < _before(_HIDDEN_DAYS)]
        if table is SourceModel:
            named = (t.model_id for t in (Job, Engine, ChainMember))
            old += [~select(model_id).where(model_id == SourceModel.id).exists() for model_id in named]
        after = ""
        while True:
            query = select(table.id).where(*old, table.id > after).order_by(table.id).limit(_STEP)
            with self._db.write() as uow:
                ids = [*uow.session.scalars(query.with_for_update(skip_locked=True))]
                gone = {*ids} - _used(uow.session, tenant_id, table)
                if gone and table is SourceModel:
                    asked = delete(Examination).where(Examination.model_id.in_(gone))
                    uow.session.execute(asked, execution_options=_ALONE)
                if gone:
                    uow.session.execute(delete(table).where(table.id.in_(gone)), execution_options=_ALONE)
            if not ids:
                return
            after = ids[-1]
            yield len(gone)

    def _results(self, tenant_id: str, days: int | None) -> Iterator[int]:
        while days is not None:
            old = [StageResult.tenant_id == tenant_id, StageResult.used_at < _before(days)]
            with self._db.write() as uow:
                query = select(StageResult.key).where(*old).limit(_STEP).with_for_update(skip_locked=True)
                keys = [(tenant_id, key) for key in uow.session.scalars(query)]
                few = delete(StageResult).where(tuple_(StageResult.tenant_id, StageResult.key).in_(keys))
                if keys:
                    uow.session.execute(few, execution_options=_ALONE)
            if not keys:
                return
            yield len(keys)

    def _oldest(
        self, table: _Uploaded | type[Engine], rows: list[ColumnElement[bool]], days: int
    ) -> Iterator[list[str]]:
        """Ids of those made before, the oldest first. Ids are ordered by time: the first that is young ends it."""
        after = ""
        while True:
            query = select(table.id, table.created_at).where(*rows, table.id > after).order_by(table.id).limit(_STEP)
            with self._db.read() as session:
                page = session.execute(query).all()
            old = [row.id for row in page if row.created_at < _before(days)]
            if old:
                yield old
            if len(old) < _STEP:
                return
            after = old[-1]


def _used(session: Session, tenant_id: str, table: _Uploaded) -> set[str]:
    """Those that queued or running jobs of the tenant use."""
    active = Job.tenant_id == tenant_id, Job.status.in_(ACTIVE)
    if table is SourceModel:
        behind = select(ChainMember.model_id).join(Job, Job.id == ChainMember.job_id).where(*active)
        return {*session.scalars(union(select(Job.model_id).where(*active), behind))}
    rows = session.execute(select(*(Job.spec[path].as_string() for path in DATASETS)).where(*active))
    return {found for row in rows for found in row if found is not None}


def _before(days: int) -> datetime:
    return utcnow() - timedelta(days=days)
