"""All SQL on jobs and their events. A state changes only by `apply`: compare-and-set, and an event with it; a job that
compares this one's target with others follows in the same transaction."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import (
    ClauseElement,
    ColumnElement,
    Row,
    Select,
    String,
    bindparam,
    cast,
    func,
    insert,
    select,
    union,
    update,
)
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from app.db import counts
from app.db.base import UtcDateTime, utcnow
from app.db.chains import ChainMember
from app.db.orm import Dataset, Job, JobEvent, SourceModel
from app.domain.chain import models_of
from app.domain.job_state import TERMINAL, JobStatus, Trigger, transition
from app.jobs.columns import LEAN
from app.jobs.family import Child, fate, progress_of, stages_of
from app.jobs.schedule import NOW, RUNNING, UNDER_WAY, next_of, turn_of
from app.queue.messages import on_gpu
from app.tenants.quotas import spend_gpu
from app.webhooks.outbox import job_ended

ACTIVE = (JobStatus.QUEUED.value, JobStatus.RUNNING.value)


# Built once: composing it costs more than the database takes to answer it.
_VERSION = select(Job.version).where(Job.id == bindparam("job_id"), Job.tenant_id == bindparam("tenant_id"))

_EVENT = insert(JobEvent.metadata.tables[JobEvent.__tablename__])
_JOB = Job.metadata.tables[Job.__tablename__]  # of the mapped class a statement takes half as long again

# What a statement that changes a job tells of it, so that nobody has to ask for it afterwards: each statement is a trip
# to the database, and a job's claim and its end are made of few.
_CHANGED = tuple(
    _JOB.c[name]
    for name in (
        "id", "version", "tenant_id", "parent_id", "queue", "webhook_url", "claimed_at", "fencing_token", "attempts",
        "attempts_in_all", "spent_seconds",
    )
)  # fmt: skip

_Q = TypeVar("_Q", bound=Select[*tuple[Any, ...]])


def filtered(
    query: _Q, tenant_id: str, *, limit: int, before: str | None, status: str | None, model_id: str | None
) -> _Q:
    """A page of a tenant's jobs, newest first, whatever the query takes of them. `model_id`: of the job, or any of its
    chain's."""
    wanted = [Job.tenant_id == tenant_id]
    if before is not None:
        wanted.append(Job.id < before)
    if status is not None:
        wanted.append(Job.status == status)
    if model_id is not None:
        # A page of each, by an index of its own: whoever asks for either at once reads all jobs of the tenant.
        behind = Job.id.in_(select(ChainMember.job_id).where(ChainMember.model_id == model_id))
        pages = _newest(limit, *wanted, Job.model_id == model_id), _newest(limit, *wanted, behind)
        wanted = [Job.id.in_(union(*pages))]
    return query.where(*wanted).order_by(Job.id.desc()).limit(limit)


def _newest(limit: int, *wanted: ColumnElement[bool]) -> Select[tuple[str]]:
    page = select(Job.id).where(*wanted).order_by(Job.id.desc()).limit(limit).subquery()
    return select(page.c.id)


def lease_lock(lock: str | None, token: int) -> str | None:
    """The column of that name: it counts for the claim with this token only."""
    return None if lock is None else f"{lock}:{token}"


@functools.cache
def _taking() -> ReturningUpdate[*tuple[Any, ...]]:
    """Composed once. Its values: `now`, `until` (the end of the lease), `owner`, `lock`, and those of `next_of`."""
    owner, until = bindparam("owner", type_=String()), bindparam("until", type_=UtcDateTime())
    job = _JOB.c
    priority: Any = job.priority
    token = job.fencing_token + 1
    return (
        update(_JOB)
        .where(job.id == next_of(), job.status == JobStatus.QUEUED.value)
        .values(
            status=transition(JobStatus.QUEUED, Trigger.CLAIM).value,
            version=job.version + 1,
            lease_owner=owner,
            lease_expires_at=until,
            # As `lease_lock` has it; NULL where there is no lock.
            lease_lock=bindparam("lock", type_=String()) + ":" + cast(token, String),
            fencing_token=token,
            attempts=job.attempts + 1,
            attempts_in_all=job.attempts_in_all + 1,
            started_at=func.coalesce(job.started_at, NOW),
            claimed_at=NOW,
            not_before=None,
            turn=turn_of(priority, begun=True),
        )
        .returning(*_CHANGED)
    )


@functools.cache
def _changing(names: tuple[str, ...]) -> ReturningUpdate[*tuple[Any, ...]]:
    """Changes these columns to the values `new_NAME`. Composed once for each set of them: there are a dozen."""
    values = {name: bindparam(f"new_{name}", type_=_JOB.c[name].type) for name in names}
    return update(_JOB).values(**values, version=_JOB.c.version + 1).returning(*_CHANGED)


class JobRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    def usable_model(self, tenant_id: str, model_id: str) -> SourceModel | None:
        """The tenant's model. A deletion waits for the end of this transaction, and then sees the job."""
        query = select(SourceModel).where(
            SourceModel.id == model_id, SourceModel.tenant_id == tenant_id, SourceModel.deleted_at.is_(None)
        )
        return self.session.scalar(query.with_for_update(read=True))

    def usable_dataset(self, tenant_id: str, dataset_id: str) -> Dataset | None:
        """The tenant's data set, kept like `usable_model`."""
        query = select(Dataset).where(
            Dataset.id == dataset_id, Dataset.tenant_id == tenant_id, Dataset.deleted_at.is_(None)
        )
        return self.session.scalar(query.with_for_update(read=True))

    def add(self, job: Job) -> None:
        self.session.add(job)
        self.session.flush()
        self.session.add_all(ChainMember(model_id=i, job_id=job.id) for i in dict.fromkeys(models_of(job.spec)))
        self._event(job.id, job.version, "state", {"status": job.status})

    def get(self, tenant_id: str, job_id: str) -> Job | None:
        return self.session.scalar(select(Job).where(Job.id == job_id, Job.tenant_id == tenant_id))

    def version(self, tenant_id: str, job_id: str) -> int | None:
        return self.session.scalar(_VERSION, {"job_id": job_id, "tenant_id": tenant_id})

    def page(
        self, tenant_id: str, *, limit: int, before: str | None, status: str | None, model_id: str | None
    ) -> list[Job]:
        query = filtered(select(Job), tenant_id, limit=limit, before=before, status=status, model_id=model_id)
        return [*self.session.scalars(query)]

    def apply(
        self,
        job_id: str,
        trigger: Trigger,
        *,
        source: JobStatus,
        where: Sequence[ColumnElement[bool]] = (),
        values: dict[str, Any] | None = None,
        event: dict[str, Any] | None = None,
    ) -> int | None:
        """Take the job from `source` by `trigger`. The new version, or None where it was no longer as expected."""
        target = transition(source, trigger)
        changes: dict[str, Any] = {"status": target.value, **(values or {})}
        if target in TERMINAL:
            changes.setdefault("finished_at", utcnow())
            changes["told"] = True  # by `job_ended` below
        if target is not JobStatus.RUNNING:
            changes.setdefault("lease_owner", None)
            changes.setdefault("lease_expires_at", None)
            changes.setdefault("lease_lock", None)
        # Of an attempt whose end says by itself what was spent until then.
        spent_before = self._spent(job_id) if source is JobStatus.RUNNING and "spent_seconds" in changes else None
        changed = self._change([_JOB.c.id == job_id, _JOB.c.status == source.value, *where], changes)
        if changed is None:
            return None
        self._event(job_id, changed.version, "state", {"status": target.value, **(event or {})})
        if target in TERMINAL and changed.parent_id is None:  # else it is told with the job that compares it
            job_ended(self.session, job_id, changed.tenant_id, target.value, changed.webhook_url)
        self._count(trigger, changes)
        if source is JobStatus.RUNNING:
            self._spend(changed, spent_before)
        if changed.parent_id is not None:
            self._follow(changed.parent_id, job_id)
        return int(changed.version)

    def take(
        self, tenant_id: str, queues: Collection[str], worker: str, lock: str | None, now: datetime, until: datetime
    ) -> Row[*tuple[Any, ...]] | None:
        """Take the tenant's next job in these queues, in one statement: the columns of `_CHANGED` as they are
        afterwards. None where there is none. `lock`: the worker's liveness lock; `until`: the end of its lease."""
        asked = {"whose": tenant_id, "queues": [*queues], "now": now, "until": until, "owner": worker, "lock": lock}
        changed = self.session.execute(_taking(), asked).one_or_none()
        if changed is None:
            return None
        told = {"status": JobStatus.RUNNING.value, "worker": worker, "attempt": changed.attempts}
        self._event(changed.id, changed.version, "state", told)
        if changed.parent_id is not None:
            self._follow(changed.parent_id, changed.id)
        return changed

    def _count(self, trigger: Trigger, changes: dict[str, Any]) -> None:
        """What is rare, and what operators want to know after the worker is gone."""
        if trigger is Trigger.FAIL:
            counts.note(self.session, counts.FAILED, str((changes.get("error") or {}).get("code", "unknown")))
        elif trigger in (Trigger.RELEASE, Trigger.LEASE_EXPIRED):
            counts.note(self.session, counts.REQUEUED, trigger.value)

    def _spent(self, job_id: str) -> float | None:
        return self.session.scalar(select(Job.spent_seconds).where(Job.id == job_id))

    def _spend(self, ended: Row[*tuple[Any, ...]], spent_before: float | None) -> None:
        """Count the seconds of an attempt on a GPU that has ended. What its end said of them goes before the clock: who
        gives on the job of a lost worker knows when that was."""
        if ended.claimed_at is None or not on_gpu(ended.queue):
            return
        if spent_before is None:
            seconds = (utcnow() - ended.claimed_at).total_seconds()
        else:
            seconds = ended.spent_seconds - spent_before
        spend_gpu(self.session, ended.tenant_id, max(seconds, 0.0))

    def _follow(self, parent_id: str, job_id: str) -> None:
        """A child's state has changed. Two that do so at once do not miss each other: the second waits here for the
        first one's commit, and sees it. Locks are taken from children to parents, everywhere."""
        lock = select(Job.cancel_requested_at).where(Job.id == parent_id, Job.status == JobStatus.RUNNING.value)
        found = self.session.execute(lock.with_for_update(key_share=True)).one_or_none()
        if found is None:
            return
        children = self.children(parent_id)
        changes: dict[str, Any] = {"stages": stages_of(children), "progress": progress_of(children)}
        end = fate(children, cancel_requested=found[0] is not None)
        if end is None:
            seen = next(stage for stage in changes["stages"] if stage["job_id"] == job_id)
            told = {"stage": "target", **{name: seen[name] for name in ("hardware", "job_id", "status")}}
            self.update(parent_id, [], changes, "stage", {**told, "progress": changes["progress"]})
            return
        trigger, values = end
        event = {name: values[name] for name in ("engine_ids", "error") if values.get(name)}
        self.apply(parent_id, trigger, source=JobStatus.RUNNING, values={**changes, **values}, event=event)

    def of_parent(self, tenant_id: str, parent_id: str) -> list[Job]:
        query = select(Job).where(Job.parent_id == parent_id, Job.tenant_id == tenant_id).order_by(Job.id)
        return [*self.session.scalars(query)]

    def children(self, parent_id: str, *, lock: bool = False) -> list[Child]:
        """In the order of its targets. `lock`: they change no more until the end of this transaction."""
        query = (
            select(
                Job.id, Job.status, Job.spec["target"]["hardware"].as_string(), Job.engine_ids, Job.error,
                Job.started_at, Job.finished_at,
            )
            .where(Job.parent_id == parent_id)
            .order_by(Job.id)
        )  # fmt: skip
        return [Child(*row) for row in self.session.execute(query.with_for_update() if lock else query)]

    def update(
        self,
        job_id: str,
        where: Sequence[ColumnElement[bool]],
        changes: dict[str, Any],
        event_type: str | None,
        event: dict[str, Any] | None = None,
    ) -> int | None:
        """Change columns of a job that still meets `where`, and leave an event row. The new version or None."""
        changed = self._change([_JOB.c.id == job_id, *where], changes)
        if changed is None:
            return None
        if event_type is not None:
            self._event(job_id, changed.version, event_type, event or {})
        return int(changed.version)

    def _change(self, where: Sequence[ColumnElement[bool]], changes: dict[str, Any]) -> Row[*tuple[Any, ...]] | None:
        plain = {name: value for name, value in changes.items() if not isinstance(value, ClauseElement)}
        statement = _changing(tuple(sorted(plain))).where(*where)
        if len(plain) < len(changes):
            statement = statement.values({name: value for name, value in changes.items() if name not in plain})
        values = {f"new_{name}": value for name, value in plain.items()}
        self.session.flush()  # a statement of tables does not do so by itself
        return self.session.execute(statement, values).one_or_none()

    def touch(
        self, job_id: str, where: Sequence[ColumnElement[bool]], changes: dict[str, Any]
    ) -> Row[datetime | None] | None:
        """Change columns that no client sees (the lease, dispatch bookkeeping): no new version, no event. The job's
        `cancel_requested_at`, or None where it was no longer as expected."""
        statement = (
            update(Job)
            .where(Job.id == job_id, *where)
            .values(**changes)
            .returning(Job.cancel_requested_at)
            .execution_options(synchronize_session=False)
        )
        return self.session.execute(statement).one_or_none()

    def _event(self, job_id: str, seq: int, event_type: str, data: dict[str, Any]) -> None:
        self.session.execute(_EVENT, {"job_id": job_id, "seq": seq, "type": event_type, "data": data})

    def events_after(self, job_id: str, seq: int, limit: int) -> list[JobEvent]:
        query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > seq).order_by(JobEvent.seq)
        return [*self.session.scalars(query.limit(limit))]

    def versions(self, job_ids: Collection[str]) -> dict[str, int]:
        rows = self.session.execute(select(Job.id, Job.version).where(Job.id.in_(job_ids)))
        return {row.id: row.version for row in rows}

    def under_lock(self, lock: str, limit: int) -> list[Job]:
        """Running jobs that were claimed by the process that holds, or held, this liveness lock."""
        named = Job.lease_lock.startswith(f"{lock}:", autoescape=True)
        query = select(Job).options(*LEAN).where(Job.status == RUNNING, named).limit(limit)
        # A worker of the previous release leaves the column as it finds it.
        return [job for job in self.session.scalars(query) if job.lease_lock == lease_lock(lock, job.fencing_token)]

    def expired(self, now: datetime, limit: int) -> list[Job]:
        """Running jobs whose worker has let the lease run out."""
        query = select(Job).options(*LEAN).where(UNDER_WAY, Job.status == RUNNING, Job.lease_expires_at < now)
        return [*self.session.scalars(query.order_by(Job.lease_expires_at).limit(limit))]
