"""The whole measurement of one job's traffic: the shipped engine tuned and judged under it, the original beside it with
its own default settings, what each setting brought, and what lies beyond the rate that is kept.

The most important comes first: where the time runs out, what is missing has its reason."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from app.domain.failures import StageFailure
from workers.measure.load.bench import Bench, Clock, Setup, answered, median_s, opened
from workers.measure.load.generator import Schedule, drive
from workers.measure.load.goodput import Goodput, Plan
from workers.measure.load.judged import EXCEEDS, KEEPS, Point, figures
from workers.measure.load.mix import Mix
from workers.measure.load.target import OK, Instant
from workers.measure.load.tuning import Space, Tuned, Tuner, first_guess

_TUNING = 0.35  # of the time
_TUNED_UNTIL = 0.60  # by when what ships has to be proven
_ORIGINAL_UNTIL = 0.75
_HTTP_UNTIL = 0.85
_POINT, _LEAST_POINT_S, _MOST_POINT_S = 0.08, 5.0, 40.0  # of the time, that a proof at one rate may take
_RESOLUTION = 1.06
_STRIDE = 1.2
_LOOKS = 0.4  # of the time of a side, for the short looks before its proof
_COARSE = 1.15  # resolution of what only explains
_BEYOND = 1.3  # × the rate that is kept
_CURVE = (0.25, 0.5, 0.75, 0.9)  # × the rate that is kept
_CURVE_S = 1.5
_LEAST_WHOLE = 100  # requests of a run that is shown
_LEAST_STEP_S = 2.0
_OVERRUN_S = 1.0  # what was begun in time may end so much later, before it is given up
_GENERATOR_RATE, _GENERATOR_S = 1000.0, 0.5
_STATIC = 0.5  # of the limit: how long a static batch is waited for, at most
NO_TIME = "not measured: the time ran out"


@dataclass
class Side:
    """One engine, served one way. `at_rate`: at the rate that the job wants served. `alone_ms`: p50
    of one caller alone. `curve`: every point that was measured in `setup`, by rate."""

    setup: Setup
    goodput: Goodput | None = None
    at_rate: Point | None = None
    beyond: Point | None = None
    alone_ms: float | None = None
    yields: float | None = None
    memory_mb: float | None = None
    start_s: float | None = None
    curve: list[Point] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "setup": self.setup.to_json(),
            "goodput": None if self.goodput is None else self.goodput.to_json(),
            "at_rate": None if self.at_rate is None else self.at_rate.to_json(),
            "beyond": None if self.beyond is None else self.beyond.to_json(),
            "alone_p50_ms": _number(self.alone_ms),
            "yields_per_second": _number(self.yields),
            "memory_mb": _number(self.memory_mb),
            "start_seconds": _number(self.start_s),
            "curve": [p.to_json() for p in sorted(self.curve, key=lambda p: p.rate)],
        }


@dataclass
class Found:
    """`brought`: of each setting that was tuned, the highest rate without it. `static`: the engine with static batches.
    `http`: the engine by the bundle's server, over HTTP. `reasons`: why a part of it is missing."""

    engine: Side
    original: Side | None = None
    tuned: Tuned | None = None
    kept_start: str | None = None
    brought: list[dict[str, Any]] = field(default_factory=list)
    static: Side | None = None
    http: Side | None = None
    generator: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


