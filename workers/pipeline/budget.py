"""The job's time: what is left, and how it is shared between searching, measuring what is left, and explaining it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

_GRACE = 0.05  # of the budget, by which a stage call that does not stop by itself may be late before it is ended
_BORROWED = 0.25
_LEAST_CALL_S = 1.0
_PACKAGE_S = 2.0  # with the report; more for large engines
_BYTES_PER_S = 200e6  # at which a large engine is hashed, packed and stored, about
_SEARCH_SHARE = 0.5  # of what is left after the export
_FINAL_SHARE = 0.75  # of what is left after the search; the rest explains the pick (ablation, deployment)
_JUDGE_SHARE = 0.25  # of the final measurement, at least, for the accuracy on all samples
LEAST_EXPLAINED_S = 3.0  # what explains is not begun in less: then the final measurement may have it
_TRAFFIC_SHARE = 0.35  # of the budget beyond what any job needs, kept for the traffic where a job tells one
_TRAFFIC_BEYOND_S = 30.0
_MOST_TRAFFIC_S = 300.0
_LEAST_SEARCH = 0.3  # of what is left when the first timings are known
_MOST_SEARCH = 0.5  # likewise, where the final measurement turns out to be short
_MAKE_SHARE = 0.6  # of the search: building candidates; the rest times and mends them


@dataclass
class Budget:
    """`seconds` from the moment it is made, less what was `spent` before it. Phases are points in time, in seconds
    since then."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    reserve: float = _PACKAGE_S
    spent: float = 0.0
    kept: float = 0.0  # seconds at the end that are for something else (`keep_for_traffic`)
    _started: float = field(init=False)
    make_until: float = field(init=False, default=0.0)
    search_until: float = field(init=False, default=0.0)
    final_seconds: float = field(init=False, default=0.0)  # that the final benchmark takes, as far as it is known

    def __post_init__(self) -> None:
        self._started = self.clock() - self.spent
        self.share(0.0, 0)

    def share(self, fixed: float, engine_bytes: int) -> None:
        """Share out what is left from now. `fixed`: what the final measurement takes by itself, as asked by the user;
        the search gets what that leaves, but no less than its share."""
        self.reserve = _PACKAGE_S + engine_bytes / _BYTES_PER_S
        now = self.elapsed()
        left = max(self.end - now, 0.0)
        search = max(_SEARCH_SHARE * left, left - fixed / _FINAL_SHARE)
        self.search_until = now + search
        self.make_until = now + _MAKE_SHARE * search

    def keep_for_traffic(self) -> None:
        """Let all phases end earlier, until `give_back`. A small budget keeps nothing, nor does one of which an attempt
        that was lost has left little: what proves the engine comes first."""
        left = self.seconds - self.elapsed()
        self.kept = min(_TRAFFIC_SHARE * max(left - _TRAFFIC_BEYOND_S, 0.0), _MOST_TRAFFIC_S)
        self.share(0.0, 0)

    def give_back(self) -> None:
        """What was kept is there to be used."""
        self.kept = 0.0

    def keep_for_final(self, seconds: float) -> None:
        """Let the search end so early that a final measurement of `seconds` fits; once it is known how long that
        takes."""
        self.final_seconds = seconds
        self.search_until = search_end(self.elapsed(), self.end, self.search_until, seconds)

    def elapsed(self) -> float:
        return self.clock() - self._started

    @property
    def end(self) -> float:
        """When all but the package has to be done."""
        return self.seconds - self.reserve - self.kept

    def final_until(self) -> float:
        """The end of the final measurement, seen from now: what proves comes before what explains."""
        now = self.elapsed()
        left = max(self.end - now, 0.0)
        final = min(left, max(_FINAL_SHARE * left, self.final_seconds / (1 - _JUDGE_SHARE)))
        return now + (final if left - final >= LEAST_EXPLAINED_S else left)

    def judged_until(self) -> float:
        """The end of the accuracy on all samples, which comes before the final benchmark: it may take what that does
        not need, and a part in any case."""
        now, left = self.elapsed(), self.left(self.final_until())
        return now + max(_JUDGE_SHARE * left, left - self.final_seconds)

    def left(self, until: float) -> float:
        """Seconds until that point; never negative."""
        return max(until - self.elapsed(), 0.0)

    def over(self, until: float) -> bool:
        return self.elapsed() >= until

    def limits(self, until: float) -> tuple[float, float]:
        """(soft, hard) seconds of a stage call that should be done by `until`: asked to stop, and ended. Who comes
        early in the job may be later, by a part of what lies behind it; who comes last, by a twentieth of it all."""
        soft = max(self.left(until), _LEAST_CALL_S)
        late = max(_GRACE * self.seconds, _LEAST_CALL_S) + _BORROWED * max(self.end - until, 0.0)
        return soft, soft + late


def search_end(now: float, end: float, until: float, seconds: float) -> float:
    """When the search that was to go on until `until` ends, so that a final measurement of `seconds` fits before `end`.
    A part of what is left stays the search's, for without a checked candidate there is nothing to measure. Where the
    final takes less than was thought, a search that still goes on gets of it, up to half of what is left."""
    left = max(end - now, 0.0)
    fits = end - seconds / _FINAL_SHARE
    found = min(until, max(fits, now + _LEAST_SEARCH * left))
    return max(found, min(fits, now + _MOST_SEARCH * left)) if now < found else found
