"""What is driven: anything that answers requests."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]

OK, REJECTED, TIMED_OUT, FAILED = "ok", "rejected", "timed_out", "failed"
STATUSES = (OK, REJECTED, TIMED_OUT, FAILED)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. `code`: of a failure. `retry_after_s`: of a refusal."""

    status: str
    code: str = ""
    retry_after_s: float = math.nan


@dataclass(frozen=True)
class Counters:
    """What a server counted since its start, in seconds: what requests waited before their batch, what batches took.
    `batches`: those that ran, by their samples, as exactly as the server tells them."""

    batches: Counter[int] = field(default_factory=Counter)
    queue_s: float = 0.0
    queued: int = 0
    compute_s: float = 0.0
    computed: int = 0

    def since(self, before: Counters) -> Counters:
        return Counters(
            self.batches - before.batches,
            self.queue_s - before.queue_s,
            self.queued - before.queued,
            self.compute_s - before.compute_s,
            self.computed - before.computed,
        )

    @property
    def mean_queue_s(self) -> float | None:
        return self.queue_s / self.queued if self.queued else None

    @property
    def mean_compute_s(self) -> float | None:
        return self.compute_s / self.computed if self.computed else None


class Target(Protocol):
    """`submit`: the outcome of one request, which is given up after `deadline_s` seconds. Cancelled, it withdraws the
    request."""

    async def submit(self, feeds: Feeds, deadline_s: float) -> Outcome: ...

    def counters(self) -> Counters: ...


class Instant:
    """Answers at once: what is left is the generator itself."""

    async def submit(self, feeds: Feeds, deadline_s: float) -> Outcome:  # noqa: ARG002
        return Outcome(OK)

    def counters(self) -> Counters:
        return Counters()
