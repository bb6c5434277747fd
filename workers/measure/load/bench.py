"""One engine under one traffic, in any setup: rates, what it yields at most, the highest rate within the limit."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import psutil

from workers.measure.load.arrivals import Arrivals
from workers.measure.load.company import Company
from workers.measure.load.generator import Run, Schedule, closed_loop, drive
from workers.measure.load.goodput import Goodput, Plan, highest
from workers.measure.load.judged import BEYOND, DISTURBED, OPEN, Point, allowed, judged, least_over
from workers.measure.load.mix import Mix
from workers.measure.load.target import OK, Target
from workers.measure.quiet import Quiet
from workers.measure.stats import P99_BOUND_SAMPLES

_PATIENCE_S, _PATIENCE = 5.0, 0.1  # to wait for a quiet machine, after each point that had company; of the time left
_LEAST_POINT_S = 1.0
_LONGER = 3  # times the requests, of a rate that is open
_LONGEST = 0.5  # of the time left, that those may take
_SETTLING_S = 0.25  # of a run, whose requests do not count
_SETTLING = 0.2  # of the counted ones, at most
_LEAST_LOOKED = 100  # requests of a short look: one of them may be late
_WARM_UP_S = 0.15  # of a server that was just started
_BURST_S = 0.4  # of a closed loop
_ALONE_S = 0.6  # of one caller
_STAYS_S = 10.0  # that caller, at least
_QUEUED = 2  # batches for each instance, that callers of a closed loop keep filled
_MOST_CALLERS = 512


@dataclass(frozen=True, order=True)
class Setup:
    """How an engine is served. `threads`: of each instance; None leaves the engine's own. `padded`: requests are filled
    up to common sizes. `preferred`: sizes of batches for which the delay is not waited."""

    instances: int = 1
    threads: int | None = None
    max_batch: int = 1
    max_delay_ms: float = 0.0
    padded: bool = False
    preferred: tuple[int, ...] = ()

    def but(self, **changes: Any) -> Setup:
        return replace(self, **changes)

    @property
    def layout(self) -> str:
        return f"{self.instances} × {'its own' if self.threads is None else self.threads}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "preferred": list(self.preferred)}

    def __str__(self) -> str:
        threads = "its own" if self.threads is None else self.threads
        batches = f"batches of up to {self.max_batch}" if self.max_batch > 1 else "one by one"
        delay = f", {self.max_delay_ms:g} ms of delay" if self.max_batch > 1 else ""
        padded = ", filled up to common sizes" if self.padded else ""
        sizes = f", {' or '.join(map(str, self.preferred))} at once" if self.preferred else ""
        return f"{self.instances} instance(s) × {threads} thread(s), {batches}{delay}{sizes}{padded}"


class Running(Target, Protocol):
    """A server that runs. `memory_mb`: of all its processes."""

    def memory_mb(self) -> float | None: ...


Launch = Callable[[Setup], AbstractAsyncContextManager[Running]]


@dataclass(frozen=True)
class Effort:
    """Requests of a point: those of so many `seconds`, within `least` and `most`; no more than fit into `cap_s`, but in
    any case so many that they carry a verdict: `needed`."""

    seconds: float
    least: int
    most: int
    cap_s: float
    needed: int

    def requests(self, rate: float) -> int:
        wanted = min(max(round(self.seconds * rate), self.least), self.most)
        return max(min(wanted, int(self.cap_s * rate)), self.needed)

    def times(self, factor: int) -> Effort:
        """With so many times the requests, which see a smaller difference from the limit."""
        f = factor
        return Effort(f * self.seconds, f * self.least, f * self.most, f * self.cap_s, self.needed)


@dataclass(frozen=True)
class Limit:
    """In seconds."""

    p99_s: float
    timeout_s: float


@dataclass
class Clock:
    """`until`: `time.monotonic()` at which everything should be done."""

    until: float = math.inf
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.until - time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started


class Bench:
    """Runs one setup at a time; the one before is stopped when another is asked for."""

    def __init__(self, launch: Launch, mix: Mix, arrivals: Arrivals, limit: Limit, clock: Clock, seed: int = 0) -> None:
        self.launch, self.mix, self.arrivals, self.limit, self.clock = launch, mix, arrivals, limit, clock
        self.looked = Effort(1.0, 200, 2_000, 6.0, _LEAST_LOOKED)
        self.judged = Effort(3.0, 650, 6_000, 10.0, P99_BOUND_SAMPLES)
        self.points: dict[Setup, list[Point]] = {}
        self.memory: dict[Setup, float | None] = {}
        self.start_s: dict[Setup, float] = {}
        self.quiet = Quiet()
        self._seed = seed
        self._setup: Setup | None = None
        self._open: AbstractAsyncContextManager[Running] | None = None
        self._target: Running | None = None

    async def close(self) -> None:
        if self._open is not None and self._setup is not None and self._target is not None:
            opened, self._open = self._open, None
            try:
                self.memory.setdefault(self._setup, _memory_mb(self._target))
            finally:
                self._setup = self._target = None
                await opened.__aexit__(None, None, None)

    async def target(self, setup: Setup) -> Running:
        """The server in this setup. Raises what `launch` raises where it does not start."""
        if self._target is not None and self._setup == setup:
            return self._target
        await self.close()
        began = time.monotonic()
        opened = self.launch(setup)
        target = await opened.__aenter__()
        self._open, self._target, self._setup = opened, target, setup
        self.start_s.setdefault(setup, time.monotonic() - began)
        await closed_loop(target, self.mix, 1, _WARM_UP_S, self.limit.timeout_s)
        return target

    async def alone(self, setup: Setup) -> Run:
        """One caller, who does not leave: what a request takes where nobody else asks, however short the limit is."""
        target = await self.target(setup)
        return await closed_loop(target, self.mix, 1, _ALONE_S, max(self.limit.timeout_s, _STAYS_S))

    async def burst(self, setup: Setup) -> Run:
        """As many callers as keep every instance busy: what it yields at most."""
        target = await self.target(setup)
        rows = max(1.0, setup.max_batch / self.mix.samples)
        callers = min(math.ceil(_QUEUED * setup.instances * rows), _MOST_CALLERS)
        return await closed_loop(target, self.mix, callers, _BURST_S, self.limit.timeout_s)

    async def proof(self, setup: Setup, rate: float) -> Point:
        """One rate by the bound. Where so many requests leave it open, and few enough were late that it may keep the
        limit, once more with several times as many, as far as the time holds them."""
        found = await self.point(setup, rate, proven=True)
        effort = self.judged.times(_LONGER)
        known = found.verdict == OPEN and found.count and found.over <= BEYOND * found.count
        if known and effort.requests(rate) / rate < _LONGEST * self.clock.left():
            found = await self.point(setup, rate, proven=True, effort=effort)
        return found

    async def point(
        self, setup: Setup, rate: float, *, proven: bool, requests: int | None = None, effort: Effort | None = None
    ) -> Point:
        """One rate, on arrivals of its own. A run that has failed is not taken to its end."""
        effort = effort or (self.judged if proven else self.looked)
        count = requests or effort.requests(rate)
        if requests is None and effort.needed / rate > max(self.clock.left(), _LEAST_POINT_S):
            return Point(rate, OPEN, proven, 0, 0, {"reason": "the time left holds too few requests at this rate"})
        settling = int(min(_SETTLING_S * rate, _SETTLING * count))
        self._seed += 1
        total = count + settling
        schedule = Schedule(
            rate, self.arrivals.due(rate, total, self._seed), self.mix.drawn(total, self._seed), settling
        )
        enough = least_over(count) if proven else allowed(count) + 1
        target = await self.target(setup)
        before = Company.now()
        run = await drive(
            target,
            self.mix,
            schedule,
            limit_s=self.limit.p99_s,
            timeout_s=self.limit.timeout_s,
            enough=enough if requests is None else None,
        )
        found = judged(run, self.limit.p99_s, count, proven=proven, company=before.until_now())
        self.points.setdefault(setup, []).append(found)
        if found.verdict == DISTURBED:
            await self._wait()
        return found

    async def _wait(self) -> None:
        """A bounded while, until nobody else computes."""
        self.quiet.grant(_PATIENCE_S)
        await asyncio.to_thread(self.quiet.wait, min(_PATIENCE_S, _PATIENCE * max(self.clock.left(), 0.0)))

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """What is done in here is to end after so many seconds."""
        until = self.clock.until
        self.clock.until = min(until, time.monotonic() + max(seconds, 0.0))
        try:
            yield
        finally:
            self.clock.until = until

    async def goodput(self, setup: Setup, plan: Plan, *, proven: bool) -> Goodput:
        effort = self.judged if proven else self.looked

        def fits(rate: float) -> bool:
            return effort.requests(rate) / rate + _SETTLING_S + 0.5 <= self.clock.left()

        def measured(rate: float) -> Awaitable[Point]:
            return self.proof(setup, rate) if proven else self.point(setup, rate, proven=False)

        return await highest(measured, plan, fits)


def _memory_mb(target: Running) -> float | None:
    """None where one of its processes has ended: what the others take is not the server's memory."""
    try:
        return target.memory_mb()
    except (OSError, KeyError, psutil.Error):
        return None


def answered(run: Run) -> float:
    """Answers per second of a closed loop."""
    return run.ended(OK) / run.wall_s if run.wall_s > 0 else 0.0


def median_s(run: Run) -> float:
    """Of the latencies; infinite where there was no answer."""
    return float(np.median(run.latency)) if run.count else math.inf


@asynccontextmanager
async def opened(bench: Bench) -> AsyncIterator[Bench]:
    """Stops whatever it started."""
    try:
        yield bench
    finally:
        await bench.close()
