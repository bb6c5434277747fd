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
from workers.measure.engine_process import LONGEST_SETTLE_S, WARM_UP_ITERATIONS, EngineProcess, WarmUp
from workers.measure.plan import (
    LEAST_CALLS,
    SCREENING_WARM_UP_ITERATIONS,
    SETTLE_S,
    Plan,
    least_seconds,
    plan_rounds,
    plan_seconds,
    shrink,
    warm_up_cap,
)

Array = np.ndarray[Any, Any]

_PREPARE_SHARE = 0.4  # of the time that a batch size may take: binding the inputs and warming up
_LEAST_LIMIT_S = 10.0  # before which no engine is given up


@dataclass
class Timing:
    """What was measured of one engine at one batch size: latencies in ns, one array per round."""

    warm_up: WarmUp
    not_finite: list[str]
    rounds: list[Array] = field(default_factory=list)
    p99_refused: str | None = None  # why the p99 was not gone for, though it was wanted

    def all(self) -> Array:
        return np.concatenate(self.rounds)


@dataclass
class Measured:
    """Of one batch size. `failures`: engines that are left out of `timings`, and why. `shortened`: the time left did
    not hold all distinct inputs, or the rounds and windows that were asked for."""

    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, StageFailure] = field(default_factory=dict)
    shortened: bool = False


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
) -> Measured:
    """Warm up and time all engines at one batch size (or at the shape of that label). An engine that fails is left out
    of the timings, and the others go on.

    `ends`: `time.monotonic()` by which it should be done. Where the time does not hold the plan, distinct inputs (never
    under two), windows and rounds shrink (never under five rounds of one call); where it does not hold that either, the
    last engines are left out (`budget_exhausted`), never those named in `always`.
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
    draw = random.Random(f"{seed}/{batch}")  # noqa: S311  (an order of turns, no secret)
    for done in range(plan.rounds):
        order = list(found.timings)
        draw.shuffle(order)
        for name in order:
            try:
                settle = _settle_seconds(plan, found, p50_ns, done, ends - time.monotonic())
                window = processes[name].window(plan.seconds, plan.iterations[name], p50_ns[name], settle)
                found.timings[name].rounds.append(window)
                p50_ns[name] = min(p50_ns[name], float(np.median(window)))
            except StageFailure as failure:
                found.failures[name] = failure
                del found.timings[name]
        progress((done + 1) / plan.rounds)
    return found


def _settle_seconds(plan: Plan, found: Measured, p50_ns: Mapping[str, float], done: int, left: float) -> float:
    """How long the next engine may take to come back to its speed: what the time left has beyond the plan, shared by
    the windows to come; never less than the plan has for it."""
    names = [*found.timings]
    to_do = replace(plan, rounds=plan.rounds - done)
    spare = left - plan_seconds(to_do, {n: p50_ns[n] for n in names})
    return min(LONGEST_SETTLE_S, max(SETTLE_S, spare / (to_do.rounds * len(names))))


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
