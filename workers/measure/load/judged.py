"""What one run at one rate says of the limit. The p99 is judged by counting who was late, refused or failed: its bound
by order statistics (MLPerf LoadGen's early stopping) is within the limit exactly where so few of so many were."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from workers.measure.load.generator import Run
from workers.measure.load.target import STATUSES
from workers.measure.stats import P99_BOUND_SAMPLES, P99_CONFIDENCE, p99_bound
from workers.measure.upper_bounds import at_most

Array = np.ndarray[Any, Any]

BEYOND = 0.01  # of the requests, that may be later than a p99
KEEPS, EXCEEDS, OPEN = "keeps", "exceeds", "open"
LATE, DISTURBED = "generator_late", "disturbed"
# Verdicts that say nothing of the engine, and why.
SPOILT = {LATE: "the generator itself sent requests too late", DISTURBED: "the machine had other work meanwhile"}
MOST_LATE = 0.10  # of the limit, by which the generator may be late in 99 of 100 requests
LEAST_LATE_S = 0.001  # what it may be late in any case
_SHOWN = 8  # batch sizes that formed
_EDGE = 0.25  # of a run, at its beginning and end, between which a queue is seen to grow
_GROWS = 2.0


@lru_cache(maxsize=4096)
def most_over(count: int) -> int:
    """Of `count` requests, so many may be beyond the limit where that is proven to be kept; −1: too few requests."""
    over = -1
    while over < count and at_most(over + 1, count, BEYOND) <= 1 - P99_CONFIDENCE:
        over += 1
    return over


@lru_cache(maxsize=4096)
def least_over(count: int) -> int:
    """Of `count` requests, so many beyond the limit prove that it is not kept."""
    over = max(math.floor(BEYOND * count), 0) + 1
    while at_most(over - 1, count, BEYOND) < P99_CONFIDENCE:
        over += 1
    return over


@dataclass(frozen=True)
class Point:
    """One rate. `proven`: whether the verdict is by the bound, at 95 %, or by the p99 that was seen (a search's short
    look). `over`: of `count` requests, not answered within the limit."""

    rate: float
    verdict: str
    proven: bool
    count: int
    over: int
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "rate": round(self.rate, 3),
            "verdict": self.verdict,
            "proven": self.proven,
            "requests": self.count,
            "over": self.over,
            **self.figures,
        }


def most_late_s(limit_s: float) -> float:
    return max(MOST_LATE * limit_s, LEAST_LATE_S)


def judged(run: Run, limit_s: float, planned: int, *, proven: bool, company: str | None = None) -> Point:
    """`planned`: counted requests of the whole schedule, by which the verdict goes where the run was cut short.
    `company`: what else the machine did meanwhile, where that was too much. Neither a late generator nor company makes
    an engine look faster: a limit that is kept all the same is kept."""
    over = int((run.latency > limit_s).sum())
    late = float(np.quantile(run.late, 0.99)) if run.count else 0.0
    count = planned if run.cut else run.count
    if proven:
        verdict = KEEPS if over <= most_over(count) and not run.cut else OPEN
        verdict = EXCEEDS if over >= least_over(count) else verdict
    else:
        verdict = KEEPS if over <= allowed(count) and not run.cut else EXCEEDS
    if verdict != KEEPS and company is not None:
        verdict = DISTURBED
    elif verdict != KEEPS and late > most_late_s(limit_s):
        verdict = LATE
    return Point(run.rate, verdict, proven, run.count, over, {**figures(run, limit_s), "company": company})


def allowed(count: int) -> int:
    """By the p99 that was seen."""
    return math.floor(BEYOND * count)


def figures(run: Run, limit_s: float) -> dict[str, Any]:
    """Of a run, in ms: JSON without NaN."""
    ok = run.latency[np.isfinite(run.latency)]
    bound = p99_bound(run.latency) if run.count >= P99_BOUND_SAMPLES else None
    lateness = {name: _ms(_quantile(run.late, q)) for name, q in (("p50_ms", 0.5), ("p99_ms", 0.99), ("max_ms", 1.0))}
    return {
        "p50_ms": _ms(_quantile(run.latency, 0.5)),
        "p90_ms": _ms(_quantile(run.latency, 0.9)),
        "p99_ms": _ms(_quantile(run.latency, 0.99)) if run.count >= 1 / BEYOND else None,
        "p99_bound_ms": _ms(bound),
        "within_limit": round(float((run.latency <= limit_s).mean()), 5) if run.count else None,
        "answered_per_second": _answered_rate(run, len(ok)),
        "ended": {status: run.ended(status) for status in STATUSES},
        "codes": dict(run.codes.most_common(_SHOWN)),
        "queue_mean_ms": _ms(run.seen.mean_queue_s),
        "compute_mean_ms": _ms(run.seen.mean_compute_s),
        "batches": _batches(run),
        "waiting": _waiting(run),
        "late": lateness,
        "cut": run.cut,
        "seconds": round(run.wall_s, 3),
        "cpu_us_per_request": round(1e6 * run.cpu_s / run.count, 1) if run.count else None,
    }


def _answered_rate(run: Run, answered: int) -> float | None:
    """Answers per second of schedule; for a run that was cut short it says nothing."""
    if run.cut or run.count < 2:
        return None
    return round(answered / float(run.due[-1] - run.due[0]) * (run.count - 1) / run.count, 3)


def _batches(run: Run) -> dict[str, float]:
    """Batches that formed, by their samples: shares of all batches, the most frequent."""
    whole = sum(run.seen.batches.values())
    most = run.seen.batches.most_common(_SHOWN)
    return {str(size): round(count / whole, 4) for size, count in sorted(most)}


def _waiting(run: Run) -> dict[str, Any]:
    """Requests under way: how many when one came, and whether they became more and more."""
    if run.count < 8:
        return {"mean": None, "most": None, "grows": None}
    edge = max(int(_EDGE * run.count), 1)
    early, late = float(run.waiting[edge : 2 * edge].mean()), float(run.waiting[-edge:].mean())
    grows = bool(late > _GROWS * max(early, 1.0))
    return {"mean": round(float(run.waiting.mean()), 2), "most": int(run.waiting.max()), "grows": grows}


def _quantile(values: Array, q: float) -> float | None:
    """Nearest rank; None where there is none, or it is not finite (it was not answered)."""
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return None
    value = float(known[max(math.ceil(q * len(known) - 1e-9), 1) - 1])
    return value if math.isfinite(value) else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else round(1e3 * seconds, 4)
