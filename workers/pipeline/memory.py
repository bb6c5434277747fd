"""Memory of a stage's processes, counted once however many of them share it."""

from __future__ import annotations

import time
from pathlib import Path

from workers.pipeline.child import children_of

_CLOSE = 0.8  # of the limit: from there on it is worth counting exactly
_EXACT_EVERY_S = 0.25
_COST = 0.02  # of a core, at most: whoever looks must not disturb what is measured
_LONGEST_S = 0.5  # between two looks


class TreeMemory:
    """Bytes that a process and its descendants hold for themselves: anonymous and shared memory, not mapped files (a
    large model that is mapped read-only costs nothing).

    Looked at twenty times a second while something is measured, so the usual look is a cheap upper bound: resident
    memory summed up, in which pages shared since a fork count once for each process. Only where that comes near the
    limit is the proportional set size read (`smaps_rollup`, which walks the page tables): there each page counts once.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.processes = 0  # as of the last look
        self._near = _CLOSE * limit_bytes
        self._exact = 0
        self._again = 0.0
        self._last, self._due = 0, 0.0

    def used(self, pid: int) -> int:
        """As of the last look, which is made anew the more seldom the longer it takes (many processes and threads)."""
        began = time.monotonic()
        if began >= self._due:
            self._last = self._look(pid)
            took = time.monotonic() - began
            self._due = began + min(took / _COST, _LONGEST_S)
        return self._last

    def _look(self, pid: int) -> int:
        family = descendants(pid)
        self.processes = len(family)
        bound = sum(_resident(p) for p in family)
        if bound <= self._near:
            return bound
        now = time.monotonic()
        if now >= self._again:
            self._exact = sum(_proportional(p) for p in family)
            self._again = now + _EXACT_EVERY_S
        return min(bound, self._exact)


def descendants(pid: int) -> list[int]:
    """The process and all that it and they have started."""
    family = [pid]
    for member in family:
        family += children_of(member)
    return family


def _resident(pid: int) -> int:
    return _sum_fields(f"/proc/{pid}/status", ("RssAnon:", "RssShmem:")) or 0


def _proportional(pid: int) -> int:
    """`smaps_rollup` needs the right to trace the process; without it, or before Linux 5.4, what is resident."""
    found = _sum_fields(f"/proc/{pid}/smaps_rollup", ("Pss_Anon:", "Pss_Shmem:"))
    return _resident(pid) if found is None else found


def _sum_fields(path: str, names: tuple[str, ...]) -> int | None:
    """The sum of these fields in bytes; None where the file or all of them are missing."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) << 10 for line in lines if line.startswith(names)]
    return sum(values) if values else None
