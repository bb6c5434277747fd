"""What of a search is told to who waits for the job: candidates whose story went on, and who leads. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.search import halving
from workers.search.state import CandidateState, Facts, SearchState

_TOLD = ("phase", "decision", "reason", "ratio", "low", "high", "loss_percent", "samples")
_PLANNED: Mapping[str, Any] = {"phase": "plan", "decision": "planned"}


def news(facts: Facts, state: SearchState, told: Mapping[str, int]) -> dict[str, Any] | None:
    """The event's data; None where nothing is new. `told`: how many decisions of each candidate were told already.

    `candidates`: {id, name, backend, precision, and of the last decision phase, decision, reason, ratio with low and
    high, loss_percent, samples}. `leader`: the fastest so far of those that keep the limit as far as the search
    knows, {id, name, ratio, low, high, checked}; None where none is faster than the original. By short timings: the
    full measurement decides."""
    changed = [c for cid, c in state.candidates.items() if len(c.history) > told.get(cid, -1)]
    if not changed:
        return None
    return {"candidates": [_told(found) for found in changed], "leader": _leader(facts, state)}


def _told(found: CandidateState) -> dict[str, Any]:
    last, plan = found.history[-1] if found.history else _PLANNED, found.plan
    who = {"id": plan.id, "name": plan.name, "backend": plan.backend, "precision": plan.precision}
    return who | {name: last[name] for name in _TOLD if last.get(name) is not None}


def _leader(facts: Facts, state: SearchState) -> dict[str, Any] | None:
    """Who was found accurate comes before who was not looked at yet."""

    def fits(found: CandidateState) -> bool:
        return found.alive and found.speed is not None and found.speed.ratio > 1.0

    checked = [
        state.candidates[cid]
        for cid in state.accurate
        if fits(state.candidates[cid]) and not halving.over_limit(facts.spec, state.candidates[cid].loss)
    ]
    timed = checked or [found for found in state.candidates.values() if fits(found)]
    best = max(timed, key=lambda found: found.speed.ratio if found.speed else 0.0, default=None)
    if best is None or best.speed is None:
        return None
    speed = {name: round(getattr(best.speed, name), 4) for name in ("ratio", "low", "high")}
    return {"id": best.plan.id, "name": best.plan.name, **speed, "checked": bool(checked)}
