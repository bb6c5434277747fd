"""When requests are due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.domain.traffic import Traffic, without_gaps

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Arrivals:
    """Of one traffic at any rate. `pauses`: of a trace, between its arrivals, with a mean of 1; None where they are
    drawn (`poisson`) or all the same."""

    poisson: bool
    pauses: Array | None = None

    @classmethod
    def of(cls, traffic: Traffic) -> Arrivals:
        if traffic.trace is None:
            return cls(traffic.arrival == "poisson")
        return cls(False, _pauses(without_gaps(traffic.trace) if traffic.trace_gaps == "close" else traffic.trace))

    def due(self, rate: float, count: int, seed: int) -> Array:
        """Seconds [count] from the start at which requests are due, in order; `rate` of them in a second on average. A
        trace is gone through from a place that the seed draws, at the speed that makes this rate, again and again."""
        rng = np.random.default_rng(seed)
        if self.pauses is not None:
            first = int(rng.integers(len(self.pauses)))
            pauses = self.pauses[(first + np.arange(count)) % len(self.pauses)]
        elif self.poisson:
            pauses = rng.exponential(1.0, count)
        else:
            pauses = np.ones(count)
        return np.asarray(np.cumsum(pauses) / rate)

    @property
    def words(self) -> str:
        if self.pauses is not None:
            return f"the job's trace of {len(self.pauses)} arrivals, at the speed that makes the rate"
        return "a Poisson process" if self.poisson else "constant: all pauses the same"


def rate_of(traffic: Traffic) -> float | None:
    """Requests per second that are to be served: what the job says, else the trace's own."""
    if traffic.rate_per_second is not None or traffic.trace is None:
        return traffic.rate_per_second
    trace = without_gaps(traffic.trace) if traffic.trace_gaps == "close" else traffic.trace
    return (len(trace) - 1) / (trace[-1] - trace[0])


def _pauses(trace: Sequence[float]) -> Array:
    """Between the arrivals; from the last one to the first of the next round it is the mean of them."""
    found = np.diff(np.asarray(trace, dtype=np.float64))
    pauses = np.append(found, found.mean())
    return np.asarray(pauses / pauses.mean())
