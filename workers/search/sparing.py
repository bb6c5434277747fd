"""Which finalists need no full measurement, once the fastest is confirmed. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workers.pipeline.checks import accuracy_checks
from workers.search import halving
from workers.search.limits import CLEARLY_FASTER
from workers.search.objective import ratio_of
from workers.search.state import CandidateState, Facts


def spared(
    facts: Facts,
    leader: CandidateState,
    confirmed: Mapping[str, Any] | None,
    others: Sequence[CandidateState],
) -> dict[str, str]:
    """Ids of those of `others` that cannot win where the leader ships, and why; and it will: it keeps the limit on the
    samples that nobody chose by (`confirmed`), and was clearly faster at every batch size. A safe finalist is there for
    a leader that fails, and so is what was mended of it; most fail by their accuracy, which is known before anything is
    timed in full.

    Nobody is spared where only the full measurement tells: of other shapes, and of limits on p99, throughput or memory.
    """
    spec, limits = facts.spec, facts.spec.constraints
    limited = (limits.p99_latency_ms, limits.min_throughput_qps, limits.max_memory_mb)
    if facts.free_axes or any(limit is not None for limit in limited) or leader.speed is None:
        return {}
    plan = leader.plan
    if not all(c.passed for c in accuracy_checks(spec, confirmed, lossless=plan.lossless, narrows=plan.narrows)):
        return {}
    low = leader.speed.low
    if low < CLEARLY_FASTER or not _faster_everywhere(facts, leader.figures or {}):
        return {}
    found = {}
    for other in others:
        if other.speed is None:
            continue
        if not halving.can_win(other.speed, low):
            found[other.plan.id] = f"it cannot reach {plan.name}"
        elif _origin(other) == _origin(leader) and other.speed.low <= leader.speed.ratio:
            found[other.plan.id] = f"it is there in case {plan.name} loses too much"
    return found


def _origin(candidate: CandidateState) -> str:
    """The engine that it was mended from, or loads with other options; else itself."""
    return candidate.base or candidate.of or candidate.plan.id


def _faster_everywhere(facts: Facts, figures: Mapping[str, Any]) -> bool:
    at = [ratio_of(facts.spec, found) for found in figures.get("batches", {}).values()]
    return len(at) >= len(facts.batch_sizes) and all(r is not None and r["low"] >= 1.0 for r in at)
