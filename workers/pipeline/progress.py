"""How far a job is, for who waits: a fraction that never runs backwards, and when it will probably end.

A job's work is not known before it is done (an engine that loses accuracy is mended, a gain that noise hides is
measured again). So each phase has a fixed share of the whole, and what is done beyond a phase's plan moves it ever more
slowly towards the phase's end, never past it.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta

from app.db.base import utcnow
from workers.pipeline.budget import Budget

PHASES = (("export", 0.05), ("search", 0.5), ("final", 0.25), ("package", 0.03), ("explain", 0.17))
_MOST = 0.99  # the end itself is told with the result
_STRAIGHT = 0.7  # of a phase: its plan is believed so far
_TOO_EARLY = 0.05  # before which the pace says nothing of the end


class JobProgress:
    """Of one attempt at a job. `floor`: how far the attempt before it came. `budget`: what bounds the end."""

    def __init__(self, budget: Budget | None = None, floor: float = 0.0) -> None:
        self._budget = budget
        self._last = floor
        self._phase = PHASES[0][0]
        self._planned, self._done = 1.0, 0.0

    def enter(self, phase: str, planned: float) -> None:
        """`planned`: the weights of the stage calls that this phase is expected to make, in all."""
        self._phase, self._planned, self._done = phase, max(planned, 1e-9), 0.0

    def done(self, weight: float) -> None:
        self._done += weight

    def at(self, fraction: float = 0.0, weight: float = 0.0) -> float:
        """How far the job is, 0…0.99, with `fraction` of a call of `weight` done beside what is done."""
        before = 0.0
        for name, share in PHASES:
            if name == self._phase:
                before += share * _bent((self._done + fraction * weight) / self._planned)
                break
            before += share
        self._last = max(self._last, round(min(before, _MOST), 4))
        return self._last

    def expected_end(self) -> datetime | None:
        """By the pace so far; at the latest, when the budget ends. None without a budget."""
        if self._budget is None:
            return None
        left = self._budget.left(self._budget.seconds)
        if self._last > _TOO_EARLY:
            left = min(left, self._budget.elapsed() * (1 - self._last) / self._last)
        return utcnow() + timedelta(seconds=left)


def _bent(x: float) -> float:
    """`x` as it is at first, then ever nearer to 1."""
    if x <= _STRAIGHT:
        return max(x, 0.0)
    rest = 1 - _STRAIGHT
    return _STRAIGHT + rest * (1 - math.exp(-(x - _STRAIGHT) / rest))
