"""Interleaved timing of several engines: each in its own warm process, in turn, in an order drawn anew every round."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from app.domain.failures import FailureKind, StageFailure
from workers.measure.disturbance import Disturbance, Window
from workers.measure.engine_child import LONGEST_SETTLE_S, WARM_UP_ITERATIONS, WarmUp
from workers.measure.engine_process import EngineProcess
from workers.measure.plan import (
    LEAST_CALLS,
    MIN_ROUNDS,
    SCREENING_WARM_UP_ITERATIONS,
    SETTLE_S,
    Plan,
    least_seconds,
    plan_rounds,
    plan_seconds,
    shrink,
    warm_up_cap,
)
from workers.measure.quiet import Quiet

Array = np.ndarray[Any, Any]

_PREPARE_SHARE = 0.4  # of the time that a batch size may take: binding the inputs and warming up
_LEAST_LIMIT_S = 10.0  # before which no engine is given up
_RETAKES = 2  # of a window that had company


@dataclass
class Timing:
    """What was measured of one engine at one batch size: latencies in ns, one array per round."""

    warm_up: WarmUp
    not_finite: list[str]
    rounds: list[Array] = field(default_factory=list)
    p99_refused: str | None = None  # why the p99 was not gone for, though it was wanted
    disturbed: dict[int, str] = field(default_factory=dict)  # rounds that had company, and which
    meanwhile: list[Disturbance] = field(default_factory=list)  # by round, what else happened

    def all(self) -> Array:
        """Of the rounds that count."""
        return np.concatenate([self.rounds[i] for i in counting(self)[0]])


def counting(*sides: Timing, least: int = MIN_ROUNDS) -> tuple[list[int], bool]:
    """The rounds in which none of these had company, and whether they are enough to claim something; where they are
    not, all rounds."""
    rounds, clean = range(len(sides[0].rounds)), _clean(*sides)
    return (clean, True) if len(clean) >= min(least, len(rounds)) else ([*rounds], False)


@dataclass
class Measured:
    """Of one batch size. `failures`: engines that are left out of `timings`, and why. `shortened`: the time left did
    not hold all distinct inputs, or the rounds and windows that were asked for. `windows`: what happened in each window
    that was taken, those that were taken again included."""

    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, StageFailure] = field(default_factory=dict)
    shortened: bool = False
    windows: list[Disturbance] = field(default_factory=list)


def budget_exhausted(name: str) -> StageFailure:
    """For an engine that the time left does not hold. Another run may have more time: it is never cached."""
    return StageFailure(
        "budget_exhausted",
        f"Engine {name!r} was not measured: the time left does not hold it beside those listed before it.",
        FailureKind.REQUEST,
        remedy="Raise `budget_seconds`, or lower `benchmark.min_seconds`.",
        cacheable=False,
    )


def measure(
    processes: Mapping[str, EngineProcess],
    batch: int | str,
    *,
    min_seconds: float,
    rounds: int,
    want_p99: bool,
    seed: int,
    progress: Callable[[float], None],
    screening: bool = False,
    ends: float = math.inf,
    always: Collection[str] = (),
    quiet: Quiet | None = None,
    company: Callable[[], str | None] | None = None,
) -> Measured:
    """Warm up and time all engines at one batch size (or at the shape of that label). An engine that fails is left out
    of the timings, and the others go on.

    `ends`: `time.monotonic()` by which it should be done. Where the time does not hold the plan, distinct inputs (never
    under two), windows and rounds shrink (never under five rounds of one call); where it does not hold that either, the
    last engines are left out (`budget_exhausted`), never those named in `always`: what the others are compared with.

    A window that something else disturbed is taken again, and rounds are added, as long as the time has room for that;
    `quiet` waits for the machine before (None: no waiting, one more try). `company` is asked after every round what
    disturbed it beside what the kernel tells.
    """
    found = Measured()
    for done, (name, process) in enumerate(processes.items()):
        left = ends - time.monotonic()
        if name not in always and _too_late(found, left):
            found.failures[name] = budget_exhausted(name)
            continue
        share = left * _PREPARE_SHARE / (len(processes) - done)
        try:
            limit = math.inf if name in always else max(left, _LEAST_LIMIT_S)
            found.timings[name], cut = _ready(process, batch, min_seconds, share, limit, screening)
            found.shortened |= cut
        except StageFailure as failure:
            found.failures[name] = failure
    if not found.timings:
        return found
    for name in _over(found, ends - time.monotonic(), always):
        found.failures[name] = budget_exhausted(name)
        del found.timings[name]
    p50_ns = {n: t.warm_up.p50_ns for n, t in found.timings.items()}
    wanted = plan_rounds(p50_ns, min_seconds, rounds, want_p99, screening=screening)
    plan = shrink(wanted, p50_ns, ends - time.monotonic())
    found.shortened |= plan != wanted
    for name, reason in plan.refused.items():
        found.timings[name].p99_refused = reason
    if quiet is not None:
        quiet.grant(plan_seconds(plan, p50_ns))
    turns = _Turns(processes, found, plan, p50_ns, ends, quiet)
    draw = random.Random(f"{seed}/{batch}")  # noqa: S311  (an order of turns, no secret)
    while turns.done < plan.rounds or turns.worth_more(always):
        order = list(found.timings)
        draw.shuffle(order)
        for name in order:
            try:
                turns.take(name)
            except StageFailure as failure:
                found.failures[name] = failure
                del found.timings[name]
        turns.close(company() if company else None)
        progress(min(turns.done / plan.rounds, 1.0))
    return found


class _Turns:
    """The windows of one batch size, round by round. A window that had company is taken again, once the machine is
    quiet: as long as the time has room for it beside the plan, and `quiet` has patience."""

    def __init__(
        self,
        processes: Mapping[str, EngineProcess],
        found: Measured,
        plan: Plan,
        p50_ns: dict[str, float],
        ends: float,
        quiet: Quiet | None,
    ) -> None:
        self.done = 0
        self._processes, self._found, self._plan, self._p50_ns = processes, found, plan, p50_ns
        self._ends = ends
        self._quiet = quiet

    def take(self, name: str) -> None:
        """The next round's window of this engine."""
        window = self._window(name)
        for _ in range(_RETAKES):
            if window.disturbance.disturbed is None or not self._again(name):
                break
            window = self._window(name)
        timing = self._found.timings[name]
        reason = window.disturbance.disturbed
        if reason is not None:
            timing.disturbed[len(timing.rounds)] = reason
        timing.rounds.append(window.latencies)
        timing.meanwhile.append(window.disturbance)

    def close(self, company: str | None) -> None:
        """The round is over; `company`: what disturbed the whole of it."""
        if company is not None:
            for timing in self._found.timings.values():
                timing.disturbed[len(timing.rounds) - 1] = company
            self._found.windows.append(replace(self._found.windows[-1], device=company))
        self.done += 1

    def worth_more(self, compared: Collection[str]) -> bool:
        """Whether rounds beyond the plan are needed, promising and in time. `compared`: those that all others are
        compared with."""
        timings = self._found.timings
        others = [timings[n] for n in compared if n in timings]
        last = sum(self.done - 1 in t.disturbed for t in timings.values())
        if not timings or self.done >= 2 * self._plan.rounds or 2 * last > len(timings):
            return False
        clean = min(len(_clean(t, *others)) for t in timings.values())
        return clean < self._plan.rounds and self._spare() >= 0

    def _window(self, name: str) -> Window:
        plan, best = self._plan, self._p50_ns
        window = self._processes[name].window(plan.seconds, plan.iterations[name], best[name], self._settle_seconds())
        best[name] = min(best[name], float(np.median(window.latencies)))
        self._found.windows.append(window.disturbance)
        return window

    def _again(self, name: str) -> bool:
        cost = plan_seconds(replace(self._plan, rounds=1), {name: self._p50_ns[name]})
        spare = self._spare() - cost
        if self._quiet is None:
            return spare >= 0
        return self._quiet.wait(spare)

    def _spare(self) -> float:
        """What the time left has beyond the plan; after it, beyond one more round."""
        to_do = replace(self._plan, rounds=max(self._plan.rounds - self.done, 1))
        left = self._ends - time.monotonic()
        return left - plan_seconds(to_do, {n: self._p50_ns[n] for n in self._found.timings})

    def _settle_seconds(self) -> float:
        """How long the next engine may take to come back to its speed: what the time left has beyond the plan, shared
        by the windows to come; never less than the plan has for it."""
        windows = max(self._plan.rounds - self.done, 1) * len(self._found.timings)
        return min(LONGEST_SETTLE_S, max(SETTLE_S, self._spare() / windows))


