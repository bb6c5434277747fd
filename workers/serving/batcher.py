"""The dynamic batcher: requests of many callers in batches, on one or several processes of an engine.

    async with Batcher(folder) as batcher:          # a bundle, unpacked
        outputs = await batcher.submit({"input": array}, deadline_s=0.2)

Every request gets the rows of its own, once, or one of the errors of `serving_settings`. A batch that fails is run
again request by request, so that one bad request spoils no other. An instance whose process ends is started again, and
what it had is tried once more, each request alone. A caller that leaves (whose task is cancelled) costs nothing that
has not begun. One event loop; nothing here is for several threads.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

if __package__:
    from .fair_queue import FairQueue, Full, Request
    from .instances import Instance, cores_for
    from .rows import Array, Plan, Rows, Unsplittable, interface
    from .serving_settings import (
        Failed,
        InvalidRequest,
        Rejected,
        ServingError,
        Settings,
        SettingsError,
        TimedOut,
    )
else:  # beside this file, in a bundle
    from fair_queue import FairQueue, Full, Request  # type: ignore[import-not-found,no-redef]
    from instances import Instance, cores_for  # type: ignore[import-not-found,no-redef]
    from rows import Array, Plan, Rows, Unsplittable, interface  # type: ignore[import-not-found,no-redef]
    from serving_settings import (  # type: ignore[import-not-found,no-redef]
        Failed,
        InvalidRequest,
        Rejected,
        ServingError,
        Settings,
        SettingsError,
        TimedOut,
    )

__all__ = [
    "Batcher",
    "Failed",
    "InvalidRequest",
    "Rejected",
    "ServingError",
    "Settings",
    "SettingsError",
    "Stats",
    "TimedOut",
]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
BATCH_SIZES = tuple(2**n for n in range(11))  # rows
_GIVEN_UP = 3  # starts in a row that came to nothing, of all instances: then nobody is kept waiting
_MOST_SIZES = 4096  # different ones that are counted each by itself
_LEAST_RETRY_S, _MOST_RETRY_S = 0.05, 30.0


class Histogram:
    """Counts of values up to each of the bounds, and above the last one."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass
class Stats:
    """Since the start. `ended`: requests by how they ended: `ok`, an error's code, or `cancelled` by the caller.
    `batches`: batches that ran by their rows, of so many sizes at most; `batch_size`: the same of all. `queue`: what
    requests waited before their batch; `compute`: what batches took, arrays there and back included; `request`: from
    arrival to answer. `retried`: requests that were run once more, alone; `restarts`: processes that ended."""

    ended: Counter[str] = field(default_factory=Counter)
    batches: Counter[int] = field(default_factory=Counter)
    batch_size: Histogram = field(default_factory=lambda: Histogram(BATCH_SIZES))
    queue: Histogram = field(default_factory=Histogram)
    compute: Histogram = field(default_factory=Histogram)
    request: Histogram = field(default_factory=Histogram)
    retried: int = 0
    restarts: int = 0

    def ran(self, rows: int) -> None:
        """A batch."""
        self.batch_size.add(rows)
        if rows in self.batches or len(self.batches) < _MOST_SIZES:
            self.batches[rows] += 1


