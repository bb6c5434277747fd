"""What else ran while an engine was timed, as the kernel tells it: a window that had company is not counted.

Bootstrap and A/A see chance, not company: beside other work intervals are narrow and wrong. Linux counts how long each
thread waited for a core (`/proc/PID/task/*/schedstat`, second field, ns), how long the hypervisor kept a core for
itself, and how busy each core was (`/proc/stat`). Where a kernel or a container hides one of these, the others are left
to judge by, and the report says which there were.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Of a window's wall time, all threads of the engine added up. Alone on two cores, engines of ONNX Runtime and OpenVINO
# waited for 0.01 to 0.03 of theirs, with a server and a worker that look after a job for some 0.05; one spinning
# process makes it 0.3 and more. What lies between costs the mean its share at most, and both sides of a ratio, the
# median next to nothing.
MOST_WAITED = 0.10
# One turn of the scheduler is no company by itself: a process that wakes up for a moment takes a tenth of a window of
# 40 ms, and its median does not move. What counts is judged once more together (`claim.objections`), where a turn in
# every window adds up.
TURN_S = 0.004
# Of the usable cores' time, kept by the hypervisor. It is counted in ticks of 10 ms: a single one is no evidence.
MOST_STOLEN = 0.03
# Of the usable cores' time, spent by other processes where the engine need not have waited: they share caches, memory
# and clocks with it. A server, a database and a worker that watches take a hundredth or two.
MOST_OTHERS = 0.15
LEAST_TICKS = 3  # of the kernel's clock, before stolen or others' time is evidence at all
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Disturbance:
    """Of one window, in seconds: how long it took, how long the engine's threads waited for a core (added up), what the
    hypervisor kept and what other processes computed on the `cores` that may be used. None where nothing tells."""

    seconds: float
    cores: int
    waited: float | None = None
    stolen: float | None = None
    own: float = 0.0
    busy: float | None = None
    device: str | None = None  # what disturbed the GPU that the engine runs on

    @property
    def others(self) -> float | None:
        """What was computed on the usable cores less what the engine itself did."""
        return None if self.busy is None else max(0.0, self.busy - self.own)

    @property
    def waited_share(self) -> float:
        return (self.waited or 0.0) / self.seconds if self.seconds > 0 else 0.0

    @property
    def stolen_share(self) -> float:
        return self._of_cores(self.stolen)

    @property
    def others_share(self) -> float:
        return self._of_cores(self.others)

    def _of_cores(self, value: float | None) -> float:
        whole = self.seconds * self.cores
        return min(1.0, (value or 0.0) / whole) if whole > 0 else 0.0

    @property
    def disturbed(self) -> str | None:
        """Why what was measured meanwhile does not count; None where it does."""
        if self.device is not None:
            return self.device
        if (self.waited or 0.0) > MOST_WAITED * self.seconds + TURN_S:
            return f"the engine's threads waited {self.waited_share:.2g} s for a core in a second, added up"
        least = LEAST_TICKS / TICKS_PER_S
        if (self.stolen or 0.0) >= least and self.stolen_share > MOST_STOLEN:
            return f"{100 * self.stolen_share:.0f} % of the cores' time was stolen from this virtual machine"
        if (self.others or 0.0) >= least and self.others_share > MOST_OTHERS:
            return f"other processes took {100 * self.others_share:.0f} % of the cores' time"
        return None


@dataclass(frozen=True)
class Window:
    """Latencies of an engine's calls in ns (int64), and what else happened meanwhile."""

    latencies: Array
    disturbance: Disturbance


def together(parts: Sequence[Disturbance]) -> Disturbance:
    """Of several processes that ran at the same time on the same cores."""
    waited = [p.waited for p in parts if p.waited is not None]
    stolen = [p.stolen for p in parts if p.stolen is not None]
    busy = [p.busy for p in parts if p.busy is not None]
    return Disturbance(
        max(p.seconds for p in parts),
        parts[0].cores,
        sum(waited) if waited else None,
        max(stolen, default=None),
        sum(p.own for p in parts),
        max(busy, default=None),
    )