class Trial:
    """`rate`: requests per second that the job wants served, if it says so. `space`: setups of the shipped engine.
    `served`: the shipped engine behind the bundle's own server, where the bundle has one."""

    def __init__(
        self,
        shipped: Bench,
        original: Bench,
        space: Space,
        rate: float | None,
        on_progress: Callable[[float, str], None],
        served: Bench | None = None,
    ) -> None:
        self.shipped, self.original, self.served = shipped, original, served
        self.space, self.rate = space, rate
        self.clock: Clock = shipped.clock
        self.whole_s = max(self.clock.left(), 0.0)
        longest = min(max(_POINT * self.whole_s, _LEAST_POINT_S), _MOST_POINT_S)
        for bench in (shipped, original, *([served] if served is not None else [])):
            bench.judged = replace(bench.judged, cap_s=longest)
        self.on_progress = on_progress
        self.found = Found(Side(Setup()))
        self.is_decided = False  # which setup of the shipped engine counts

    async def run(self) -> Found:
        """Raises StageFailure where the shipped engine does not serve at all, or nothing is known of it when the time
        is over; whatever else fails becomes a reason. What still waits then (a server that does not come up, say) is
        given up: what was found until then is kept."""
        self.found.generator = await self._generator()
        async with opened(self.shipped), opened(self.original):
            try:
                await self._in_time(self._engine)
            except TimeoutError:
                self._cut_short()
            await self.shipped.close()
            await self._try("original", self._original)
            await self.original.close()
            if self.served is not None:
                async with opened(self.served):
                    await self._try("http", self._http)
            await self._try("beyond", self._beyond)
            await self._try("curve", self._curve)
            await self._try("settings", self._brought)
            await self._try("static", self._static)
            await self.shipped.close()
        return self.found

    async def _try(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        if self.clock.left() < _LEAST_STEP_S:
            self.found.reasons[name] = NO_TIME
            return
        self.on_progress(min(self.clock.spent / (self.whole_s or 1.0), 1.0), name)
        try:
            await self._in_time(work)
        except TimeoutError:
            self.found.reasons[name] = NO_TIME
        except StageFailure as failure:
            self.found.reasons[name] = f"not measured: {failure.detail}"

    async def _in_time(self, work: Callable[[], Awaitable[None]]) -> None:
        """Raises TimeoutError."""
        left = max(self.clock.left(), 0.0) + _OVERRUN_S
        async with asyncio.timeout(left if math.isfinite(left) else None):
            await work()

    def _until(self, share: float) -> float:
        """Seconds left until this share of the time is spent."""
        return max(share * self.whole_s - self.clock.spent, 0.0) if math.isfinite(self.whole_s) else math.inf

    async def _generator(self) -> dict[str, Any]:
        """What the generator itself costs, and how late it is, where the target answers at once."""
        mix = self.shipped.mix
        count = int(_GENERATOR_RATE * _GENERATOR_S)
        due = self.shipped.arrivals.due(_GENERATOR_RATE, count, 0)
        run = await drive(Instant(), mix, Schedule(_GENERATOR_RATE, due, mix.drawn(count, 0)))
        told = figures(run, math.inf)
        return {"rate": _GENERATOR_RATE, "cpu_us_per_request": told["cpu_us_per_request"], "late": told["late"]}

    # What ships

    async def _engine(self) -> None:
        bench, start, side = self.shipped, Setup(), self.found.engine
        if not await self._alone(bench, side):
            self.is_decided = True
            await self._facts(bench, side)
            return
        self.on_progress(0.05, "tuning")
        tuned = await Tuner(bench, start, self.space, _TUNING * self.whole_s).run()
        self.found.tuned = tuned
        self.on_progress(min(self.clock.spent / (self.whole_s or 1.0), 1.0), "goodput")
        side.setup = tuned.best
        side.goodput = await self._proven(bench, tuned.best, tuned.goodput, _TUNED_UNTIL)
        if tuned.best != start:
            await self._against_start(start, tuned)
        self.is_decided = True
        if self.rate is not None and self.rate <= _BEYOND * max(side.goodput.rate, 1e-9):
            side.at_rate = await self._at_rate(bench, side.setup)
        await self._facts(bench, side)

    def _cut_short(self) -> None:
        """The time was over before the engine's own part was: what was tuned counts where that was decided."""
        side, tuned, start = self.found.engine, self.found.tuned, Setup()
        if not self.is_decided:
            if tuned is None:
                raise StageFailure("timed_out", "The time was over before a rate was found.", cacheable=False)
            self.found.kept_start = None if tuned.best == start else _not_better(tuned.best, start)
            side.setup, side.goodput = start, _not_proven(tuned.start)
        side.curve = [*self.shipped.points.get(side.setup, [])]
        self.found.reasons["engine"] = NO_TIME

    async def _alone(self, bench: Bench, side: Side) -> bool:
        """Whether any rate can keep the limit: one caller alone waits no longer than that."""
        run = await bench.alone(side.setup)
        if not run.ended(OK):
            codes = ", ".join(f"{code} ({n})" for code, n in run.codes.most_common(3))
            raise StageFailure("engine_does_not_serve", f"It answers no request: {codes}.", cacheable=False)
        side.alone_ms, limit_ms = _ms(median_s(run)), 1e3 * bench.limit.p99_s
        if side.alone_ms is not None and side.alone_ms <= limit_ms:
            return True
        slowest = 1e3 * float(run.latency[np.isfinite(run.latency)].max())
        reason = (
            f"no rate keeps the limit of {limit_ms:g} ms: one caller alone waits {side.alone_ms or slowest:.4g} ms "
            f"(p50); the nearest limit that can be kept is about {slowest:.4g} ms"
        )
        side.goodput = Goodput(0.0, None, (), True, reason)
        return False

    async def _against_start(self, start: Setup, tuned: Tuned) -> None:
        """What was tuned ships where it is proven to serve a rate that the setup it started from is proven to miss."""
        side = self.found.engine
        rate = side.goodput.rate if side.goodput is not None else 0.0
        if (
            rate > 0
            and side.goodput is not None
            and side.goodput.best is not None
            and self.clock.left() > _LEAST_STEP_S
        ):
            point = await self.shipped.point(start, rate, proven=True)
            if point.verdict == EXCEEDS:
                return
            self.found.kept_start = (
                f"{tuned.best} served {rate:.4g}/s within the limit, and {start} was not proven to miss it there"
            )
        else:
            self.found.kept_start = _not_better(tuned.best, start)
        before, after = await self._proven(self.shipped, start, tuned.start, _TUNED_UNTIL), side.goodput
        if not before.known and after is not None and after.known:
            self.found.kept_start = None  # nothing is known of it, and a rate is of what was tuned
            return
        side.setup, side.goodput = start, before

    async def _proven(self, bench: Bench, setup: Setup, looked: Goodput, share: float) -> Goodput:
        """By the bound, and once more on other arrivals; what the short looks saw where that comes to nothing."""
        if looked.rate <= 0:
            return looked
        rate = looked.rate
        with bench.within(max(self._until(share), _LEAST_STEP_S)):
            plan = Plan(0.95 * rate, _RESOLUTION, _STRIDE, least=0.1 * rate, confirm=True)
            found = await bench.goodput(setup, plan, proven=True)
        if found.rate > 0:
            return found
        return replace(_not_proven(looked), points=(*looked.points, *found.points))

    async def _at_rate(self, bench: Bench, setup: Setup) -> Point | None:
        assert self.rate is not None
        count = bench.judged.requests(self.rate)
        if count / self.rate > self.clock.left():
            self.found.reasons["at_rate"] = f"not measured: a proof at {self.rate:g}/s takes longer than the time left"
            return None
        return await bench.proof(setup, self.rate)

    # The original, and what explains

    async def _original(self) -> None:
        bench, side = self.original, Side(Setup())
        self.found.original = side
        if not await self._alone(bench, side):
            await self._facts(bench, side)
            return
        side.yields = answered(await bench.burst(side.setup))
        guess = first_guess(side.yields, bench.limit.p99_s)
        plan = Plan(guess, _COARSE, _STRIDE, most=max(side.yields, guess), least=1e-3 * guess)
        with bench.within(_LOOKS * self._until(_ORIGINAL_UNTIL)):
            looked = await bench.goodput(side.setup, plan, proven=False)
        side.goodput = await self._proven(bench, side.setup, looked, _ORIGINAL_UNTIL)
        if self.rate is not None and self.rate <= _BEYOND * max(side.goodput.rate, 1e-9):
            side.at_rate = await self._at_rate(bench, side.setup)
        await self._facts(bench, side)

    async def _http(self) -> None:
        """As its users see it: over HTTP, on this machine."""
        bench, setup = self.served, self.found.engine.setup
        rate = self.found.engine.goodput.rate if self.found.engine.goodput is not None else 0.0
        assert bench is not None
        side = Side(setup)
        if not await self._alone(bench, side) or rate <= 0:
            await self._facts(bench, side)
            self.found.http = side
            return
        plan = Plan(0.7 * rate, _COARSE, _STRIDE, most=1.1 * rate, least=0.01 * rate)
        with bench.within(_LOOKS * self._until(_HTTP_UNTIL)):
            looked = await bench.goodput(setup, plan, proven=False)
        side.goodput = await self._proven(bench, setup, looked, _HTTP_UNTIL)
        await self._facts(bench, side)
        self.found.http = side

    async def _facts(self, bench: Bench, side: Side) -> None:
        """What is known of a side when it was driven."""
        await bench.close()
        side.memory_mb = bench.memory.get(side.setup)
        side.start_s = bench.start_s.get(side.setup)
        side.curve = [*bench.points.get(side.setup, [])]

    async def _beyond(self) -> None:
        """More than is kept, to the end: does the queue grow, who is refused, who gives up."""
        side = self.found.engine
        rate = side.goodput.rate if side.goodput is not None else 0.0
        if rate <= 0:
            self.found.reasons["beyond"] = "no rate keeps the limit"
            return
        high = max(_BEYOND * rate, (side.goodput.high or 0.0) if side.goodput else 0.0)
        side.beyond = await self._whole(side.setup, high)
        if side.beyond is None:
            self.found.reasons["beyond"] = NO_TIME

    async def _whole(self, setup: Setup, rate: float) -> Point | None:
        """A run that is not cut short; None where the time holds too few requests."""
        seconds = min(_CURVE_S, max(self.clock.left() / 4, 0.5))
        requests = max(int(seconds * rate), _LEAST_WHOLE)
        if requests / rate > self.clock.left() / 2:
            return None
        return await self.shipped.point(setup, rate, proven=False, requests=requests)

    async def _brought(self) -> None:
        """Each tuned setting once at what the search started from; both sides by short looks."""
        side, start, tuned = self.found.engine, Setup(), self.found.tuned
        rate = tuned.goodput.rate if tuned is not None else 0.0
        if side.setup == start or rate <= 0:
            return
        parts: dict[str, tuple[str, Setup]] = {
            "instances × threads": ("layout", side.setup.but(instances=start.instances, threads=start.threads)),
            "max_batch": ("max_batch", start.but(instances=side.setup.instances, threads=side.setup.threads)),
            "max_delay_ms": ("max_delay_ms", side.setup.but(max_delay_ms=0.0)),
            "preferred_batches": ("preferred", side.setup.but(preferred=())),
            "padding": ("padded", side.setup.but(padded=False)),
        }
        for name, (value, without) in parts.items():
            if getattr(without, value) == getattr(side.setup, value):
                continue
            told = {"setting": name, "value": _told(side.setup, value), "instead": _told(without, value)}
            told["goodput_with"] = round(rate, 2)
            if self.clock.left() < _LEAST_STEP_S:
                self.found.brought.append({**told, "goodput_without": None, "ratio": None, "reason": NO_TIME})
                continue
            plan = Plan(0.9 * rate, _COARSE, most=1.2 * rate, least=0.05 * rate)
            found = await self.shipped.goodput(without, plan, proven=False)
            ratio = round(rate / found.rate, 3) if found.rate > 0 else None
            reason = None if ratio is not None else "without it no rate that was tried keeps the limit"
            self.found.brought.append(
                {**told, "goodput_without": round(found.rate, 2), "ratio": ratio, "reason": reason}
            )

    async def _static(self) -> None:
        """Batches that are waited for until they are full, or for half of the limit."""
        tuned, side = self.found.tuned, self.found.engine
        able = [t for t in (tuned.tried if tuned else []) if t.setup.max_batch > 1 and t.yields]
        if not able:
            self.found.reasons["static"] = "the engine is served one by one"
            return
        best = side.setup if side.setup.max_batch > 1 else max(able, key=lambda t: t.yields or 0.0).setup
        setup = best.but(max_delay_ms=round(1e3 * _STATIC * self.shipped.limit.p99_s, 3), preferred=())
        rate = side.goodput.rate if side.goodput is not None and side.goodput.rate > 0 else 1.0
        found = await self.shipped.goodput(
            setup, Plan(0.8 * rate, _COARSE, most=1.2 * rate, least=0.05 * rate), proven=False
        )
        self.found.static = Side(setup, found, curve=[*self.shipped.points.get(setup, [])])

    async def _curve(self) -> None:
        """Between the rates that the searches went through."""
        side = self.found.engine
        rate = side.goodput.rate if side.goodput is not None else 0.0
        for share in _CURVE if rate > 0 else ():
            if self.clock.left() < _LEAST_STEP_S or await self._whole(side.setup, share * rate) is None:
                self.found.reasons["curve"] = "not complete: the time ran out"
        side.curve = [*self.shipped.points.get(side.setup, [])]


def _told(setup: Setup, name: str) -> Any:
    """As JSON has it."""
    value = getattr(setup, name)
    return list(value) if isinstance(value, tuple) else value


def _not_better(tuned: Setup, start: Setup) -> str:
    return f"{tuned} was not proven to serve more than {start}"


def _not_proven(looked: Goodput) -> Goodput:
    why = "seen in a few hundred requests and not proven: so few carry no proof, or the time ran out before"
    return replace(looked, reason=why) if looked.rate > 0 else looked


def serves(point: Point | None) -> bool | None:
    """Whether a rate is served within the limit; None where that is not proven either way."""
    if point is None or point.verdict not in (KEEPS, EXCEEDS):
        return None
    return point.verdict == KEEPS


def mix_json(mix: Mix) -> dict[str, Any]:
    return {"requests": mix.to_json(), "inputs": mix.words}


def _ms(seconds: float) -> float | None:
    return 1e3 * seconds if math.isfinite(seconds) else None


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
