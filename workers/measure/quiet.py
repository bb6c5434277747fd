"""Waiting for a quiet machine: a bounded while, by doing nothing and looking who else computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from workers.measure.disturbance import MOST_OTHERS, Reading, usual_cores

PATIENCE_S = 30.0  # of one benchmark, at most
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 2.0


class Quiet:
    """`patience`: seconds that may be waited in all: as many as the measuring itself takes, up to `PATIENCE_S`.
    `waited`: those that were."""

    def __init__(self, told: Callable[[], None] = lambda: None, cpus: Collection[int] | None = None) -> None:
        """`told` is called again and again while it waits. `cpus`: the cores that count, by default all usable ones."""
        self.patience = self.waited = 0.0
        self._told = told
        self._cpus = usual_cores() if cpus is None else frozenset(cpus)

    def grant(self, seconds: float) -> None:
        """For a measurement that takes so many seconds where the machine is quiet."""
        self.patience = min(PATIENCE_S, self.patience + seconds)

    def wait(self, most: float) -> bool:
        """For at most so many seconds, until nobody else computes; whether it came to that. At once False where there
        is no patience left, or no time. The pauses between two looks grow."""
        begun = time.monotonic()
        until = begun + min(most, self.patience - self.waited)
        pause, quiet = _FIRST_PAUSE_S, False
        while not quiet and until - time.monotonic() >= _FIRST_PAUSE_S:
            self._told()
            before = Reading.now(self._cpus)
            time.sleep(min(pause, until - time.monotonic()))
            quiet = before.until(Reading.now(self._cpus)).others_share <= MOST_OTHERS
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        self.waited += time.monotonic() - begun
        return quiet
