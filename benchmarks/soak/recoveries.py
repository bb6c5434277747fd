"""How long it takes after a fault: until a job that it hit may be taken again, until it goes on, until the service
answers again. A job that may be taken waits for a worker that is free, which is a matter of how many there are; what it
waits though one is free is the service's own."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from app.db.orm import Job, Worker
from app.db.uow import Database

_PATIENCE_S = 180.0
_LOOK_S = 0.05
_ENDED = ("succeeded", "failed", "cancelled")
WAITED_FOR = ("queued", "own", "goes_on", "answers")


@dataclass(frozen=True)
class Running:
    """A job that a worker has: whose claim it is, and how far it was."""

    job_id: str
    owner: str
    token: int
    version: int
    stage: str | None  # the one that runs, None between two


@dataclass
class Struck:
    """A fault that was made. Its recovery counts from `began` (`time.monotonic()`). `same_worker`: the jobs may go on
    with the worker that has them. `served`: whether the service, or what was asked of it, answers again."""

    began: float
    jobs: list[Running] = field(default_factory=list)
    same_worker: bool = False
    served: Callable[[], bool] | None = None
    kind: str | None = None  # where it became another fault than was meant
    rest: Callable[[], None] = lambda: None  # what is still to be done of it, while it is watched


@dataclass
class Times:
    """Seconds, by what was waited for. `never`: not within three minutes."""

    queued: list[float] = field(default_factory=list)  # until the job was taken from who had it
    own: list[float] = field(default_factory=list)  # until it went on, without the time in which no worker was free
    goes_on: list[float] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)
    never: int = 0

    def to_json(self) -> dict[str, Any]:
        return {name: spread(getattr(self, name)) for name in WAITED_FOR} | {"never": self.never}


class Eyes:
    """Looks into the database from outside; blind while that is away."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def running(self) -> list[Running]:
        columns = (Job.id, Job.lease_owner, Job.fencing_token, Job.version, Job.stages)
        query = select(*columns).where(Job.status == "running", Job.lease_owner.is_not(None))
        with contextlib.suppress(SQLAlchemyError), self._db.read() as session:
            rows = session.execute(query).all()
            return [Running(r.id, r.lease_owner, r.fencing_token, r.version, _now(r.stages)) for r in rows]
        return []

    def row(self, job_id: str) -> Any:
        """(status, fencing_token, version, stages); None while nothing can be seen."""
        query = select(Job.status, Job.fencing_token, Job.version, Job.stages).where(Job.id == job_id)
        with contextlib.suppress(SQLAlchemyError), self._db.read() as session:
            return session.execute(query).one_or_none()
        return None

    def idle(self, started: Mapping[str, float]) -> bool:
        """Whether one of these workers has signed on since it was started (by `time.time()`), and has no job. False
        while nothing can be seen."""
        busy = {job.owner for job in self.running()}
        query = select(Worker.id, Worker.started_at).where(Worker.id.in_(started), Worker.stopped_at.is_(None))
        with contextlib.suppress(SQLAlchemyError), self._db.read() as session:
            there = [name for name, at in session.execute(query) if at.timestamp() > started[name]]
            return bool({*there} - busy)
        return False

    def any_job(self) -> Job | None:
        """One that waits, or else one that runs."""
        query = select(Job).where(Job.status.in_(("queued", "running"))).order_by(Job.status, Job.id).limit(1)
        with contextlib.suppress(SQLAlchemyError), self._db.read() as session:
            return session.scalar(query)
        return None

    def wait_for(self, wanted: Callable[[Running], bool], seconds: float) -> Running | None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for job in self.running():
                if wanted(job):
                    return job
            time.sleep(0.02)
        return None


def _now(stages: list[dict[str, Any]] | None) -> str | None:
    return str(stages[-1]["name"]) if stages and stages[-1]["status"] == "running" else None


class Recoveries:
    """Watches each fault in a thread of its own. `free`: whether some worker could take a job at this moment."""

    def __init__(self, eyes: Eyes, free: Callable[[], bool]) -> None:
        self.eyes, self._free = eyes, free
        self.times: dict[str, Times] = defaultdict(Times)
        self._threads: list[threading.Thread] = []

    def watch(self, kind: str, struck: Struck) -> threading.Thread:
        """The thread ends when it is over."""
        thread = threading.Thread(target=self._watch, args=(self.times[kind], struck), daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def join(self) -> None:
        for thread in self._threads:
            thread.join(_PATIENCE_S)

    def to_json(self) -> Mapping[str, Any]:
        return {kind: times.to_json() for kind, times in sorted(self.times.items())}

    def _watch(self, times: Times, struck: Struck) -> None:
        waiting, held, served = {job.job_id: job for job in struck.jobs}, {j.job_id for j in struck.jobs}, struck.served
        own, looked, free = dict.fromkeys(waiting, 0.0), struck.began, False
        deadline = struck.began + _PATIENCE_S
        while (waiting or served is not None) and time.monotonic() < deadline:
            was_free, free = free, any(job_id not in held for job_id in waiting) and self._free()
            passed, looked = time.monotonic() - looked, time.monotonic()
            for job_id, job in [*waiting.items()]:
                row = self.eyes.row(job_id)
                if row is None:
                    continue
                status, token, version, _ = row
                seconds = time.monotonic() - struck.began
                if job_id in held and (token > job.token or status != "running"):
                    held.discard(job_id)
                    own[job_id] = seconds
                    if not struck.same_worker:
                        times.queued.append(seconds)
                elif job_id not in held and (free or was_free):  # the one that was free may have it by now
                    own[job_id] += passed
                moved = struck.same_worker and status == "running" and version > job.version
                if token > job.token or status in _ENDED or moved:
                    times.goes_on.append(seconds)
                    if not struck.same_worker:
                        times.own.append(own[job_id])
                    del waiting[job_id]
            if served is not None and served():
                times.answers.append(time.monotonic() - struck.began)
                served = None
            time.sleep(_LOOK_S)
        times.never += len(waiting) + (served is not None)


def ready(url: str) -> bool:
    """Whether this API process serves: database, storage and queue are there."""
    with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
        return bool(httpx.get(f"{url}/readyz", timeout=5).json()["ready"])
    return False


def alive(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/healthz", timeout=5).status_code == 200
    return False


def spread(found: list[float]) -> dict[str, Any] | None:
    if not found:
        return None
    return {
        "count": len(found),
        "median": round(statistics.median(found), 1),
        "max": round(max(found), 1),
        "all": [round(seconds, 2) for seconds in found],
    }


def table(times: Mapping[str, Any], done: Mapping[str, int]) -> str:
    """As Markdown: faults, and median / maximum of what was waited for."""

    def cell(found: Mapping[str, float] | None) -> str:
        return "" if found is None else f"{found['median']:g} / {found['max']:g}"

    head = ("fault", "times", "job taken from who had it", "the service's own part", "it goes on", "service answers")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for kind, count in sorted(done.items()):
        row = times.get(kind) or {}
        cells = [cell(row.get(name)) for name in WAITED_FOR]
        lines.append(f"| {kind} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)
