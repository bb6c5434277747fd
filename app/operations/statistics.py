"""The service's state, as the database tells it: the same whichever process is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from app.capabilities.repository import StatisticsRepository
from app.db import counts
from app.db.base import utcnow
from app.db.orm import Job, Worker
from app.db.webhooks import WebhookDelivery
from app.domain.job_state import JobStatus
from app.jobs.family import PARENTS

OTHER = "other"  # than the tenants that are named


@dataclass
class Waiting:
    """Jobs that wait: how many, and since when the oldest of them does."""

    depth: int = 0
    since: datetime | None = None

    def add(self, depth: int, since: datetime | None) -> None:
        self.depth += depth
        self.since = min(filter(None, (self.since, since)), default=None)

    def seconds(self, now: datetime) -> float:
        return 0.0 if self.since is None else max((now - self.since).total_seconds(), 0.0)


@dataclass(frozen=True)
class Snapshot:
    """As of `at`. `waiting`, `running`, `workers`: by queue; `tenants`: by queue and tenant, those with the most.
    `overdue_since`: when the lease ended that ended first of those of running jobs. `failed`, `requeued`: ever."""

    at: datetime
    jobs: Mapping[str, int]
    waiting: Mapping[str, Waiting]
    running: Mapping[str, int]
    workers: Mapping[str, int]
    live_workers: int
    tenants: Mapping[tuple[str, str], Waiting] = field(default_factory=dict)
    overdue_since: datetime | None = None
    webhooks: Waiting = field(default_factory=Waiting)
    failed: Mapping[str, int] = field(default_factory=dict)
    requeued: Mapping[str, int] = field(default_factory=dict)


def take(session: Session, live: Collection[Worker], *, tenants: int) -> Snapshot:
    """What it costs grows with the jobs that have not ended, and with nothing else. `tenants`: so many of them are
    named, the others are `OTHER`; 0 = none is."""
    now = utcnow()
    states = OperatingRepository(session)
    jobs, _ = StatisticsRepository(session).job_counts()
    by_tenant = states.waiting()
    by_queue: dict[str, Waiting] = {}
    for (queue, _), (depth, since) in by_tenant.items():
        by_queue.setdefault(queue, Waiting()).add(depth, since)
    running = states.running()
    workers: Counter[str] = Counter(queue for worker in live for queue in worker.queues)
    for queue in {*running, *workers}:
        by_queue.setdefault(queue, Waiting())
    told = counts.counted(session)
    return Snapshot(
        at=now,
        jobs=jobs,
        waiting=by_queue,
        running={queue: running.get(queue, 0) for queue in by_queue},
        workers={queue: workers[queue] for queue in by_queue},
        live_workers=len(live),
        tenants=_named(by_tenant, tenants) if tenants else {},
        overdue_since=states.overdue_since(now),
        webhooks=states.webhooks(),
        failed=told.get(counts.FAILED, {}),
        requeued=told.get(counts.REQUEUED, {}),
    )


class OperatingRepository:
    """All SQL on it, over all tenants. Each question is answered from a partial index: of jobs that were not tallied,
    which none that lives was; of webhooks that wait."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def waiting(self) -> dict[tuple[str, str], tuple[int, datetime]]:
        """(queue, tenant) → how many are queued, and since when the oldest waits: since it was submitted, or was taken
        last by a worker that did not end it."""
        since = func.min(func.coalesce(Job.claimed_at, Job.created_at))
        query = select(Job.queue, Job.tenant_id, func.count(), since).where(*_in(JobStatus.QUEUED))
        found = self.session.execute(query.group_by(Job.queue, Job.tenant_id))
        return {(queue, tenant): (count, since) for queue, tenant, count, since in found}

    def running(self) -> dict[str, int]:
        """Without those that only compare others: no worker has them."""
        query = select(Job.queue, func.count()).where(*_in(JobStatus.RUNNING), Job.queue != PARENTS)
        return {row[0]: row[1] for row in self.session.execute(query.group_by(Job.queue))}

    def overdue_since(self, now: datetime) -> datetime | None:
        lease = func.min(Job.lease_expires_at)
        query = select(lease).where(*_in(JobStatus.RUNNING), Job.lease_expires_at < now)
        return self.session.scalar(query)

    def webhooks(self) -> Waiting:
        """Deliveries that have yet to be made, and when the next attempt at one is due: in the past, where nobody
        makes it. What a receiver refuses is due again later."""
        query = select(func.count(), func.min(WebhookDelivery.due_at)).where(WebhookDelivery.due_at.is_not(None))
        return Waiting(*self.session.execute(query).one())


def _in(status: JobStatus) -> list[ColumnElement[bool]]:
    return [Job.status == status.value, Job.tallied_at.is_(None)]


def _named(found: Mapping[tuple[str, str], tuple[int, datetime]], most: int) -> dict[tuple[str, str], Waiting]:
    """By queue and tenant, of the tenants with the most waiting."""
    depths: Counter[str] = Counter()
    for (_, tenant), (depth, _) in found.items():
        depths[tenant] += depth
    named = {tenant for tenant, _ in sorted(depths.items(), key=lambda item: (-item[1], item[0]))[:most]}
    told: dict[tuple[str, str], Waiting] = {}
    for (queue, tenant), (depth, since) in found.items():
        told.setdefault((queue, tenant if tenant in named else OTHER), Waiting()).add(depth, since)
    return told
