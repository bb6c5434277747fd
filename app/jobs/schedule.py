"""Whose turn is next. A message only wakes a worker; which job it takes is decided here, in the database.

A worker takes the best of the jobs that wait in its queues: hardware, backends and model format fit (`Job.queue`), and

1. a priority below zero yields to everybody's jobs; one above zero is worth nothing against other tenants,
2. the tenant with the fewest running jobs comes first; of several, the one that was served longest ago,
3. within a tenant: the higher priority, then jobs that were begun and given back, then the oldest.

So no tenant holds up another, however many jobs it queues and whatever it calls them, and a job that nobody here can
run holds up none. The idea of counting what runs is that of huggingface/dataset-viewer's `get_next_waiting_job`; with
few workers nothing runs whenever one is free, and only the time of the last service tells tenants apart.

A claim costs one look into an index per tenant, whatever the length of the queue and the number of jobs that ended.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, func, literal_column, or_, select, update
from sqlalchemy.orm import Session, aliased

from app.db.accounts import Tenant
from app.db.orm import Job
from app.jobs.columns import LEAN
from app.jobs.family import PARENTS
from app.tenants.quotas import may_run

# Literals: a partial index is of no use to a statement whose status is a parameter.
QUEUED: ColumnElement[str] = literal_column("'queued'")
RUNNING: ColumnElement[str] = literal_column("'running'")


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


def next_job(session: Session, queues: Collection[str], now: datetime, *, take: bool = True) -> Job | None:
    """The best job in these queues, or None. With `take` its row is locked until the end of the transaction, and its
    tenant counts as served.

    Rows that others are taking at this moment are passed over, so that two workers neither get the same job nor wait
    for each other (on SQLite one writes at a time anyway). Those who look at the very same moment see the same shares:
    a tenant may then be ahead of its turn by as many jobs as workers looked."""
    heads = _heads(session, queues, now)
    counts = running_jobs(session) if len(heads) > 1 else {}
    shares = {job.tenant_id: Share(counts.get(job.tenant_id, 0), served) for job, served in heads}
    for head in sorted((job for job, _ in heads), key=lambda job: turn(job, shares[job.tenant_id])):
        if not may_run(session, head.tenant_id, lock=take):
            continue  # as many of its jobs run as its plan allows
        query = _in_turn(select(Job).options(*LEAN), Job, head.tenant_id, queues, now)
        job: Job | None = session.scalar(query.with_for_update(skip_locked=True) if take else query)
        if job is not None:
            if take:
                _note_service(session, job.tenant_id, now)
            return job
    return None


def running_jobs(session: Session) -> dict[str, int]:
    """By tenant; without those that only compare others."""
    query = select(Job.tenant_id, func.count()).where(Job.status == RUNNING, Job.queue != PARENTS)
    return {tenant: int(count) for tenant, count in session.execute(query.group_by(Job.tenant_id))}


def _heads(session: Session, queues: Collection[str], now: datetime) -> list[tuple[Waiting, float]]:
    """Of each tenant that has jobs waiting there, the one whose turn is next, and when the tenant was served last."""
    inner = aliased(Job)
    head = _in_turn(select(inner.id), inner, Tenant.id, queues, now).correlate(Tenant).scalar_subquery()
    served = {
        job_id: 0.0 if at is None else at.timestamp()
        for job_id, at in session.execute(select(head, Tenant.served_at).select_from(Tenant))
        if job_id is not None
    }
    if not served:
        return []
    rows = session.execute(select(Job.id, Job.tenant_id, Job.turn).where(Job.id.in_(served)))
    return [(waiting_of(row.id, row.tenant_id, row.turn), served[row.id]) for row in rows]


def _in_turn(query: Select[Any], job: Any, tenant_id: Any, queues: Collection[str], now: datetime) -> Select[Any]:
    """The tenant's first job in these queues, as `ix_jobs_waiting` has them."""
    due = or_(job.not_before.is_(None), job.not_before <= now)
    waiting = query.where(job.status == QUEUED, job.tenant_id == tenant_id, job.queue.in_(queues), due)
    return waiting.order_by(job.turn, job.id).limit(1)


def _note_service(session: Session, tenant_id: str, now: datetime) -> None:
    """Who finds another at it leaves it: it is the same moment, and nobody is to wait for a commit."""
    free = select(Tenant.id).where(Tenant.id == tenant_id).with_for_update(key_share=True, skip_locked=True)
    noted = update(Tenant).where(Tenant.id.in_(free)).values(served_at=now)
    session.execute(noted.execution_options(synchronize_session=False))


def _own_turn(job: Waiting) -> tuple[int, bool, str]:
    return -job.priority, not job.begun, job.job_id
