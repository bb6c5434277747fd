"""Instances × threads × maximal batch × delay × preferred sizes for one traffic, by few measurements.

What a setup yields at most (a short closed loop) says which are worth more. Then they race: whoever keeps the limit at
a rate just above what the best so far was seen to serve takes its place, and who does not is done with after the few
requests that show it. In the end the winner has to hold that rate once more by the bound, and the setup that it started
from has to miss it by the bound: else that one stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from app.domain.failures import StageFailure
from workers.measure.load.bench import Bench, Setup, answered, median_s
from workers.measure.load.goodput import Goodput, Plan
from workers.measure.load.judged import KEEPS, SPOILT, Point

_FIRST = 0.3  # of the time, for the rate of the setup that the search starts from
_SCREENED = 0.4  # for what the others yield
_EACH_S = 1.0  # that it takes to start one and to see that
_HEATS = 3  # of one race, at growing rates
_LEAST_RACE_S = 2.0
_BAR = 1.05  # over the best so far: what is not more than this is the same on a machine that is not quiet
_RACERS = 4  # of those that yield most
_REACH = 0.97  # of what a setup yields at most: it keeps no limit beyond that
_DELAYS = (1 / 16, 1 / 6, 1 / 3)  # of the limit
_STANDS_OUT = 0.25  # of the batches, that are of one size
_AS_MUCH = 0.95  # of what the largest batch yields, from which on a smaller one need not be waited for
_GUESS = 0.9  # of what theory says, to begin with: calls do not all take the same
_FAR = 12.0  # calls that fit into the limit, from which on load is what counts
_STRIDE = 1.3  # upwards from the bar
_LOOKED = 1.12  # resolution of a rate that only has to be compared
_FITS = 0.9  # of the limit, that a full batch may take by itself


@dataclass(frozen=True)
class Space:
    """`layouts`: (instances, threads). `batches`: maximal ones that the engine takes; [1] where it is served one by
    one. `padded`: whether its requests may be filled up to common sizes."""

    layouts: Sequence[tuple[int, int | None]]
    batches: Sequence[int]
    padded: bool = False


@dataclass
class Tried:
    """`yields`: requests per second of a closed loop. `goodput`: by a short look; of one that lost, an upper end."""

    setup: Setup
    yields: float | None = None
    batch_ms: float | None = None
    goodput: float | None = None
    decision: str = ""
    won: Point | None = None  # the last race

    def to_json(self) -> dict[str, Any]:
        return {
            **self.setup.to_json(),
            "yields_per_second": None if self.yields is None else round(self.yields, 2),
            "batch_ms": None if self.batch_ms is None else round(self.batch_ms, 3),
            "goodput_seen": None if self.goodput is None else round(self.goodput, 2),
            "decision": self.decision,
        }


@dataclass
class Tuned:
    """`goodput`: of the best one, by short looks."""

    best: Setup
    goodput: Goodput
    start: Goodput
    tried: list[Tried] = field(default_factory=list)
    complete: bool = True
    seconds: float = 0.0


class Tuner:
    """Searches from `start`. `share_s`: seconds that it may take."""

    def __init__(self, bench: Bench, start: Setup, space: Space, share_s: float) -> None:
        self.bench, self.start, self.space = bench, start, space
        self.until = bench.clock.spent + share_s
        self.tried: dict[Setup, Tried] = {}
        self.complete = True

    def left(self) -> float:
        return min(self.until - self.bench.clock.spent, self.bench.clock.left())

    async def run(self) -> Tuned:
        began = self.bench.clock.spent
        share_s = self.left()
        first = self._tried(self.start)
        await self._yields(first)
        with self.bench.within(_FIRST * share_s):
            start = await self.bench.goodput(self.start, self._plan(first), proven=False)
        first.goodput, first.decision = start.rate, "where the search starts"
        best, goodput = self.start, start
        for racer in await self._racers(share_s):
            best, goodput = await self._race(racer, best, goodput)
        for padded in self._padded(best):
            if await self._starts(padded):
                best, goodput = await self._race(padded, best, goodput)
        if best.max_batch > 1:
            for share in _DELAYS:
                delayed = self._tried(best.but(max_delay_ms=round(1e3 * share * self.bench.limit.p99_s, 3)))
                best, goodput = await self._race(delayed, best, goodput)
        for size in self.not_worth_waiting(best):
            at_once = self._tried(best.but(preferred=(size,)))
            best, goodput = await self._race(at_once, best, goodput)
        self.tried[best].decision = "the best" if best != self.start else "where the search starts, and the best"
        return Tuned(best, goodput, start, list(self.tried.values()), self.complete, self.bench.clock.spent - began)

    def _padded(self, best: Setup) -> list[Tried]:
        """Filled up, requests of all sizes share batches, which may then be larger than what was the best without."""
        if not self.space.padded:
            return []
        sizes = {best.max_batch, max(self.space.batches)} - {1}
        return [self._tried(best.but(max_batch=size, padded=True)) for size in sorted(sizes)]

    def not_worth_waiting(self, setup: Setup) -> list[int]:
        """Sizes of batches, between one by one and the largest, that may be worth no longer wait: the smallest that
        yields about as much as the largest, and the one that formed most often, where one stands out. None where no
        request waits: a batch is then whatever has come when an instance is free."""
        if setup.max_delay_ms <= 0:
            return []
        at = {
            s.max_batch: t.yields or 0.0
            for s, t in self.tried.items()
            if s.but(max_batch=setup.max_batch) == setup.but(max_delay_ms=0.0)
        }
        enough = _AS_MUCH * at.get(setup.max_batch, math.inf)
        able = [size for size, yields in at.items() if 1 < size < setup.max_batch and yields >= enough]
        formed = self._formed(setup)
        return sorted({*([min(able)] if able else []), *([] if formed is None else [formed])})

    def _formed(self, setup: Setup) -> int | None:
        known = [p for p in self.bench.points.get(setup, []) if p.verdict == KEEPS and p.figures.get("batches")]
        shares = {int(size): share for size, share in known[-1].figures["batches"].items()} if known else {}
        between = [size for size, share in shares.items() if 1 < size < setup.max_batch and share >= _STANDS_OUT]
        return max(between, key=lambda size: shares[size], default=None)

    def _tried(self, setup: Setup) -> Tried:
        return self.tried.setdefault(setup, Tried(setup))

    async def _starts(self, tried: Tried) -> bool:
        """Whether it can be driven: several instances may need more memory than there is."""
        try:
            await self._yields(tried)
        except StageFailure as failure:
            tried.decision = f"does not serve: {failure.detail}"
            return False
        return True

    async def _yields(self, tried: Tried) -> None:
        run = await self.bench.burst(tried.setup)
        tried.yields = answered(run)
        taken = run.seen.mean_compute_s
        tried.batch_ms = 1e3 * (median_s(run) if taken is None else taken)
        if not math.isfinite(tried.batch_ms):
            tried.batch_ms = None

    def _plan(self, tried: Tried) -> Plan:
        yields = tried.yields or 1.0
        return Plan(first_guess(yields, self.bench.limit.p99_s), _LOOKED, most=_REACH * yields, least=1e-3 * yields)

    async def _racers(self, share_s: float) -> list[Tried]:
        """Those that yield most, the most promising first; larger batches of a layout as long as they bring more."""
        batches, until = sorted(self.space.batches), self.left() - _SCREENED * share_s
        if _EACH_S * len(batches) * len(self.space.layouts) > _SCREENED * share_s:
            batches = batches[::2]  # 1, 4, 16, …
        for instances, threads in self.space.layouts:
            before = 0.0
            for batch in batches:
                tried = self._tried(Setup(instances, threads, batch))
                if tried.yields is None:
                    if self.left() < max(until, _LEAST_RACE_S):
                        tried.decision, self.complete = "not tried: the time ran out", False
                        continue
                    if not await self._starts(tried):
                        break
                if (tried.batch_ms or 0.0) > 1e3 * _FITS * self.bench.limit.p99_s:
                    tried.decision = f"a batch takes {tried.batch_ms:.4g} ms by itself"
                    break
                if batch > 1 and (tried.yields or 0.0) < 0.95 * before:
                    break
                before = max(before, tried.yields or 0.0)
        able = [t for t in self.tried.values() if t.yields and not t.decision]
        able.sort(key=lambda t: -(t.yields or 0.0))
        for tried in able[_RACERS:]:
            tried.decision = "others yield more"
        return able[:_RACERS]

    async def _race(self, tried: Tried, best: Setup, goodput: Goodput) -> tuple[Setup, Goodput]:
        """The better of the two, with its goodput. Where both keep the limit just above the best so far, that was
        taken for less than it is: it is looked at once more, from there on."""
        if goodput.rate <= 0:  # nothing is known of the best so far that could be beaten
            found = await self.bench.goodput(tried.setup, self._plan(tried), proven=False)
            tried.goodput, tried.decision = found.rate, "keeps the limit, where the best so far was not seen to"
            if found.rate > 0:
                return tried.setup, found
            tried.decision = "was not seen to keep the limit either"
            return best, goodput
        for _ in range(_HEATS):
            bar = _BAR * goodput.rate
            tried.decision = await self._lost(tried, bar)
            if tried.decision:
                break
            before = await self.bench.point(best, bar, proven=False)
            if before.verdict != KEEPS:
                most = max(_REACH * tried.yields, bar) if tried.yields is not None else math.inf
                found = await self._upwards(tried.setup, tried.won, most)
                tried.goodput, tried.decision = found.rate, "was the best for a while"
                return tried.setup, found
            goodput = await self._upwards(best, before, math.inf)
            self.tried[best].goodput = goodput.rate
            tried.decision = f"keeps the limit at {bar:.4g}/s, and so does the best so far"
        return best, goodput

    async def _lost(self, tried: Tried, bar: float) -> str:
        """Why it is not better than the best so far; empty where it keeps the limit at the bar."""
        if tried.yields is not None and tried.yields * _REACH < bar:
            return f"yields {tried.yields:.4g}/s at most, and {bar:.4g}/s were to be beaten"
        if self.left() < _LEAST_RACE_S:
            self.complete = False
            return "not raced: the time ran out"
        tried.won = await self.bench.point(tried.setup, bar, proven=False)
        if tried.won.verdict in SPOILT:
            return f"not known at {bar:.4g}/s: {SPOILT[tried.won.verdict]}"
        return (
            "" if tried.won.verdict == KEEPS else f"does not keep the limit at {bar:.4g}/s, just above the best so far"
        )

    async def _upwards(self, setup: Setup, known: Point | None, most: float) -> Goodput:
        """Its goodput, which is that of a point that is known at least."""
        assert known is not None
        plan = Plan(known.rate, _LOOKED, _STRIDE, most=most, least=known.rate, known=(known,))
        return await self.bench.goodput(setup, plan, proven=False)


def first_guess(yields: float, limit_s: float) -> float:
    """A rate to begin with, of one instance that serves `yields` requests a second one by one: where the p99 of a queue
    of Poisson arrivals and equal calls (M/D/1, Erlang 1909) is the limit, and a little less."""
    calls = limit_s * yields - 1.0  # that a request may wait for
    if calls <= 0:
        return 0.05 * yields
    if calls >= _FAR:
        return _GUESS * 0.85 * yields
    low, high = 0.0, 1.0
    for _ in range(30):
        load = (low + high) / 2
        low, high = (load, high) if _waits_no_longer(calls, load) >= 0.99 else (low, load)
    return max(_GUESS * low, 0.01) * yields


def _waits_no_longer(calls: float, load: float) -> float:
    """The share of requests that wait for no more than so many calls."""
    terms = (
        (-load * (calls - k)) ** k / math.factorial(k) * math.exp(load * (calls - k)) for k in range(int(calls) + 1)
    )
    return (1 - load) * sum(terms)
