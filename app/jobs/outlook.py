"""What a queued job can expect: its position, when it will start, or what it waits for in vain.

Positions change without the jobs changing, and a poll must stay cheap: so one picture of the queue is drawn for all who
ask within a second (or longer, where drawing it takes long: a twentieth of the time at most), per process.
"""

from __future__ import annotations

import heapq
import statistics
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.capabilities.service import CapabilityService
from app.db.accounts import Plan, Tenant
from app.db.base import utcnow
from app.db.orm import Job
from app.db.uow import Database
from app.domain.plan import DEFAULT_PLAN, WINDOW_DAYS, effective
from app.jobs.schedule import QUEUED, RUNNING, Share, Waiting, in_order, running_jobs, waiting_of
from app.queue.messages import QUEUE_PREFIX, SPECIAL_FORMATS, on_gpu
from app.tenants.quotas import out_of_gpu_seconds

_EVERY_S = 1.0
_SHARE = 20  # of the time that a picture may be drawn in
_NEWS_S, _NEWS_SHARE = 0.2, 5  # the same for a job that came after the picture
_DURATIONS_S = 60.0
_TENANTS, _JOBS_EACH = 20, 20  # whose last jobs tell how long one takes
_COARSE_S, _FINE_S, _SOON_S = 60, 10, 120
NOBODY_KNOWS = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Outlook:
    """`position`: 1 is next among the jobs that the same workers may take. `expected_start` in the past: a worker is
    free. `waiting_for`: why nobody takes it now."""

    position: int | None
    expected_start: datetime | None
    waiting_for: str | None = None


@dataclass(frozen=True)
class Queued:
    """A queued job. `not_before`: the end of its pause."""

    turn: Waiting
    queue: str
    created_at: datetime
    not_before: datetime | None


@dataclass(frozen=True)
class Taker:
    """A live worker that takes jobs: its queues, and when it is free: None = now; `NOBODY_KNOWS`."""

    queues: frozenset[str]
    busy_until: datetime | None


@dataclass
class Picture:
    """The queue at `at`. `seconds`: what a job takes, where that is known. `out_of_gpu`: tenants whose GPU seconds are
    used up."""

    at: datetime
    jobs: Mapping[str, Queued]
    shares: Mapping[str, Share]
    takers: Sequence[Taker]
    seconds: float | None
    out_of_gpu: frozenset[str] = frozenset()
    _lines: dict[frozenset[str], tuple[dict[str, int], list[datetime | None]]] = field(default_factory=dict)

    def of(self, job_id: str) -> Outlook | None:
        """None for a job that is not in the picture."""
        job = self.jobs.get(job_id)
        if job is None:
            return None
        mine = [taker for taker in self.takers if job.queue in taker.queues]
        if not mine:
            return Outlook(None, None, f"no live worker {_words(job.queue)}")
        if self._unpaid(job):
            return Outlook(None, None, f"GPU seconds: those of the last {WINDOW_DAYS} days that the plan has are used")
        if self._paused(job):
            assert job.not_before is not None
            why = "the pause after an attempt that failed for the service's reasons"
            return Outlook(None, _rounded(job.not_before, self.at), why)
        positions, starts = self._line(mine)
        ahead = positions[job_id]
        start = starts[min(ahead, len(starts) - 1)] if starts else None
        if start is not None:
            start = max(job.created_at, job.not_before or job.created_at) if start <= self.at else start
            start = _rounded(start, self.at)
        return Outlook(ahead + 1, start)

    def _unpaid(self, job: Queued) -> bool:
        return job.turn.tenant_id in self.out_of_gpu and on_gpu(job.queue)

    def _paused(self, job: Queued) -> bool:
        return job.not_before is not None and job.not_before > self.at

    def _line(self, takers: Sequence[Taker]) -> tuple[dict[str, int], list[datetime | None]]:
        """Of the jobs that these workers may take: how many are ahead of each; and when the first, the second … of
        them starts if each takes as long as one does."""
        queues = frozenset[str]().union(*(taker.queues for taker in takers))
        found = self._lines.get(queues)
        if found is None:
            mine = (job for job in self.jobs.values() if job.queue in queues)
            waiting = [job.turn for job in mine if not self._paused(job) and not self._unpaid(job)]
            ordered = {job.job_id: i for i, job in enumerate(in_order(waiting, self.shares))}
            found = self._lines[queues] = ordered, self._starts(takers, len(waiting))
        return found

    def _starts(self, takers: Sequence[Taker], count: int) -> list[datetime | None]:
        known = [taker.busy_until or self.at for taker in takers if taker.busy_until != NOBODY_KNOWS]
        free = sorted(max(at, self.at) for at in known)
        if self.seconds is None or not free:  # only those that go straight to a worker have a start
            return [*free[:count], None]
        starts = list[datetime | None]()
        for _ in range(count):
            starts.append(free[0])
            heapq.heapreplace(free, free[0] + timedelta(seconds=self.seconds))
        return starts


