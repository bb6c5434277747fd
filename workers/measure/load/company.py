"""What else the machine did while a server was under load: its processes and the generator share the cores, so the
threads' waiting says nothing (`measure.disturbance`); what others computed, and what was stolen, does."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil

from workers.measure.disturbance import (
    LEAST_TICKS,
    MOST_OTHERS,
    MOST_STOLEN,
    TICKS_PER_S,
    Disturbance,
    Reading,
    usual_cores,
)


@dataclass(frozen=True)
class Company:
    """The kernel's counters at one moment. `own_s`: CPU time of this process and all below it."""

    reading: Reading
    own_s: float

    @classmethod
    def now(cls) -> Company:
        return cls(Reading.now(usual_cores()), _own_s())

    def until_now(self) -> str | None:
        """What the machine did beside, in words, where it was too much to judge by."""
        later = Company.now()
        seen = self.reading.until(later.reading)
        own = max(later.own_s - self.own_s, 0.0)
        return too_much(Disturbance(seen.seconds, seen.cores, None, seen.stolen, own, seen.busy))


def too_much(seen: Disturbance) -> str | None:
    """By the limits of every measurement."""
    least = LEAST_TICKS / TICKS_PER_S
    if (seen.stolen or 0.0) >= least and seen.stolen_share > MOST_STOLEN:
        return f"{100 * seen.stolen_share:.0f} % of the cores' time was stolen from this virtual machine"
    if (seen.others or 0.0) >= least and seen.others_share > MOST_OTHERS:
        return f"other processes took {100 * seen.others_share:.0f} % of the cores' time"
    return None


def _own_s() -> float:
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total
