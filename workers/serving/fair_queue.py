"""Who waits, and which requests run together next. Pure: no clock, no event loop, no arrays.

Requests of one key (types and shapes) may share a batch. Callers take turns by start-time fair queuing (Goyal, Vin and
Cheng, 1996): a request's tag is the virtual time at which its caller's earlier ones would be through; the lowest tag
goes first, so that whoever floods the queue is in nobody else's way. A caller alone is served in the order of arrival.
When the queue is full, the newest request of whoever holds most makes room for one who holds less.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

_SLACK = 64  # entries of requests that left, before they are swept out


@dataclass(eq=False, slots=True)
class Request:
    """One that waits or runs. `rows`: what it adds to a batch; `plan`, `future`, `timer`: its owner's."""

    key: Hashable
    rows: int
    caller: str
    arrived: float
    plan: Any = None
    future: Any = None
    timer: Any = None
    alone: bool = False  # to be run without others
    deaths: int = 0  # instances that ended under it
    taken: float = 0.0
    tag: float = 0.0
    queued: bool = False

    @property
    def cost(self) -> int:
        return max(1, self.rows)


class Full(Exception):
    """The queue holds as many as it may, and nobody holds more than this caller."""


@dataclass(eq=False, slots=True)
class _Group:
    """Requests that may share a batch. Those that left stay in both orders until they come up."""

    by_tag: list[tuple[float, int, Request]] = field(default_factory=list)
    by_arrival: deque[Request] = field(default_factory=deque)
    rows: int = 0
    live: int = 0

    def head(self) -> float:
        while not self.by_tag[0][2].queued:
            heapq.heappop(self.by_tag)
        return self.by_tag[0][0]

    def oldest(self) -> float:
        while not self.by_arrival[0].queued:
            self.by_arrival.popleft()
        return self.by_arrival[0].arrived

    def sweep(self) -> None:
        if len(self.by_tag) > 2 * self.live + _SLACK:
            self.by_tag = [entry for entry in self.by_tag if entry[2].queued]
            heapq.heapify(self.by_tag)
        if len(self.by_arrival) > 2 * self.live + _SLACK:
            self.by_arrival = deque(r for r in self.by_arrival if r.queued)


class FairQueue:
    """Holds at most `limit` requests; batches of at most `max_batch` rows, but for a request that has more by itself.

    A group is due when a full or a preferred batch is there, or when its oldest request has waited `delay` seconds."""

    def __init__(self, limit: int, max_batch: int, delay: float = 0.0, preferred: Iterable[int] = ()) -> None:
        self.limit, self.max_batch, self.delay = limit, max_batch, delay
        self.preferred = sorted(preferred)
        self._groups: dict[Hashable, _Group] = {}
        self._again: deque[Request] = deque()  # to be run alone, before all others: they have had their turn
        self._held: dict[str, deque[Request]] = {}
        self._counts: dict[str, int] = {}
        self._through: dict[str, float] = {}  # virtual time at which a caller's requests would be done
        self._virtual = 0.0
        self._number = count()
        self._live = 0
        self.rows = 0

    def __len__(self) -> int:
        return self._live

    def add(self, request: Request) -> Request | None:
        """Queue it. The one that had to make room for it, which is no longer queued. Raises `Full`."""
        evicted = None
        if self._live >= self.limit:
            evicted = self._largest(self._counts.get(request.caller, 0) + 1)
            if evicted is None:
                raise Full
            self.remove(evicted)
        request.tag = max(self._virtual, self._through.get(request.caller, 0.0))
        self._through[request.caller] = request.tag + request.cost
        self._enter(request)
        if request.alone:
            group = self._groups.setdefault(request, _Group())  # a key of its own
            request.key = request
        else:
            group = self._groups.setdefault(request.key, _Group())
        heapq.heappush(group.by_tag, (request.tag, next(self._number), request))
        group.by_arrival.append(request)
        group.rows += request.cost
        group.live += 1
        return evicted

    def again(self, request: Request) -> None:
        """Run it once more, alone and next, however full the queue is: it was taken before."""
        request.alone, request.key = True, request
        self._enter(request)
        self._again.append(request)

    def remove(self, request: Request) -> None:
        """It no longer waits; nothing where it does not."""
        if not request.queued:
            return
        self._leave(request)
        group = self._groups.get(request.key)
        if group is not None:
            self._ungroup(request, group)

    def take(self, now: float) -> list[Request]:
        """The requests that run together next, no longer queued; empty where none is due."""
        while self._again:
            request = self._again.popleft()
            if request.queued:
                self._leave(request)
                return [request]
        best: tuple[float, _Group, int] | None = None
        for group in self._groups.values():
            target = self._target(group, now)
            if target and (best is None or group.head() < best[0]):
                best = (group.head(), group, target)
        return [] if best is None else self._form(best[1], best[2])

    def due_at(self) -> float | None:
        """When a group is due whose batch does not fill meanwhile; None where nothing waits."""
        while self._again and not self._again[0].queued:  # it left meanwhile
            self._again.popleft()
        if self._again:
            return 0.0
        return min((g.oldest() + self.delay for g in self._groups.values()), default=None)

    def everything(self) -> list[Request]:
        """All that wait, which then no longer do."""
        found = [r for held in self._held.values() for r in held if r.queued]
        for request in found:
            self.remove(request)
        return found

    def _target(self, group: _Group, now: float) -> int:
        """How many rows a batch of this group may have now; 0 where it is not due."""
        if group.rows >= self.max_batch or now >= group.oldest() + self.delay:
            return self.max_batch
        return max((size for size in self.preferred if size <= group.rows), default=0)

    def _form(self, group: _Group, target: int) -> list[Request]:
        found: list[Request] = []
        total = 0
        while group.live:
            tag = group.head()
            request = group.by_tag[0][2]
            if found and total + request.cost > target:
                break
            heapq.heappop(group.by_tag)
            found.append(request)
            total += request.cost
            self._virtual = max(self._virtual, tag) if len(found) == 1 else self._virtual
            self._leave(request)
            self._ungroup(request, group)
        # It also grows with the work alone: else newcomers at today's time would always come before those who wait.
        self._virtual += total / (len(self._counts) + 1)
        return found

    def _largest(self, more_than: int) -> Request | None:
        """The newest request of the caller who holds most, if those are more than this."""
        caller, most = max(self._counts.items(), key=lambda item: item[1])
        if most <= more_than:
            return None
        held = self._held[caller]
        while not held[-1].queued:
            held.pop()
        return held[-1]

    def _enter(self, request: Request) -> None:
        request.queued = True
        self._live += 1
        self.rows += request.cost
        self._counts[request.caller] = self._counts.get(request.caller, 0) + 1
        self._held.setdefault(request.caller, deque()).append(request)

    def _leave(self, request: Request) -> None:
        request.queued = False
        self._live -= 1
        self.rows -= request.cost
        left = self._counts[request.caller] - 1
        if not left:
            for table in (self._counts, self._held, self._through):
                table.pop(request.caller, None)
            return
        self._counts[request.caller] = left
        held = self._held[request.caller]
        while not held[0].queued:
            held.popleft()
        if len(held) > 2 * left + _SLACK:
            self._held[request.caller] = deque(r for r in held if r.queued)

    def _ungroup(self, request: Request, group: _Group) -> None:
        group.rows -= request.cost
        group.live -= 1
        if group.live:
            group.sweep()
        else:
            self._groups.pop(request.key, None)
