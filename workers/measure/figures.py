"""From raw latencies to the figures of a report. Every number is finite, or null with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.measure.rounds import Timing
from workers.measure.stats import Interval, percentiles, ratio_of_means, ratio_of_medians

NS_PER_MS = 1e6


def rounded(value: float | None) -> float | None:
    """Six significant digits."""
    return None if value is None else float(f"{value:.6g}")


def latency_figures(timing: Timing, batch: int) -> dict[str, Any]:
    """Latencies in ms, throughput in samples per second (batch / mean latency, one caller)."""
    samples = timing.all()
    values, reasons = percentiles(samples, NS_PER_MS)
    if timing.p99_refused and "p99" in reasons:
        reasons["p99"] += f": {timing.p99_refused}"
    mean = float(samples.mean())
    return {
        "samples": len(samples),
        "rounds": len(timing.rounds),
        "mean_ms": rounded(mean / NS_PER_MS),
        **{f"{name}_ms": rounded(value) for name, value in values.items()},
        "min_ms": rounded(float(samples.min()) / NS_PER_MS),
        "max_ms": rounded(float(samples.max()) / NS_PER_MS),
        "reasons": {f"{name}_ms": reason for name, reason in reasons.items()},
        "throughput_qps": rounded(batch * 1e9 / mean),
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
    from process to process (memory layout, say) does not pass for a gain.
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


def a_a(baseline: Timing, again: Timing, seed: int) -> AA:
    medians = ratio_of_medians(baseline.rounds, again.rounds, seed)
    return AA(medians, ratio_of_means(baseline.rounds, again.rounds, seed))
