"""How far each candidate came, for who watches the job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.search.state import CandidateState, SearchState


def standing_of(found: CandidateState) -> dict[str, Any]:
    """One candidate: `speedup` of the short timing, `loss_percent` of the last check; None before there was one."""
    speed = found.speed
    return {
        "candidate": found.plan.id,
        "name": found.plan.name,
        "backend": found.plan.backend,
        "precision": found.plan.precision,
        "standing": found.standing.value,
        "speedup": None if speed is None else {"ratio": speed.ratio, "low": speed.low, "high": speed.high},
        "loss_percent": found.loss.get("loss_percent"),
        "reason": found.refused,
    }


def leader(state: SearchState) -> str | None:
    """The fastest that is still in and known to be faster than the original; None where there is none."""
    ahead = [(c.speed.ratio, cid) for cid, c in state.candidates.items() if c.alive and c.speed and c.kept is not False]
    best = max(ahead, default=None)
    return best[1] if best is not None and best[0] > 1.0 else None


class Standings:
    """What changed since it was last asked."""

    def __init__(self) -> None:
        self._told: dict[str, Mapping[str, Any]] = {}
        self._leader: str | None = None

    def news(self, state: SearchState) -> dict[str, Any] | None:
        """{candidates: those that are new or stand elsewhere now, leader: an id or None}; None without any news."""
        now = {cid: standing_of(found) for cid, found in state.candidates.items()}
        changed = [told for cid, told in now.items() if self._told.get(cid) != told]
        ahead = leader(state)
        if not changed and ahead == self._leader:
            return None
        self._told, self._leader = dict(now), ahead
        return {"candidates": changed, "leader": ahead}
