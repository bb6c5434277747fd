"""From raw latencies to the figures of a report. Every number is finite, or null with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from workers.measure.rounds import Timing
from workers.measure.stats import (
    P99_BOUND_SAMPLES,
    Interval,
    holds_one,
    p99_bound,
    percentiles,
    ratio_of_means,
    ratio_of_medians,
)

Array = np.ndarray[Any, Any]

NS_PER_MS = 1e6
_WIDE = 1.25  # high over low of an A/A interval, beyond which it says next to nothing


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
        "rounds": len(timing.rounds),
        "throughput_qps": rounded(batch * 1e9 / float(samples.mean())),
        "not_finite": timing.not_finite,
        "warm_up": {
            "iterations": timing.warm_up.iterations,
            "seconds": rounded(timing.warm_up.seconds),
            "settled": timing.warm_up.settled,
        },
    }


def comparison(baseline: Timing, again: Timing, engine: Timing, seed: int) -> dict[str, dict[str, float]]:
    """`speedup` (baseline p50 / engine p50) and `throughput_ratio` (engine / baseline).

    The estimate is against the first baseline process; the interval covers those against both, so that what differs
    from process to process (memory layout, say) does not pass for a gain. Any engine that was measured in two
    processes can stand for the baseline.
    """
    found = {}
    for name, ratio in (("speedup", ratio_of_medians), ("throughput_ratio", ratio_of_means)):
        first = ratio(baseline.rounds, engine.rounds, seed)
        found[name] = first.hull(ratio(again.rounds, engine.rounds, seed)).to_json()
    return found


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

    def noise(self, batch: int) -> list[str]:
        """Why a run with this A/A is noisy; empty where it is not."""
        found = []
        p50, mean = self.p50, self.throughput
        if not holds_one(p50):
            found.append(
                f"batch {batch}: the baseline against itself is {p50.ratio:.3f} "
                f"[{p50.low:.3f}, {p50.high:.3f}], which does not hold 1.0"
            )
        elif p50.high > p50.low * _WIDE:
            found.append(
                f"batch {batch}: the baseline against itself is anywhere in [{p50.low:.3f}, {p50.high:.3f}]: "
                "small gains cannot be told from noise"
            )
        if not holds_one(mean):
            found.append(
                f"batch {batch}: the throughput of the baseline against itself is {mean.ratio:.3f} "
                f"[{mean.low:.3f}, {mean.high:.3f}], which does not hold 1.0"
            )
        return found


def a_a(baseline: Timing, again: Timing, seed: int) -> AA:
    medians = ratio_of_medians(baseline.rounds, again.rounds, seed)
    return AA(medians, ratio_of_means(baseline.rounds, again.rounds, seed))
