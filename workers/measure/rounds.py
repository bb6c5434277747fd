"""Interleaved timing of several engines: each in its own warm process, in turn, in an order drawn anew every round."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from app.domain.failures import StageFailure
from workers.measure.engine_process import WARM_UP_CAP_S, EngineProcess, WarmUp
from workers.measure.stats import P50_SAMPLES, P99_SAMPLES

Array = np.ndarray[Any, Any]

MIN_ROUNDS = 5
SLOW_ROUNDS = 6  # where two inferences do not fit into a window
P99_CAP_S = 60.0  # measured time per engine and batch size that a p99 may cost


@dataclass
class Timing:
    """What was measured of one engine at one batch size: latencies in ns, one array per round."""

    warm_up: WarmUp
    not_finite: list[str]
    rounds: list[Array] = field(default_factory=list)
    p99_refused: str | None = None  # why the p99 was not gone for, though it was wanted

    def all(self) -> Array:
        return np.concatenate(self.rounds)


@dataclass(frozen=True)
class Plan:
    """`seconds` of a window; `iterations`: least number of calls in a window, by engine."""

    rounds: int
    seconds: float
    iterations: Mapping[str, int]
    refused: Mapping[str, str]


def plan_rounds(p50_ns: Mapping[str, float], min_seconds: float, rounds: int, want_p99: bool) -> Plan:
    """How long to measure, from what the warm-up saw. Every engine gets the samples that carry its p50; slow models get
    fewer rounds (never under five); a p99 is gone for where it costs at most `P99_CAP_S`."""
    rounds = max(rounds, MIN_ROUNDS)
    if max(p50_ns.values()) * 2 > min_seconds / rounds * 1e9:
        rounds = max(MIN_ROUNDS, min(rounds, SLOW_ROUNDS))
    iterations, refused = {}, {}
    for name, p50 in p50_ns.items():
        iterations[name] = math.ceil(P50_SAMPLES / rounds)
        cost = P99_SAMPLES * p50 / 1e9
        if want_p99 and cost <= P99_CAP_S:
            iterations[name] = math.ceil(P99_SAMPLES / rounds)
        elif want_p99:
            refused[name] = f"{P99_SAMPLES} samples would take {cost:.0f} s, more than {P99_CAP_S:.0f} s"
    return Plan(rounds, min_seconds / rounds, iterations, refused)


def warm_up_cap(min_seconds: float) -> float:
    """Seconds: 10, less where a short timing was asked for."""
    return min(WARM_UP_CAP_S, max(1.0, 4 * min_seconds))


def measure(
    processes: Mapping[str, EngineProcess],
    batch: int,
    *,
    min_seconds: float,
    rounds: int,
    want_p99: bool,
    seed: int,
    progress: Callable[[float], None],
) -> tuple[dict[str, Timing], dict[str, StageFailure]]:
    """Warm up and time all engines at one batch size. An engine that fails is left out of the timings, and the others
    go on; its failure is in the second answer."""
    timings: dict[str, Timing] = {}
    failures: dict[str, StageFailure] = {}
    for name, process in processes.items():
        try:
            broken = process.prepare(batch)
            timings[name] = Timing(process.warm_up(warm_up_cap(min_seconds)), broken)
        except StageFailure as failure:
            failures[name] = failure
    if not timings:
        return {}, failures
    plan = plan_rounds({n: t.warm_up.p50_ns for n, t in timings.items()}, min_seconds, rounds, want_p99)
    for name, reason in plan.refused.items():
        timings[name].p99_refused = reason
    draw = random.Random(f"{seed}/{batch}")  # noqa: S311  (an order of turns, no secret)
    for done in range(plan.rounds):
        order = list(timings)
        draw.shuffle(order)
        for name in order:
            expected = timings[name].warm_up.p50_ns
            try:
                window = processes[name].window(plan.seconds, plan.iterations[name], expected)
                timings[name].rounds.append(window)
            except StageFailure as failure:
                failures[name] = failure
                del timings[name]
        progress((done + 1) / plan.rounds)
    return timings, failures
