"""The server that ships, as something to be driven: `serving.batcher` on a bundle, in this event loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from app.domain.failures import StageFailure
from workers.measure.instances import memory_bytes
from workers.measure.load.bench import Launch, Running, Setup
from workers.measure.load.target import FAILED, OK, REJECTED, TIMED_OUT, Counters, Feeds, Outcome
from workers.serving.batcher import Batcher, Rejected, ServingError, Settings, TimedOut

_GRACE_S = 1.0


class Served:
    """A batcher that runs."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    async def submit(self, feeds: Feeds, deadline_s: float) -> Outcome:
        try:
            await self.batcher.enqueue(feeds, deadline_s)
        except Rejected as rejected:
            return Outcome(REJECTED, rejected.code, rejected.retry_after_s)
        except TimedOut as late:
            return Outcome(TIMED_OUT, late.code)
        except ServingError as error:
            return Outcome(FAILED, error.code)
        return Outcome(OK)

    def counters(self) -> Counters:
        stats = self.batcher.stats
        return Counters(
            Counter(stats.batches),
            stats.queue.sum,
            sum(stats.queue.counts),
            stats.compute.sum,
            sum(stats.compute.counts),
        )

    def memory_mb(self) -> float | None:
        """Of the instances' processes."""
        found = [memory_bytes(child.pid) for child in psutil.Process().children() if child.is_running()]
        return sum(found) / 1e6 if found else None


def launch_of(folder: Path, base: Settings) -> Launch:
    """Serves the bundle in `folder`; what a setup does not say is as in `base`, whose `pad` is for padded ones."""

    def launch(setup: Setup) -> AbstractAsyncContextManager[Running]:
        return _serving(folder, settings_of(base, setup))

    return launch


def settings_of(base: Settings, setup: Setup) -> Settings:
    return replace(
        base,
        instances=setup.instances,
        threads=setup.threads,
        max_batch=setup.max_batch,
        max_delay_ms=setup.max_delay_ms,
        preferred_batches=setup.preferred,
        pad=base.pad if setup.padded else {},
        cut=base.cut if setup.padded else {},
    )


@asynccontextmanager
async def _serving(folder: Path, settings: Settings) -> AsyncIterator[Running]:
    batcher = Batcher(folder, settings)
    try:
        try:
            await batcher.start()
        except ServingError as error:
            raise StageFailure("engine_does_not_serve", error.detail, stage="load_test", cacheable=False) from error
        yield Served(batcher)
    finally:
        await batcher.stop(grace_s=_GRACE_S)
