"""From raw latencies to the figures of a report. Every number is finite, or null with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from app.domain.failures import StageFailure
from workers.artifacts import names_in
from workers.measure.rounds import Timing, counting
from workers.measure.stats import (
    P99_BOUND_SAMPLES,
    Interval,
    p99_bound,
    percentiles,
    ratio_of_means,
    ratio_of_medians,
)

Array = np.ndarray[Any, Any]

NS_PER_MS = 1e6
# By which one process of an engine may differ from the next, at 95 %: the original against itself scatters by 1.6 % on
# a quiet machine, so one process by 1.1 %. No number of rounds in one process can show it.
PROCESSES_DIFFER = 1.02
ONE_FROM_ANOTHER = PROCESSES_DIFFER ** math.sqrt(2)  # where either side is one process


def rounded(value: float | None) -> float | None:
    """Six significant digits."""
    return None if value is None else float(f"{value:.6g}")


def distribution(samples: Array, p99_refused: str | None = None) -> dict[str, Any]:
    """Of latencies in ns: samples, mean_ms, the percentiles that so many samples carry, p99_bound_ms (see `p99_bound`),
    min_ms, max_ms, and why one is missing. `p99_refused`: why the p99 was not gone for, though it was wanted."""
    values, reasons = percentiles(samples, NS_PER_MS)
    bound = p99_bound(samples, NS_PER_MS)
    if bound is None:
        reasons["p99_bound"] = f"{len(samples)} samples; {P99_BOUND_SAMPLES} are needed to bound the p99 at 95 %"
    for name in {"p99", "p99_bound"} & set(reasons if p99_refused else ()):
        reasons[name] += f": {p99_refused}"
    return {
        "samples": len(samples),
        "mean_ms": rounded(float(samples.mean()) / NS_PER_MS),
        **{f"{name}_ms": rounded(value) for name, value in values.items()},
        "p99_bound_ms": rounded(bound),
        "min_ms": rounded(float(samples.min()) / NS_PER_MS),
        "max_ms": rounded(float(samples.max()) / NS_PER_MS),
        "reasons": {f"{name}_ms": reason for name, reason in reasons.items()},
    }


def latency_figures(timing: Timing, batch: int, *, screening: bool = False) -> dict[str, Any]:
    """Latencies in ms, throughput in samples per second (batch / mean latency, one caller). A screening shows no
    percentile beyond the median: its windows are too short to speak of tails."""
    samples = timing.all()
    figures = distribution(samples, timing.p99_refused)
    if screening:
        for name in ("p90_ms", "p95_ms", "p99_ms", "p99_bound_ms", "p999_ms"):
            figures[name] = None
            figures["reasons"][name] = "a screening shows no tails"
    return {
        **figures,
        "rounds": len(counting(timing)[0]),
        "disturbed_rounds": len(timing.disturbed),
        "throughput_qps": rounded(batch * 1e9 / float(samples.mean())),
        "not_finite": timing.not_finite,
        "warm_up": {
            "iterations": timing.warm_up.iterations,
            "seconds": rounded(timing.warm_up.seconds),
            "settled": timing.warm_up.settled,
        },
    }


def comparison(baseline: Timing, again: Timing, engine: Timing, seed: int) -> dict[str, Any]:
    """`speedup` (baseline p50 / engine p50) and `throughput_ratio` (engine / baseline), over the rounds in which none
    of the processes compared had company; `undisturbed` is False where these are too few, and all rounds were taken.

    The estimate is against the first baseline process; the interval covers those against both, so that what differs
    from process to process (memory layout, say) does not pass for a gain; for the engine itself, which runs in one, it
    is widened by what processes differ by. Any engine measured in two processes can stand for the baseline.
    """
    rounds, enough = counting(baseline, again, engine)
    one, two, mine = ([side.rounds[i] for i in rounds] for side in (baseline, again, engine))
    found: dict[str, Any] = {"undisturbed": enough}
    for name, ratio in (("speedup", ratio_of_medians), ("throughput_ratio", ratio_of_means)):
        first = ratio(one, mine, seed)
        found[name] = first.hull(ratio(two, mine, seed)).widened(PROCESSES_DIFFER).to_json()
    return found


def beside(other: Timing, engine: Timing, seed: int) -> dict[str, Any]:
    """`speedup` and `throughput_ratio` of an engine over another one, one process each, by the rounds that both had to
    themselves; `undisturbed` as in `comparison`. What made a round slow made it slow for both: that is much more
    certain than what their gains over a third one tell."""
    rounds, enough = counting(other, engine)
    theirs, mine = ([side.rounds[i] for i in rounds] for side in (other, engine))
    ratios = {"speedup": ratio_of_medians, "throughput_ratio": ratio_of_means}
    found = {name: ratio(theirs, mine, seed).widened(ONE_FROM_ANOTHER).to_json() for name, ratio in ratios.items()}
    return {"undisturbed": enough, **found}


def itself() -> dict[str, dict[str, float]]:
    """The baseline compared with itself: one by definition; what was measured of it is the A/A."""
    one = Interval(1.0, 1.0, 1.0).to_json()
    return {"speedup": one, "throughput_ratio": dict(one)}


@dataclass(frozen=True)
class AA:
    """The baseline against itself, in two processes: what no engine's gain may hide in, for each kind of gain."""

    p50: Interval
    throughput: Interval

    def to_json(self) -> dict[str, Any]:
        """{ratio, low, high} of the medians, and the same of the means under `throughput`."""
        return {**self.p50.to_json(), "throughput": self.throughput.to_json()}


def a_a(baseline: Timing, again: Timing, seed: int) -> AA:
    rounds, _ = counting(baseline, again)
    one, two = ([side.rounds[i] for i in rounds] for side in (baseline, again))
    return AA(ratio_of_medians(one, two, seed), ratio_of_means(one, two, seed))


@dataclass
class EngineFigures:
    """What is known of one engine so far."""

    data: dict[str, Any]
    batches: dict[str, Any] = field(default_factory=dict)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    failed: StageFailure | None = None

    @classmethod
    def start(cls, folder: Path, cold: bool) -> EngineFigures:
        unknown = dict.fromkeys(("cold_start_ms", "load_ms", "first_inference_ms", "peak_memory_mb", "gpu_memory_mb"))
        size = sum((folder / name).stat().st_size for name in names_in(folder))
        why = {} if cold else {"reasons": dict.fromkeys(unknown, "not measured: it was not asked for")}
        return cls({**unknown, "size_bytes": size, **why})

    def to_json(self) -> dict[str, Any]:
        failed = {} if self.failed is None else {"failed": self.failed.to_json()}
        shapes = {"shapes": self.shapes} if self.shapes else {}
        return {"batches": self.batches, **shapes, **self.data, **failed}
