"""The winner of a sweep, measured again: the largest of many short windows flatters, fresh ones do not. Pure but for
the windows that it is handed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from workers.measure.figures import rounded
from workers.measure.instances import Driven
from workers.measure.stats import mean_interval

WINDOWS = 6
_LEAST = 3  # undisturbed windows that an interval needs
_MOST = 2 * WINDOWS


def again(batch: int, window: Callable[[], Driven], seconds_left: Callable[[], float]) -> dict[str, Any]:
    """{throughput_qps, low, high, p50_ms, windows, disturbed_windows, reason} of `WINDOWS` fresh windows, the 95 %
    interval by Student's t over them. A window that had company is taken again, as long as the time holds that; with
    too few that had none the interval is None, and `reason` says so."""
    clean: list[Driven] = []
    disturbed: list[Driven] = []
    for _ in range(_MOST):
        expected = clean[0].seconds if clean else 0.0
        if len(clean) >= WINDOWS or seconds_left() < expected:
            break
        driven = window()
        (clean if driven.disturbance.disturbed is None else disturbed).append(driven)
    used = clean if len(clean) >= _LEAST else [*clean, *disturbed]
    if not used:
        return _nothing("the time left did not hold it")
    rates = [batch * d.calls_per_s for d in used]
    latencies = np.concatenate([d.latencies for d in used])
    found: dict[str, Any] = {
        "throughput_qps": rounded(math.fsum(rates) / len(rates)),
        "low": None,
        "high": None,
        "p50_ms": rounded(float(np.median(latencies)) / 1e6),
        "windows": len(used),
        "disturbed_windows": len(disturbed),
        "reason": None,
    }
    if used is not clean:
        return {**found, "reason": f"{len(clean)} of {len(used)} windows were undisturbed, {_LEAST} are needed"}
    interval = mean_interval(rates)
    return {**found, "low": rounded(max(0.0, interval.low)), "high": rounded(interval.high)}


def _nothing(reason: str) -> dict[str, Any]:
    return {**dict.fromkeys(("throughput_qps", "low", "high", "p50_ms")), "windows": 0, "reason": reason}


def throughput_of(configuration: Mapping[str, Any]) -> tuple[float, list[float] | None, str]:
    """(samples per second, their interval, how they were measured) of the chosen configuration of a sweep."""
    again = configuration.get("again") or {}
    if again.get("low") is None:
        why = again.get("reason") or "it was not measured again"
        return configuration["throughput_qps"], None, f"of the windows that it was chosen by, which flatters: {why}"
    words = (
        f"of {again['windows']} fresh windows after the choice, 95 % interval; in those that it was chosen by it had "
        f"{configuration['throughput_qps']:.4g}, and the best of many flatters"
    )
    return again["throughput_qps"], [again["low"], again["high"]], words
