"""Whose turn is next. A message only wakes a worker; which job it takes is decided here, in the database.

A worker takes the best of the jobs that wait in its queues: hardware, backends and model format fit (`Job.queue`), and

1. a priority below zero yields to everybody's jobs; one above zero is worth nothing against other tenants,
2. the tenant with the fewest running jobs comes first; of several, the one that was served longest ago,
3. within a tenant: the higher priority, then jobs that were begun and given back, then the oldest.

So no tenant holds up another, however many jobs it queues and whatever it calls them, and a job that nobody here can
run holds up none. The idea of counting what runs is that of huggingface/dataset-viewer's `get_next_waiting_job`; with
few workers nothing runs whenever one is free, and only the time of the last service tells tenants apart.

A claim costs one look into an index per tenant, whatever the length of the queue and the number of jobs that ended; all
of them in one statement, and a second one takes the job.
"""

from __future__ import annotations

import functools
import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    ScalarSelect,
    Select,
    String,
    Update,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from app.db.accounts import Plan, Tenant
from app.db.base import UtcDateTime
from app.db.orm import Job
from app.domain.plan import DEFAULT_PLAN, Limits, effective
from app.jobs.family import PARENTS
from app.queue.messages import on_gpu
from app.tenants.quotas import may_run, out_of_gpu_seconds

# Literals: a partial index is of no use to a statement whose status is a parameter.
QUEUED: ColumnElement[str] = literal_column("'queued'")
RUNNING: ColumnElement[str] = literal_column("'running'")
ONE: ColumnElement[int] = literal_column("1")  # of a parameter a prepared statement would not know how few it is
_NO_LIMITS = Limits()
# What stands here is asked at every claim, and by the tables: of mapped classes it takes half as long again, and most
# of a claim is spent on composing what the database answers in no time.
_JOB, _TENANT, _PLAN = Job.metadata.tables["jobs"], Tenant.metadata.tables["tenants"], Plan.metadata.tables["plans"]
_WAITING = _JOB.alias()
# SQLite sees only by the very words of the index that it may use it.
UNDER_WAY: ColumnElement[bool] = _JOB.c.status.in_([QUEUED, RUNNING])


@dataclass(frozen=True)
class Offer:
    """A worker, and the queues that it takes jobs from. `lock`: what its process is known by to be alive, on its
    machine."""

    worker_id: str
    queues: tuple[str, ...]
    lock: str | None = None


@dataclass(frozen=True)
class Waiting:
    """A queued job, as far as its turn depends on it. `begun`: some worker had it already."""

    job_id: str
    tenant_id: str
    priority: int
    begun: bool


@dataclass(frozen=True)
class Share:
    """What a tenant has of the workers: jobs that run now, and when it was served last (seconds; 0 = never)."""

    running: int = 0
    served: float = 0.0


def turn_of(priority: int, *, begun: bool = False) -> int:
    """The column that orders a tenant's jobs, as one number so that an index can have it: the lower the sooner."""
    return -2 * priority + (0 if begun else 1)


