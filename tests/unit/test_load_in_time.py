"""A load test whose servers do not come up: it ends in its time with what was found until then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from app.domain.failures import StageFailure
from tests.factories.queueing import MIX
from workers.measure.load.arrivals import Arrivals
from workers.measure.load.bench import Bench, Clock, Launch, Limit, Running, Setup, opened
from workers.measure.load.target import Feeds, Instant, Outcome
from workers.measure.load.trial import NO_TIME, Trial
from workers.measure.load.tuning import Space


class Quick(Instant):
    """Takes a millisecond, so that rates are those of a machine's."""

    async def submit(self, feeds: Feeds, deadline_s: float) -> Outcome:
        await asyncio.sleep(0.001)
        return await super().submit(feeds, deadline_s)

    def memory_mb(self) -> float | None:
        return 1.0


class Servers:
    """`come_up`: at once, or never. `left`: how many starts were given up."""

    def __init__(self, *, come_up: bool = True) -> None:
        self.come_up, self.left, self.open = come_up, 0, 0

    @asynccontextmanager
    async def launch(self, _setup: Setup) -> AsyncIterator[Running]:
        self.open += 1
        try:
            if not self.come_up:
                await asyncio.Event().wait()
            yield Quick()
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self.open -= 1


def tried(shipped: Servers, original: Servers, served: Servers | None = None, *, seconds: float) -> Trial:
    clock = Clock(time.monotonic() + seconds)

    def bench(launch: Launch) -> Bench:
        return Bench(launch, MIX, Arrivals(False), Limit(0.5, 1.0), clock)

    space = Space([(1, None), (2, 1)], [1])
    behind = None if served is None else bench(served.launch)
    return Trial(bench(shipped.launch), bench(original.launch), space, 20.0, lambda *_: None, behind)


def test_a_server_that_does_not_come_up_costs_only_its_own_part() -> None:
    original = Servers(come_up=False)
    trial = tried(Servers(), original, Servers(), seconds=2.5)

    async def main() -> None:
        async with opened(trial.original):
            await trial._try("original", trial._original)
            await trial._try("http", trial._http)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 6
    assert trial.found.original is not None
    trial.found.original.to_json()
    assert trial.found.reasons == {"original": NO_TIME, "http": NO_TIME}, "nothing was left for the other"
    assert (original.left, original.open) == (1, 0)


def test_where_no_rate_was_found_in_time_the_whole_has_a_reason() -> None:
    shipped = Servers(come_up=False)
    began = time.monotonic()
    with pytest.raises(StageFailure, match="before a rate was found") as failed:
        asyncio.run(tried(shipped, Servers(), seconds=1.0).run())
    assert failed.value.code == "timed_out"
    assert time.monotonic() - began < 5
    assert (shipped.left, shipped.open) == (1, 0)


def test_what_was_tuned_does_not_ship_where_the_time_was_over_before_it_was_decided() -> None:
    trial = tried(Servers(), Servers(), seconds=5.0)

    async def hangs(*_: object) -> None:
        trial.found.engine.setup = Setup(instances=2, threads=1)
        trial.clock.until = time.monotonic()
        await asyncio.Event().wait()

    trial._proven = hangs  # type: ignore[assignment,method-assign]  # as if the machine stood still from here on
    found = asyncio.run(trial.run())
    assert found.engine.setup == Setup()
    assert found.engine.goodput is not None
    assert found.engine.goodput.best is None or not found.engine.goodput.best.proven
    assert found.reasons["engine"] == NO_TIME
