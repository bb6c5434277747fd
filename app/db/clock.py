"""What time it is, by the clock that all processes of an installation share: the database's.

Leases, pauses and graces are read by other processes, on other machines, than those that wrote them. Where a machine's
clock is minutes off, its worker would take everybody's jobs for abandoned, or others would take its own. So every
process measures, on connections that it has anyway, how far the database's clock is from a clock of its own that is
never set (Marzullo: each answer bounds the distance by when it was asked for and when it came; what several answers
agree on is kept). A machine whose clock is right goes on by its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime

EVERY_S = 15.0  # between measurements
_SLACK_S = 0.5  # a clock that differs by less is right
_DRIFT = 2e-4  # seconds a second, at most, between two machines' clocks that run freely


def _elapsed() -> float:
    """Seconds of a clock that is never set, and goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _own() -> float:
    """What this machine takes for the time, seconds since the epoch."""
    return time.time()


@dataclass(frozen=True)
class _Known:
    """The database's clock less this process's `_elapsed()` is from `low` to `high`, seconds, as measured `at`."""

    low: float
    high: float
    at: float


class SharedClock:
    """`learn` and `now` from any thread."""

    def __init__(self) -> None:
        self._known: _Known | None = None

    @staticmethod
    def reading() -> float:
        """To be taken before the database is asked, and after it has answered."""
        return _elapsed()

    def due(self) -> bool:
        """Whether it is time for another measurement."""
        known = self._known
        return known is None or _elapsed() - known.at > EVERY_S

    def learn(self, theirs: datetime, asked: float, answered: float) -> None:
        """The database said it was `theirs` somewhen between these two readings."""
        seconds = theirs.timestamp()
        low, high, known = seconds - answered, seconds - asked, self._known
        if known is not None:
            room = _DRIFT * max(answered - known.at, 0.0)
            both = max(low, known.low - room), min(high, known.high + room)
            if both[0] <= both[1]:  # else the database's clock was set, or it is another database
                low, high = both
        self._known = _Known(low, high, answered)

    def now(self) -> float:
        """Seconds since the epoch."""
        own, known = _own(), self._known
        if known is None:
            return own
        elapsed = _elapsed()
        if elapsed + known.low - _SLACK_S <= own <= elapsed + known.high + _SLACK_S:
            return own
        return elapsed + (known.low + known.high) / 2

    def off_by(self) -> float:
        """Seconds by which this machine's clock is ahead of the shared one; 0 where it is right."""
        return _own() - self.now()


CLOCK = SharedClock()
