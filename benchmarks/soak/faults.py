"""Draws the faults of the soak, by seed, one after the other: every kind comes again and again."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.soak.recoveries import Recoveries
from benchmarks.soak.strikes import Strike
from tests.factories.every_stage import ROUTE_OF

# How often of each ten times: those that take long come less often.
_OFTEN = {
    "Redis gone for a minute": 5,
    **{f"worker killed in {stage}": 4 for stage in ROUTE_OF if stage not in ROUTE_OF["export"].stages},
}
_LEAST_PAUSE_S = 0.5


@dataclass
class Injector:
    """`over`: ends it early. `story`: what was struck when."""

    kinds: Mapping[str, Strike]
    recoveries: Recoveries
    draw: random.Random
    over: threading.Event = field(default_factory=threading.Event)
    done: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    in_vain: Counter[str] = field(default_factory=Counter)
    story: list[str] = field(default_factory=list)
    now: str = ""  # what it is at

    def run(self, until: float, count: int, latest: float) -> None:
        """So many faults, evenly until then; where they take longer, what is left after it as fast as they go, until
        `latest`. Times are `time.monotonic()`."""
        deck: list[str] = []
        while not self.over.is_set() and time.monotonic() < latest and (left := count - self.done.total()) > 0:
            due = time.monotonic() + max((until - time.monotonic()) / left, _LEAST_PAUSE_S)
            deck = deck or self._deck()
            self._strike(deck.pop(), due)
            self.over.wait(max(min(due, latest) - time.monotonic(), _LEAST_PAUSE_S))
        self.now = ""

    def _deck(self) -> list[str]:
        """All kinds in any order; those that came least often before come last in it, and are drawn first."""
        kinds = [kind for kind in sorted(self.kinds) if self.draw.random() < _OFTEN.get(kind, 10) / 10]
        self.draw.shuffle(kinds)
        return sorted(kinds, key=lambda kind: -self.done[kind])

    def _strike(self, kind: str, due: float) -> None:
        self.now = kind
        try:
            struck = self.kinds[kind]()
        except Exception as error:  # what strikes must not fall itself: the fault does not count, and is told
            self._not_made(kind, error)
            return
        if struck is None:
            self.in_vain[kind] += 1
            return
        kind = struck.kind or kind
        self.done[kind] += 1
        self.story.append(f"{time.strftime('%H:%M:%S', time.gmtime())} {kind}")
        watch = self.recoveries.watch(kind, struck)
        try:
            struck.rest()
        except Exception as error:
            self._not_made(f"{kind}, its end", error)
        # What comes before it is over is the harder, and disturbs its figure: so not everything at once.
        watch.join(max(due - time.monotonic(), 2.0))

    def _not_made(self, what: str, error: Exception) -> None:
        self.failed.append(f"{what}: {type(error).__name__}: {error}")
        print(f"  a fault could not be made: {self.failed[-1][:300]}", flush=True)
