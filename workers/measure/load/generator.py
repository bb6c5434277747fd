"""The open-loop generator: sends each request when it is due, whatever became of the others, in the process and the
event loop of its caller. How late it sent them itself is kept beside every latency."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from workers.measure.load.alarm import Alarm
from workers.measure.load.mix import Mix
from workers.measure.load.target import FAILED, OK, STATUSES, TIMED_OUT, Counters, Feeds, Outcome, Target

Array = np.ndarray[Any, Any]

LEAD_S = 0.02  # from the start of a run to time 0 of its schedule
_AT_ONCE = 32  # requests that are sent before answers are looked at
_ENDED = {status: number for number, status in enumerate(STATUSES)}
_UNSENT = -1


@dataclass(frozen=True)
class Schedule:
    """`due`: seconds [n] from the start, in order. `kinds` [n]: what is requested. The first `settling` requests are
    sent and not counted."""

    rate: float
    due: Array
    kinds: Array
    settling: int = 0


@dataclass
class Run:
    """What became of a schedule; every array has one entry for each counted request that was sent, in order.

    Seconds: `late` from when it was due until it was sent; `latency` from when it was due until its answer, infinite
    where there was none. `status`: index in `STATUSES`. `waiting`: requests without an answer when it was sent. `cut`:
    the rest was not sent, as it could change nothing any more. `cpu_s`: of this process meanwhile. `seen`: what the
    target counted, of all requests."""

    rate: float
    due: Array
    late: Array
    latency: Array
    status: Array
    waiting: Array
    seen: Counters
    cut: bool = False
    wall_s: float = 0.0
    cpu_s: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return len(self.due)

    def ended(self, status: str) -> int:
        return int((self.status == _ENDED[status]).sum())


async def drive(
    target: Target,
    mix: Mix,
    schedule: Schedule,
    *,
    limit_s: float = math.inf,
    timeout_s: float = 60.0,
    enough: int | None = None,
) -> Run:
    """Send a schedule. `enough`: counted requests not answered within `limit_s`, after which the rest is not sent."""
    gc.collect()
    gc.disable()  # a collection would be late requests of the generator, taken for the target's
    try:
        return await _Drive(target, mix, schedule, limit_s, timeout_s, enough).run()
    finally:
        gc.enable()


class _Drive:
    def __init__(
        self, target: Target, mix: Mix, schedule: Schedule, limit_s: float, timeout_s: float, enough: int | None
    ) -> None:
        self.target, self.schedule = target, schedule
        self.limit_s, self.timeout_s = limit_s, timeout_s
        self.enough = math.inf if enough is None else enough
        self.feeds = [kind.feeds for kind in mix.kinds]
        self.kinds: list[int] = schedule.kinds.tolist()
        count = len(schedule.due)
        self.due: list[float] = schedule.due.tolist()
        self.late = np.full(count, np.nan)
        self.latency = np.full(count, np.inf)
        self.status = np.full(count, _UNSENT, dtype=np.int8)
        self.waiting = np.zeros(count, dtype=np.int32)
        self.codes: Counter[str] = Counter()
        self.next = self.over = 0
        self.cut = False
        self.tasks: set[asyncio.Task[None]] = set()
        self.all_sent = asyncio.Event()
        self.start = 0.0

    async def run(self) -> Run:
        self.loop = asyncio.get_running_loop()
        self.alarm, self.before = Alarm(self._due), self.target.counters()
        cpu, began = time.process_time(), time.monotonic()
        try:
            self.start = began + LEAD_S
            self.alarm.set(self.start + self.due[0])
            await self.all_sent.wait()
            await self._last_answers()
        finally:
            self.alarm.close()
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
        return self._result(time.monotonic() - began, time.process_time() - cpu)

    def _due(self) -> None:
        """Send what is due, and set the alarm for the next."""
        if self.all_sent.is_set():
            return
        for _ in range(_AT_ONCE):
            if self.next >= len(self.due) or self.cut:
                self.all_sent.set()
                return
            at = self.start + self.due[self.next]
            if at > time.monotonic():
                self.alarm.set(at)
                return
            self._send(self.next, at)
            self.next += 1
        self.loop.call_soon(self._due)

    def _send(self, i: int, at: float) -> None:
        self.waiting[i] = len(self.tasks)
        choices = self.feeds[self.kinds[i]]
        task = self.loop.create_task(self._request(i, at, choices[i % len(choices)]))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _request(self, i: int, at: float, feeds: Feeds) -> None:
        late = time.monotonic() - at
        self.late[i] = late
        try:
            outcome = await self.target.submit(feeds, max(self.timeout_s - late, 0.0))
        except asyncio.CancelledError:
            if not self.cut:
                self.status[i] = _ENDED[TIMED_OUT]
            raise
        except Exception as error:  # a request that fails is a figure of the target, no fault of the measurement
            outcome = Outcome(FAILED, type(error).__name__)
        latency = time.monotonic() - at
        self.status[i] = _ENDED[outcome.status]
        if outcome.status == OK:
            self.latency[i] = latency
        if outcome.code:
            self.codes[outcome.code] += 1
        if i >= self.schedule.settling and not (outcome.status == OK and latency <= self.limit_s):
            self.over += 1
            if self.over >= self.enough and not self.cut:
                self.cut = True
                self.all_sent.set()

    async def _last_answers(self) -> None:
        """Who has not answered until its callers have left does not count as having answered."""
        if self.tasks and not self.cut:
            await asyncio.wait(self.tasks, timeout=self.timeout_s + 1.0)

    def _result(self, wall_s: float, cpu_s: float) -> Run:
        counted = np.arange(min(self.schedule.settling, self.next), self.next)
        # What was under way when the run was cut short is no evidence of anything.
        counted = counted[self.status[counted] != _UNSENT]
        return Run(
            self.schedule.rate,
            self.schedule.due[counted],
            self.late[counted],
            self.latency[counted],
            self.status[counted],
            self.waiting[counted],
            self.target.counters().since(self.before),
            self.cut,
            wall_s,
            cpu_s,
            self.codes,
        )


async def closed_loop(target: Target, mix: Mix, callers: int, seconds: float, timeout_s: float = 60.0) -> Run:
    """So many callers, each with its next request when the one before was answered: what the target yields at most. It
    hides stalls, and serves to begin the search for a rate."""
    due: list[float] = []
    found: list[Outcome] = []
    latency: list[float] = []
    kinds, before = mix.drawn(4096, callers).tolist(), target.counters()
    cpu, start = time.process_time(), time.monotonic()

    async def caller(number: int) -> None:
        i = number
        while (at := time.monotonic()) < start + seconds:
            choices = mix.kinds[kinds[i % len(kinds)]].feeds
            try:
                outcome = await target.submit(choices[i % len(choices)], timeout_s)
            except Exception as error:
                outcome = Outcome(FAILED, type(error).__name__)
            due.append(at - start)
            found.append(outcome)
            latency.append(time.monotonic() - at if outcome.status == OK else math.inf)
            if outcome.status != OK:
                await asyncio.sleep(0.001)  # one that refuses at once is not to be asked without end
            i += callers

    await asyncio.gather(*(caller(n) for n in range(callers)))
    wall = time.monotonic() - start
    answered = sum(o.status == OK for o in found)
    return Run(
        answered / wall,
        np.array(due),
        np.zeros(len(due)),
        np.array(latency),
        np.array([_ENDED[o.status] for o in found], dtype=np.int8),
        np.zeros(len(due), dtype=np.int32),
        target.counters().since(before),
        wall_s=wall,
        cpu_s=time.process_time() - cpu,
        codes=Counter(o.code for o in found if o.code),
    )
