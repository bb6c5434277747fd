"""What a job wants to be fast at: the batch size that counts, and the ratio that is looked at. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.domain.spec import OptimizationSpec

BASELINE = "baseline"  # the id of the original among the engines of a timing
TIE = 0.95  # of the fastest, from which on what cannot be told from it at one batch size is decided by the others


def primary_batch(spec: OptimizationSpec, measured: Sequence[str]) -> str:
    """The batch size that the objective is judged at: the first one asked for, or the largest for throughput."""
    if spec.objective == "latency":
        return next((str(b) for b in spec.benchmark.batch_sizes if str(b) in measured), measured[0])
    return max(measured, key=int)


def ratio_of(spec: OptimizationSpec, at: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The gain over the original with its interval, as the objective judges it; None where there is none. `at`: an
    engine's figures at one batch size or shape."""
    ratio: Mapping[str, Any] | None = at.get("speedup" if spec.objective == "latency" else "throughput_ratio")
    return ratio