class Batcher:
    """Serves the bundle in `folder` (its `infer.py`) as `settings` say, by default those of its `serving.json`."""

    def __init__(self, folder: Path, settings: Settings | None = None) -> None:
        """Raises `SettingsError`. Nothing runs before `start`."""
        self.folder = Path(folder).resolve()
        self.settings = settings if settings is not None else Settings.of_folder(self.folder)
        self.stats = Stats()
        self.tensors = interface(self.folder)
        # Why requests run one by one, where they do.
        self.one_by_one = self.settings.reason if self.settings.max_batch == 1 else None
        self._queue = FairQueue(
            self.settings.queue_limit,
            self.settings.max_batch,
            self.settings.max_delay_ms / 1000,
            self.settings.preferred_batches,
        )
        self._instances: list[Instance] = []
        self._running: dict[Instance, tuple[list[Request], float]] = {}
        self._idle: list[Instance] = []
        self._rows: Rows | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._asked = self._stopping = False
        self._per_row_s = 0.0  # of an instance, lately
        self._changed = asyncio.Event()
        self._why = ""

    async def __aenter__(self) -> Batcher:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Until every instance has loaded the engine. Raises `Failed` (`start_failed`) where one does not."""
        self._loop = asyncio.get_running_loop()
        s = self.settings
        cores = cores_for(s.instances, s.threads)
        self._instances = [
            Instance(self, i, self.folder, s.threads, cores[i], s.call_limit_s) for i in range(s.instances)
        ]
        for instance in self._instances:
            instance.start()
        while not all(i.is_ready for i in self._instances):
            if any(i.failures for i in self._instances):
                await self.stop(grace_s=0.0)
                raise Failed("start_failed", f"the engine does not start: {self._why}")
            self._changed.clear()
            await self._changed.wait()

    async def stop(self, grace_s: float = 30.0) -> None:
        """Take no more, answer what was taken, end the processes; what is left after `grace_s` is rejected."""
        self._stopping = True
        until = time.monotonic() + grace_s
        while (self._queue or self._running) and (left := until - time.monotonic()) > 0:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                break
        gone = Rejected("stopping", "the server stops", 1.0)
        for request in [*self._queue.everything(), *(r for batch, _ in self._running.values() for r in batch)]:
            self._fail(request, gone)
        self._running.clear()
        self._idle.clear()
        instances, self._instances = self._instances, []
        await asyncio.gather(*(i.close() for i in instances))
        if self._timer is not None:
            self._timer.cancel()

    @property
    def ready(self) -> bool:
        """Whether an instance takes requests now."""
        return not self._stopping and self.up > 0

    @property
    def up(self) -> int:
        """Instances that have loaded the engine."""
        return sum(i.is_ready for i in self._instances)

    @property
    def waiting(self) -> int:
        """Requests whose batch has not begun."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Requests that run."""
        return sum(len(batch) for batch, _ in self._running.values())

    async def submit(
        self, feeds: Mapping[str, Any], deadline_s: float | None = None, caller: str = ""
    ) -> dict[str, Array]:
        """The outputs by name, in memory of their own. `deadline_s`: from now; `caller`: whose turn it is.

        Raises `InvalidRequest`, `Rejected`, `TimedOut`, `Failed`."""
        answer: dict[str, Array] = await self.enqueue(feeds, deadline_s, caller)
        return answer

    def enqueue(
        self, feeds: Mapping[str, Any], deadline_s: float | None = None, caller: str = ""
    ) -> asyncio.Future[dict[str, Array]]:
        """As `submit`: what it returns, to come. To cancel the future is to leave."""
        try:
            return self._enqueue(feeds, deadline_s, caller)
        except ServingError as error:
            self.stats.ended[error.code] += 1
            raise

    def _enqueue(
        self, feeds: Mapping[str, Any], deadline_s: float | None, caller: str
    ) -> asyncio.Future[dict[str, Array]]:
        if self._stopping:
            raise Rejected("stopping", "the server stops", 1.0)
        if self._rows is None or self._loop is None or self._given_up():
            raise Rejected("not_ready", f"no instance runs the engine now{self._why and ': ' + self._why}", 1.0)
        plan = self._rows.plan(feeds)
        if deadline_s is not None and deadline_s <= 0:
            raise TimedOut("deadline_exceeded", "the deadline had passed before the request came")
        now = time.monotonic()
        future: asyncio.Future[dict[str, Array]] = self._loop.create_future()
        request = Request(plan.key, plan.rows, caller, now, plan, future, alone=plan.single or bool(self.one_by_one))
        if self._idle and len(self._queue) >= self.settings.queue_limit:
            self._dispatch()  # what is due makes room
        try:
            evicted = self._queue.add(request)
        except Full:
            raise self._full() from None
        if evicted is not None:
            self._fail(evicted, self._full())
        future.add_done_callback(lambda done: self._left(request) if done.cancelled() else None)
        if deadline_s is not None:
            request.timer = self._loop.call_later(deadline_s, self._late, request)
        self._ask()
        return future

    # What the instances tell.

    def instance_ready(self, instance: Instance) -> None:
        """It takes batches from now on."""
        if self._rows is None:
            self._rows = Rows(instance.names, self.settings, self.tensors[0] if self.tensors else None)
        self._idle.append(instance)
        self._changed.set()
        self._ask()

    def instance_answered(self, instance: Instance, outputs: Mapping[str, Array] | ServingError) -> None:
        """A batch is done, or failed: then each of its requests runs alone, so that none suffers for another."""
        found = self._running.pop(instance, None)
        if found is None:
            return  # stopped meanwhile
        batch, since = found
        self._idle.append(instance)
        self._took(time.monotonic() - since, sum(r.cost for r in batch))
        if isinstance(outputs, ServingError):
            if len(batch) == 1:
                self._fail(batch[0], outputs)
            else:
                self._again(batch)
        else:
            self._answer(batch, outputs)
        self._changed.set()
        self._ask()

    def instance_ended(self, instance: Instance, why: str) -> None:
        """Its requests are tried once more, each alone: whichever of them it was spoils no other."""
        self._why = why
        self.stats.restarts += 1
        if instance in self._idle:
            self._idle.remove(instance)
        batch, _ = self._running.pop(instance, ([], 0.0))
        for request in batch:
            request.deaths += 1
            if request.deaths > 1:
                self._fail(request, Failed("instance_died", f"the process of the engine ended under it twice: {why}"))
            else:
                self._again([request])
        if self._given_up():
            for request in self._queue.everything():
                self._fail(request, Rejected("not_ready", f"no instance runs the engine: {why}", _MOST_RETRY_S))
        self._changed.set()
        self._ask()

    # Who runs next.

    def _ask(self) -> None:
        """Look once what is due, when all that comes in this turn of the loop has come."""
        if not self._asked and self._queue and self._loop is not None and not self._loop.is_closed():
            self._asked = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._asked = False
        now = time.monotonic()
        while self._idle and (batch := self._queue.take(now)):
            self._run(self._idle.pop(), batch, now)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._idle and self._loop is not None and (due := self._queue.due_at()) is not None:
            self._timer = self._loop.call_later(max(0.0, due - now), self._ask)

    def _run(self, instance: Instance, batch: list[Request], now: float) -> None:
        assert self._rows is not None
        plans: list[Plan] = [r.plan for r in batch]
        try:
            self._rows.fill(instance.begin(self._rows.specs(plans)), plans)
        except InvalidRequest as error:
            self._idle.append(instance)
            if len(batch) == 1:
                self._fail(batch[0], error)
            else:
                self._again(batch)
            return
        for request in batch:
            self.stats.queue.add(now - request.arrived)
        self.stats.ran(sum(p.rows for p in plans))
        self._running[instance] = (batch, now)
        instance.run()

    def _answer(self, batch: list[Request], outputs: Mapping[str, Array]) -> None:
        assert self._rows is not None
        try:
            answers = self._rows.split(outputs, [r.plan for r in batch])
        except Unsplittable as error:
            self.one_by_one = str(error)
            self._queue.max_batch = 1
            self._again(batch)
            return
        for request, answer in zip(batch, answers, strict=True):
            if not request.future.done():
                request.future.set_result(answer)
                self.stats.request.add(time.monotonic() - request.arrived)
                self._end(request, "ok")

    def _took(self, seconds: float, rows: int) -> None:
        self.stats.compute.add(seconds)
        per_row = seconds / rows
        self._per_row_s += (per_row - self._per_row_s) * (0.1 if self._per_row_s else 1.0)

    def _again(self, batch: list[Request]) -> None:
        for request in batch:
            if not request.future.done():
                self.stats.retried += 1
                self._queue.again(request)

    # How requests end.

    def _end(self, request: Request, how: str) -> None:
        self.stats.ended[how] += 1
        if request.timer is not None:
            request.timer.cancel()
        if request.queued:
            self._queue.remove(request)
            request.plan = None
            self._changed.set()

    def _fail(self, request: Request, error: ServingError) -> None:
        if not request.future.done():
            request.future.set_exception(error)
            self._end(request, error.code)

    def _late(self, request: Request) -> None:
        where = "in the queue" if request.queued else "while it ran"
        self._fail(request, TimedOut("deadline_exceeded", f"the deadline passed {where}"))

    def _left(self, request: Request) -> None:
        self._end(request, "cancelled")

    def _full(self) -> Rejected:
        seconds = self._queue.rows * self._per_row_s / max(1, self.up)
        retry = min(max(seconds, _LEAST_RETRY_S), _MOST_RETRY_S)
        return Rejected("queue_full", f"{self.settings.queue_limit} requests wait already", retry)

    def _given_up(self) -> bool:
        """Whether the engine ends again and again before it has loaded, in every instance."""
        return all(not i.is_ready and i.failures >= _GIVEN_UP for i in self._instances)
