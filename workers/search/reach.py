"""Constraints that cannot be met any more, known before the full measurement: an engine's size once it is built, and
calls whose median is already over the limit of the 99th percentile. Pure.

A job in which nothing is left within reach ends at once with the nearest miss; that is another thing than a budget that
was too small to find something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.domain.spec import Constraints
from workers.pipeline.checks import Check


def over_size(constraints: Constraints, size_bytes: int) -> Check | None:
    """The miss of a file of this size; None where it is allowed."""
    limit, size_mb = constraints.max_size_mb, size_bytes / 1e6
    if limit is None or size_mb <= limit:
        return None
    return Check("size_mb", size_mb, limit, False, f"size_mb {size_mb:.3f} over the limit of {limit}")


def out_of_reach(
    constraints: Constraints, figures: Mapping[str, Any] | None, batch: int, gain: float = 1.0
) -> Check | None:
    """The miss that a short timing shows beyond doubt; None where the limits may hold. `figures`: of one engine.
    `gain`: what other runtime options may still bring, at most.

    Even its fastest call has to be over the limit: on a busy machine all the others may be."""
    at = ((figures or {}).get("batches") or {}).get(str(batch)) or {}
    typical, fastest = at.get("p50_ms") or at.get("mean_ms"), at.get("min_ms")
    if not typical or not fastest:
        return None
    limit = constraints.p99_latency_ms
    if limit is not None and min(fastest, typical / gain) > limit:
        reason = f"p50 of {typical:.3f} ms is already over the p99 limit of {limit} ms"
        return Check("p99_latency_ms", typical, limit, False, reason, at_least=True)
    wanted = constraints.min_throughput_qps
    best = max(batch * 1e3 / fastest, gain * batch * 1e3 / typical)
    if wanted is not None and best < wanted:
        reason = f"{best:.1f} samples/s at the best, wanted {wanted}"
        return Check("throughput_qps", best, wanted, False, reason)
    return None