def _clean(*sides: Timing) -> list[int]:
    return [i for i in range(len(sides[0].rounds)) if not any(i in side.disturbed for side in sides)]


def _ready(
    process: EngineProcess, batch: int | str, min_seconds: float, share: float, limit_s: float, screening: bool
) -> tuple[Timing, bool]:
    """Inputs bound and warm, within about `share` seconds where one inference does not take longer; and whether inputs
    were left out for it."""
    cap = warm_up_cap(min_seconds, screening)
    start = time.monotonic()
    broken = process.prepare(batch, min(share / 2, cap) if screening else share / 2, limit_s)
    cut = time.monotonic() - start > share / 2
    iterations = SCREENING_WARM_UP_ITERATIONS if screening else WARM_UP_ITERATIONS
    return Timing(process.warm_up(min(cap, max(share / 2, 0.0)), iterations), broken), cut


def _too_late(found: Measured, left: float) -> bool:
    """Whether one more engine, as slow as the slowest so far, does not fit beside those that are ready."""
    if math.isinf(left) or not found.timings:
        return False
    p50_ns = [t.warm_up.p50_ns for t in found.timings.values()]
    return least_seconds(p50_ns) + LEAST_CALLS * p50_ns[0] / 1e9 > left


def _over(found: Measured, left: float, always: Collection[str]) -> list[str]:
    """The last engines, as many as have to go so that five rounds of one call fit."""
    kept = {n: t.warm_up.p50_ns for n, t in found.timings.items()}
    gone = []
    for name in reversed(found.timings):
        if least_seconds(kept.values()) <= left:
            break
        if name not in always:
            del kept[name]
            gone.append(name)
    return gone
