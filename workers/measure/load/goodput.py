"""The highest rate within the limit (goodput): bracketed, then bisected, with an interval. Pure but for what it is
given to measure with."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.measure.load.judged import EXCEEDS, KEEPS, SPOILT, Point

Measure = Callable[[float], Awaitable[Point]]

_MOST_POINTS = 16
_TIMES_SPOILT = 2  # a point is taken again where the generator was late or the machine had company
_STEP_DOWN = 0.94  # where the rate found does not hold when it is measured once more; larger steps each time
_STEPS_DOWN = 5


@dataclass(frozen=True)
class Plan:
    """`guess`: where to begin. `resolution`: of the rate, at which to stop. `stride`: by which to go up, or down, as
    long as only one side is known. `most`, `least`: rates beyond which it is not looked. `confirm`: measure what was
    found once more. `known`: points that there are already."""

    guess: float
    resolution: float = 1.08
    stride: float = 1.5
    most: float = math.inf
    least: float = 0.0
    confirm: bool = False
    known: Sequence[Point] = ()


@dataclass(frozen=True)
class Goodput:
    """`rate`: the highest that kept the limit, below all that did not; 0 where none did. `high`: the lowest that was
    seen to exceed it; None where none was. `complete`: False where the time ran out before they were near each
    other."""

    rate: float
    high: float | None
    points: Sequence[Point] = field(default_factory=tuple)
    complete: bool = True
    reason: str | None = None
    confirmed: bool | None = None

    @property
    def best(self) -> Point | None:
        """The last measurement at `rate`."""
        known = [p for p in reversed(self.points) if p.rate == self.rate and p.verdict == KEEPS]
        return next((p for p in known if p.proven), known[0] if known else None)

    @property
    def known(self) -> bool:
        """Whether anything was found: a rate that keeps the limit, or that none does."""
        if self.rate > 0 or any(p.verdict == EXCEEDS for p in self.points):
            return True
        return self.complete and not self.points

    def to_json(self) -> dict[str, Any]:
        best, rate = self.best, round(self.rate, 3) if self.known else None
        return {
            "rate": rate,
            "interval": [rate, None if self.high is None else round(self.high, 3)],
            "proven": best is not None and best.proven,
            "confirmed": self.confirmed,
            "complete": self.complete,
            "reason": self.reason,
            "p50_ms": best.figures.get("p50_ms") if best else None,
            "p99_ms": best.figures.get("p99_ms") if best else None,
            "p99_bound_ms": best.figures.get("p99_bound_ms") if best else None,
        }


async def highest(measure: Measure, plan: Plan, fits: Callable[[float], bool] = lambda _: True) -> Goodput:
    """`fits`: whether the time left holds a point at this rate."""
    search = _Search(measure, plan, fits)
    await search.narrow()
    if plan.confirm and search.low > 0:
        await search.confirm()
    return search.found()


class _Search:
    def __init__(self, measure: Measure, plan: Plan, fits: Callable[[float], bool]) -> None:
        self.measure, self.plan, self.fits = measure, plan, fits
        self.points: list[Point] = [*plan.known]
        self.complete = True
        self.reason: str | None = None
        self.confirmed: bool | None = None

    @property
    def exceeded(self) -> float:
        return min((p.rate for p in self.points if p.verdict == EXCEEDS), default=math.inf)

    @property
    def not_kept(self) -> float:
        """The lowest rate that is not known to keep the limit. One that did once and did not another time does not."""
        return min((p.rate for p in self.points if p.verdict != KEEPS), default=math.inf)

    @property
    def low(self) -> float:
        top = self.not_kept
        return max((p.rate for p in self.points if p.verdict == KEEPS and p.rate < top), default=0.0)

    async def narrow(self) -> None:
        while (rate := self._next()) is not None:
            if len(self.points) >= _MOST_POINTS + len(self.plan.known) or not self.fits(rate):
                self.complete = False
                self.reason = self.reason or "the time ran out before the rate was known more nearly"
                return
            await self._take(rate)

    async def _take(self, rate: float) -> Point:
        point = await self.measure(rate)
        for _ in range(_TIMES_SPOILT - 1):
            if point.verdict in SPOILT and self.fits(rate):
                point = await self.measure(rate)
        if point.verdict in SPOILT:
            self.reason = f"nothing is said of the engine at {rate:.4g}/s: {SPOILT[point.verdict]}"
        self.points.append(point)
        return point

    def _next(self) -> float | None:
        """Where to measure; None where the rate is known as nearly as asked."""
        plan, low, top = self.plan, self.low, self.not_kept
        if not self.points:
            return plan.guess
        if low == 0:
            rate = top / plan.stride ** (1 + sum(p.verdict != KEEPS for p in self.points) // 2)
            return rate if rate >= plan.least else None
        if math.isinf(top):
            up = plan.stride ** (1 + sum(p.verdict == KEEPS for p in self.points) // 2)
            return min(low * up, plan.most) if low < plan.most else None
        return math.sqrt(low * top) if top / low > plan.resolution else None

    async def confirm(self) -> None:
        """Once more, on other arrivals: the highest of several that seemed to hold may have been lucky."""
        for step in range(1, _STEPS_DOWN + 1):
            rate = self.low
            if rate <= 0:
                return
            if not self.fits(rate):
                self.reason = self.reason or "the time ran out before the rate was measured once more"
                self.confirmed = False
                return
            if (await self._take(rate)).verdict == KEEPS:
                self.confirmed = True
                return
            lower = max(self.low, rate * _STEP_DOWN**step)
            if lower > self.low and self.fits(lower):
                await self._take(lower)
        self.confirmed = False

    def found(self) -> Goodput:
        exceeded = self.exceeded
        high = None if math.isinf(exceeded) else exceeded
        if high is None and self.reason is None and self.low > 0:
            self.reason = "no rate was seen to exceed the limit with confidence"
        if self.low == 0 and self.reason is None:
            self.reason = "no rate that was tried keeps the limit"
        return Goodput(self.low, high, tuple(self.points), self.complete, self.reason, self.confirmed)
