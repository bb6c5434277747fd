"""A server with a queue, batches and instances, gone through event by event: what a load test finds of it is known
beforehand, takes no time, and does not depend on the machine."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np

from workers.measure.load.arrivals import Arrivals
from workers.measure.load.bench import Bench, Clock, Effort, Limit, Setup
from workers.measure.load.generator import Run
from workers.measure.load.judged import Point, judged
from workers.measure.load.mix import Kind, Mix
from workers.measure.load.target import Counters

FEEDS = {"x": np.zeros((1, 4), dtype=np.float32)}
MIX = Mix([Kind("typical × 1", 1, {"x": (1, 4)}, 1.0, [FEEDS])], "one shape")

Service = Callable[[Setup, int], float]  # seconds of a batch of so many


def simulated(due: Any, setup: Setup, service: Service, timeout_s: float) -> Run:
    """Requests of one sample each; a batch starts when an instance is free and the batch is full, or its first request
    has waited the delay, or there are as many as one of the preferred sizes."""
    count = len(due)
    free = [0.0] * setup.instances
    latency, waited = np.zeros(count), np.zeros(count)
    batches: Counter[int] = Counter()
    compute, first = 0.0, 0
    while first < count:
        ready = heapq.heappop(free)
        enough = min(setup.preferred, default=setup.max_batch)
        full = due[first + enough - 1] if first + enough <= count else np.inf
        start = max(ready, min(full, due[first] + setup.max_delay_ms / 1e3))
        last = min(int(np.searchsorted(due, start, side="right")), first + setup.max_batch)
        size = max(last - first, 1)
        if start < due[first] + setup.max_delay_ms / 1e3:  # before the delay has ended: of the sizes not waited for
            size = max((n for n in setup.preferred if n <= size < setup.max_batch), default=size)
        seconds = service(setup, size)
        waited[first : first + size] = start - due[first : first + size]
        latency[first : first + size] = start + seconds - due[first : first + size]
        heapq.heappush(free, start + seconds)
        batches[size] += 1
        compute += seconds
        first += size
    lost = latency > timeout_s
    seen = Counters(batches, float(waited.sum()), count, compute, sum(batches.values()))
    status = np.where(lost, 2, 0).astype(np.int8)
    answered = np.where(lost, np.inf, latency)
    return Run(count / due[-1], due, np.zeros(count), answered, status, np.zeros(count, np.int32), seen, wall_s=due[-1])


class SimulatedBench(Bench):
    """A bench whose server is simulated. `runs`: how many points were measured, `requests`: of all of them."""

    def __init__(
        self, service: Service, *, limit_ms: float = 20.0, timeout_ms: float = 200.0, seconds: float = 1e9
    ) -> None:
        limit = Limit(limit_ms / 1e3, timeout_ms / 1e3)
        super().__init__(self._never, MIX, Arrivals(poisson=True), limit, Clock(seconds), 0)
        self.service = service
        self.now = 0.0
        self.runs = self.requests = 0
        self.clock = _Clock(self, seconds)

    @asynccontextmanager
    async def _never(self, setup: Setup) -> Any:
        raise AssertionError("nothing runs")
        yield

    async def close(self) -> None:
        return

    def within(self, seconds: float) -> Any:
        return self.clock.within(seconds)

    async def alone(self, setup: Setup) -> Run:
        return self._closed(setup, 1)

    async def burst(self, setup: Setup) -> Run:
        return self._closed(setup, setup.max_batch)

    def _closed(self, setup: Setup, batch: int) -> Run:
        seconds = self.service(setup, batch)
        self.now += 0.4
        count = max(int(0.4 / seconds) * setup.instances * batch, 1)
        seen = Counters(Counter({batch: count // batch}), 0.0, count, seconds * (count // batch), count // batch)
        zeros = np.zeros(count)
        full = np.full(count, seconds)
        return Run(1.0, zeros, zeros, full, zeros.astype(np.int8), zeros.astype(np.int32), seen, wall_s=0.4)

    async def point(
        self, setup: Setup, rate: float, *, proven: bool, requests: int | None = None, effort: Effort | None = None
    ) -> Point:
        effort = effort or (self.judged if proven else self.looked)
        count = requests or effort.requests(rate)
        self._seed += 1
        run = simulated(self.arrivals.due(rate, count, self._seed), setup, self.service, self.limit.timeout_s)
        run.rate = rate
        self.now += count / rate
        self.runs += 1
        self.requests += count
        found = judged(run, self.limit.p99_s, count, proven=proven)
        self.points.setdefault(setup, []).append(found)
        return found


class _Clock(Clock):
    def __init__(self, bench: SimulatedBench, seconds: float) -> None:
        super().__init__(seconds, 0.0)
        self.bench = bench

    def left(self) -> float:
        return self.until - self.bench.now

    @contextmanager
    def within(self, seconds: float) -> Any:
        until, self.until = self.until, min(self.until, self.bench.now + max(seconds, 0.0))
        try:
            yield
        finally:
            self.until = until

    @property
    def spent(self) -> float:
        return self.bench.now