def in_a_row(parts: Iterable[Disturbance]) -> Disturbance:
    """Of several windows, one after the other: everything added up."""
    found = [*parts]
    if not found:
        return Disturbance(0.0, 1)

    def total(values: Iterable[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) if known else None

    return Disturbance(
        sum(p.seconds for p in found),
        found[0].cores,
        total(p.waited for p in found),
        total(p.stolen for p in found),
        sum(p.own for p in found),
        total(p.busy for p in found),
    )


@dataclass(frozen=True)
class Reading:
    """The kernel's counters at one moment, of the process that takes it."""

    at: float
    own: float
    waits: dict[str, int] | None
    throttled: int
    pressure: float | None
    stolen: float | None
    busy: float | None
    cores: int

    @classmethod
    def now(cls, cpus: Collection[int]) -> Reading:
        """`cpus`: the cores that count. Takes some 0.1 ms; never raises."""
        waits = thread_waits()
        stat = _stat(cpus)
        return cls(
            time.perf_counter(),
            time.process_time(),
            waits,
            _throttled_ns() if waits else 0,
            None if waits else _pressure(),
            stat and stat[0],
            stat and stat[1],
            len(cpus) or 1,
        )

    def until(self, later: Reading) -> Disturbance:
        """What happened from here to `later`."""
        seconds = later.at - self.at
        return Disturbance(
            seconds,
            self.cores,
            self._waited(later),
            _less(later.stolen, self.stolen),
            later.own - self.own,
            _less(later.busy, self.busy),
        )

    def _waited(self, later: Reading) -> float | None:
        if self.waits is None or later.waits is None:
            return _less(later.pressure, self.pressure)
        # A thread that began meanwhile counts from its beginning; one that ended took its counter along.
        waited = sum(ns - self.waits.get(thread, 0) for thread, ns in later.waits.items())
        # A container's own limit of CPU time makes its threads wait, too: that is where the engine runs, no company.
        return max(0, waited - (later.throttled - self.throttled)) / 1e9


def thread_waits(pid: int | str = "self") -> dict[str, int] | None:
    """By thread of the process: ns that it has waited for a core so far. None where the kernel does not tell (without
    CONFIG_SCHED_INFO every counter stays at 0), or the process is gone."""
    found: dict[str, int] = {}
    counted = False
    try:
        threads = [*(_PROC / str(pid) / "task").iterdir()]
    except OSError:
        return None
    for thread in threads:
        try:
            fields = (thread / "schedstat").read_text().split()
            found[thread.name] = int(fields[1])
            counted |= int(fields[2]) > 0
        except (OSError, ValueError, IndexError):  # it has ended meanwhile, or there is no such file
            continue
    return found if counted else None


def usual_cores() -> frozenset[int]:
    """Those that this process may use."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on this system
        return frozenset(range(os.cpu_count() or 1))


def sources() -> list[str]:
    """What this machine tells, in words."""
    found = []
    if thread_waits() is not None:
        found.append("how long each thread waited for a core (schedstat)")
    elif _pressure() is not None:
        found.append("how long some thread waited for a core (pressure stall information)")
    if _stat(usual_cores()) is not None:
        found.append("what was stolen from this virtual machine and what other processes computed (/proc/stat)")
    return found


def _stat(cpus: Collection[int]) -> tuple[float, float] | None:
    """Seconds since boot that these cores were (stolen, busy), added up; None where nothing tells."""
    names = {f"cpu{i}" for i in cpus}
    stolen = busy = 0
    seen = False
    try:
        lines = (_PROC / "stat").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, *values = line.split()
        if name in names and len(values) >= 8:
            user, nice, system, _, _, irq, softirq, steal = map(int, values[:8])
            stolen += steal
            busy += user + nice + system + irq + softirq
            seen = True
    return (stolen / TICKS_PER_S, busy / TICKS_PER_S) if seen and busy else None


def _throttled_ns() -> int:
    """How long this container's threads were held by its limit of CPU time so far (cgroup v2, then v1)."""
    for name, key, unit in (("cpu.stat", "throttled_usec", 1000), ("cpu/cpu.stat", "throttled_time", 1)):
        for words in _lines(_CGROUP / name):
            if len(words) == 2 and words[0] == key and words[1].isdigit():
                return int(words[1]) * unit
    return 0


def _pressure() -> float | None:
    """Seconds so far in which some thread of the container, or of the machine, waited for a core."""
    for path in (_CGROUP / "cpu.pressure", _PROC / "pressure" / "cpu"):
        for words in _lines(path):
            if words and words[0] == "some" and words[-1].startswith("total="):
                return int(words[-1].removeprefix("total=")) / 1e6
    return None


def _lines(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return []


def _less(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else max(0.0, later - earlier)


def to_json(whole: Disturbance, **facts: Any) -> dict[str, Any]:
    """Shares of all windows together, with further facts; every number is finite."""
    shares = {
        "waited_share": whole.waited_share,
        "steal_share": whole.stolen_share,
        "others_share": whole.others_share,
    }
    return {**facts, **{k: round(v, 4) if math.isfinite(v) else 0.0 for k, v in shares.items()}, "sources": sources()}