class Outlooks:
    """Threads may share it."""

    def __init__(self, db: Database, capabilities: CapabilityService) -> None:
        self._db, self._capabilities = db, capabilities
        self._drawing = threading.Lock()
        self._picture: Picture | None = None
        self._drawn_at, self._took_s = 0.0, 0.0
        self._seconds: float | None = None
        self._seconds_until = 0.0

    def of(self, job_id: str) -> Outlook | None:
        """What a queued job can expect; None where that is not known yet, or it is queued no more."""
        found = self._fresh(_EVERY_S, _SHARE).of(job_id)
        return found if found is not None else self._fresh(_NEWS_S, _NEWS_SHARE).of(job_id)

    def _fresh(self, most_s: float, share: float) -> Picture:
        """One that is not older than that, and than so many times what it takes to draw one."""
        picture = self._picture
        if picture is not None and time.monotonic() < self._drawn_at + max(most_s, share * self._took_s):
            return picture
        if not self._drawing.acquire(blocking=picture is None):
            assert picture is not None
            return picture  # somebody is at it
        try:
            if self._picture is not None and picture is None:
                return self._picture
            began = time.monotonic()
            self._picture = drawn = self._draw()
            self._drawn_at = time.monotonic()
            self._took_s = self._drawn_at - began
            return drawn
        finally:
            self._drawing.release()

    def _draw(self) -> Picture:
        now, live = utcnow(), self._capabilities.live()
        with self._db.read() as session:
            columns = (Job.id, Job.tenant_id, Job.turn, Job.queue, Job.created_at, Job.not_before)
            jobs = {
                row.id: Queued(waiting_of(row.id, row.tenant_id, row.turn), row.queue, row.created_at, row.not_before)
                for row in session.execute(select(*columns).where(Job.status == QUEUED))
            }
            counts = running_jobs(session)
            tenants = {job.turn.tenant_id for job in jobs.values()}
            served = select(Tenant.id, Tenant.served_at).where(Tenant.id.in_(tenants))
            shares = {
                tenant: Share(counts.get(tenant, 0), 0.0 if at is None else at.timestamp())
                for tenant, at in session.execute(served)
            }
            seconds = self._typical(session, sorted(tenants))
            busy = _busy(session, now, seconds)
            out = _out_of_gpu(session, {job.turn.tenant_id for job in jobs.values() if on_gpu(job.queue)})
        takers = [Taker(frozenset(worker.queues), busy.get(worker.id)) for worker in live]
        return Picture(now, jobs, shares, takers, seconds, out)

    def _typical(self, session: Session, tenants: Sequence[str]) -> float | None:
        """How long a job takes: the median of the last ones of these tenants."""
        if time.monotonic() < self._seconds_until:
            return self._seconds
        found = list[float]()
        for tenant in tenants[:_TENANTS]:
            last = (
                select(Job.claimed_at, Job.finished_at)
                .where(Job.tenant_id == tenant, Job.status == "succeeded", Job.claimed_at.is_not(None))
                .order_by(Job.id.desc())
                .limit(_JOBS_EACH)
            )
            found += [(ended - begun).total_seconds() for begun, ended in session.execute(last) if begun and ended]
        self._seconds = statistics.median(found) if found else None
        self._seconds_until = time.monotonic() + (_DURATIONS_S if found else _EVERY_S)
        return self._seconds


def _out_of_gpu(session: Session, tenant_ids: Collection[str]) -> frozenset[str]:
    if not tenant_ids:
        return frozenset()
    query = select(Tenant.id, Tenant.limits.label("own"), Plan.limits.label("plan")).where(Tenant.id.in_(tenant_ids))
    rows = session.execute(query.outerjoin(Plan, Plan.name == func.coalesce(Tenant.plan, DEFAULT_PLAN)))
    limits = {row.id: effective(row.plan, row.own).gpu_seconds for row in rows}
    limited = {tenant_id: seconds for tenant_id, seconds in limits.items() if seconds is not None}
    return frozenset(out_of_gpu_seconds(session, limited) if limited else ())


def _busy(session: Session, now: datetime, seconds: float | None) -> dict[str, datetime]:
    """Workers that run a job, and when that will have ended: by what it says of itself, else by what one takes."""
    columns = (Job.lease_owner, Job.expected_end, Job.claimed_at)
    found = dict[str, datetime]()
    for owner, end, begun in session.execute(
        select(*columns).where(Job.status == RUNNING, Job.lease_owner.is_not(None))
    ):
        guess = NOBODY_KNOWS if begun is None or seconds is None else begun + timedelta(seconds=seconds)
        found[str(owner)] = max(end or guess, now + timedelta(seconds=_FINE_S))
    return found


def _rounded(at: datetime, now: datetime) -> datetime:
    """What is near by tens of seconds, what is further by minutes, both upwards; what is past stays."""
    if at <= now:
        return at
    step = _FINE_S if (at - now).total_seconds() < _SOON_S else _COARSE_S
    return at.replace(microsecond=0) + timedelta(seconds=-int(at.timestamp()) % step)


def _words(queue: str) -> str:
    """What its workers have, in words (`app.queue.messages.queue_for`)."""
    name, read = queue.removeprefix(f"{QUEUE_PREFIX}."), ""
    for special in SPECIAL_FORMATS:
        if name.endswith(f".{special}"):
            name, read = name.removesuffix(f".{special}"), f" that reads .{special}"
    if name.startswith("hw."):
        return f"with hardware {name.removeprefix('hw.')}{read}"
    device, _, kind = name.partition("-")
    return f"with {device}{f' of compute capability {kind}' if kind else ''}{read}"


def to_json(outlook: Outlook) -> dict[str, Any]:
    """As it stands in the job's document."""
    ahead = None if outlook.position is None else outlook.position - 1
    return {
        "position": outlook.position,
        "ahead": ahead,
        "expected_start": outlook.expected_start,
        "waiting_for": outlook.waiting_for,
    }