def waiting_of(job_id: str, tenant_id: str, number: int) -> Waiting:
    """Of a job's columns; `number` is its `turn`."""
    return Waiting(job_id, tenant_id, -(number // 2), begun=number % 2 == 0)


def turn(job: Waiting, share: Share) -> tuple[int, int, float, int, bool, str]:
    """The lower the sooner. `share`: of its tenant."""
    return -min(job.priority, 0), share.running, share.served, *_own_turn(job)


def in_order(jobs: Iterable[Waiting], shares: Mapping[str, Share]) -> list[Waiting]:
    """The order in which they would be taken if none of those that run ended meanwhile. `shares`: by tenant."""
    of_tenant: dict[str, list[Waiting]] = defaultdict(list)
    for job in jobs:
        of_tenant[job.tenant_id].append(job)
    for own in of_tenant.values():
        own.sort(key=_own_turn, reverse=True)  # the last one is next
    now = max((share.served for share in shares.values()), default=0.0)
    have = {tenant: shares.get(tenant, Share()) for tenant in of_tenant}
    heads = [(turn(own[-1], have[tenant]), tenant) for tenant, own in of_tenant.items()]
    heapq.heapify(heads)
    found = list[Waiting]()
    while heads:
        _, tenant = heads[0]
        found.append(of_tenant[tenant].pop())
        have[tenant] = Share(have[tenant].running + 1, now + len(found))
        if of_tenant[tenant]:
            heapq.heapreplace(heads, (turn(of_tenant[tenant][-1], have[tenant]), tenant))
        else:
            heapq.heappop(heads)
    return found


@dataclass(frozen=True)
class Head:
    """A tenant's next job in `queues`, and what the tenant has of the workers. `most`: of its jobs may run at once,
    `gpu_seconds`: that they may have; None for as many as there are."""

    job: Waiting
    share: Share
    queues: tuple[str, ...]
    most: int | None = None
    gpu_seconds: int | None = None


def in_line(session: Session, queues: Collection[str], now: datetime) -> Sequence[Head]:
    """Of each tenant that has jobs waiting in these queues, and may have one more run: the one that is next; the best
    of them first."""
    found = _heads(session, queues, now)
    cpu = [queue for queue in queues if not on_gpu(queue)]
    limited = {head.job.tenant_id: head.gpu_seconds for head in found if head.gpu_seconds is not None}
    if limited and len(cpu) < len(queues):
        # Whose GPU seconds are spent waits with its jobs for GPUs, and with no others: also what was queued before.
        out = out_of_gpu_seconds(session, limited)
        found = [head for head in found if head.job.tenant_id not in out]
        found += _heads(session, cpu, now, out) if cpu and out else []
    heads = [head for head in found if head.most is None or head.share.running < head.most]
    return sorted(heads, key=lambda head: turn(head.job, head.share))


def may_take(session: Session, head: Head) -> bool | None:
    """Whether one more job of this tenant may run, asked where one is about to be taken. None where its plan limits
    that and another worker takes one of its jobs at this moment: it is to be passed over for this look."""
    return head.most is None or may_run(session, head.job.tenant_id, head.most)


# Of `next_of`.
WHOSE: BindParameter[str] = bindparam("whose", type_=String())
QUEUES: BindParameter[Any] = bindparam("queues", expanding=True)
NOW: BindParameter[datetime] = bindparam("now", type_=UtcDateTime())


def next_of() -> ScalarSelect[Any]:
    """The id of the next job of the tenant `WHOSE` in `QUEUES`, as a part of the statement that takes it: its row is
    locked.

    Rows that others are taking at this moment are passed over, so that two workers neither get the same job nor wait
    for each other (on SQLite one writes at a time anyway). Those who look at the very same moment see the same shares:
    a tenant may then be ahead of its turn by as many jobs as workers looked."""
    first = _in_turn(select(_WAITING.c.id), WHOSE, QUEUES, NOW)
    return first.with_for_update(of=_WAITING, skip_locked=True).scalar_subquery()


def note_service(session: Session, tenant_id: str, now: datetime) -> None:
    """A job of this tenant was taken. Who finds another at it leaves it: only claims lock the row (and an operator's
    changes), so it is the same moment, and nobody is to wait for a commit."""
    session.execute(_noted(), {"whose": tenant_id, "now": now})


@functools.cache
def _noted() -> Update:
    free = select(_TENANT.c.id).where(_TENANT.c.id == WHOSE).with_for_update(key_share=True, skip_locked=True)
    return update(_TENANT).where(_TENANT.c.id.in_(free)).values(served_at=NOW)


def running_jobs(session: Session) -> dict[str, int]:
    """By tenant; without those that only compare others."""
    return {tenant: int(count) for tenant, count in session.execute(_running())}


def _heads(
    session: Session, queues: Collection[str], now: datetime, tenant_ids: Collection[str] | None = None
) -> list[Head]:
    """Of each tenant that has jobs waiting there, the one that is next among its own. `tenant_ids`: of these only."""
    values: dict[str, Any] = {"queues": [*queues], "now": now}
    if tenant_ids is not None:
        values["tenant_ids"] = [*tenant_ids]
    found = []
    for row in session.execute(_heads_query(some=tenant_ids is not None), values):
        share = Share(row.jobs or 0, 0.0 if row.served_at is None else row.served_at.timestamp())
        limits = effective(row.plan, row.own) if row.plan or row.own else _NO_LIMITS
        job = waiting_of(row.id, row.tenant_id, row.turn)
        found.append(Head(job, share, tuple(queues), limits.running_jobs, limits.gpu_seconds))
    return found


@functools.cache
def _heads_query(*, some: bool) -> Select[*tuple[Any, ...]]:
    """Composed once: that costs more than the database takes to answer it. `some`: of `tenant_ids` only."""
    job, tenant, plan = _JOB.c, _TENANT.c, _PLAN.c
    first = _in_turn(select(_WAITING.c.id), tenant.id, QUEUES, NOW).correlate(_TENANT).scalar_subquery()
    which = select(tenant.served_at, tenant.limits, tenant.plan, first.label("job_id"))
    if some:
        which = which.where(tenant.id.in_(bindparam("tenant_ids", expanding=True)))
    # Materialized: the look into the index is made once for each tenant, wherever its result is used.
    tenants = which.cte("tenants_in_line").prefix_with("MATERIALIZED", dialect="postgresql")
    running = _running().subquery("running")
    return (
        select(
            job.id, job.tenant_id, job.turn, tenants.c.served_at, running.c.jobs, tenants.c.limits.label("own"),
            plan.limits.label("plan"),
        )
        .select_from(tenants)
        .join(_JOB, job.id == tenants.c.job_id)
        .outerjoin(running, running.c.tenant_id == job.tenant_id)
        .outerjoin(_PLAN, plan.name == func.coalesce(tenants.c.plan, DEFAULT_PLAN))
    )  # fmt: skip


def _running() -> Select[*tuple[Any, ...]]:
    """Running jobs by tenant; without those that only compare others."""
    job = _JOB.c
    rows = (UNDER_WAY, job.status == RUNNING, job.queue != PARENTS)
    query = select(job.tenant_id, func.count().label("jobs")).where(*rows)
    return query.group_by(job.tenant_id)


def _in_turn(query: Select[*tuple[Any, ...]], tenant_id: Any, queues: Any, now: Any) -> Select[*tuple[Any, ...]]:
    """The tenant's first job in these queues (`_WAITING`), as `ix_jobs_waiting` has them."""
    job = _WAITING.c
    due = or_(job.not_before.is_(None), job.not_before <= now)
    waiting = query.where(job.status == QUEUED, job.tenant_id == tenant_id, job.queue.in_(queues), due)
    return waiting.order_by(job.turn, job.id).limit(ONE)


def _own_turn(job: Waiting) -> tuple[int, bool, str]:
    return -job.priority, not job.begun, job.job_id
