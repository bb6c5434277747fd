"""How long to measure: from what a call takes and what was asked for to rounds, windows and seconds. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from workers.measure.benchmark_options import BASELINE, again
from workers.measure.engine_child import SETTLE_BELOW_NS, WARM_UP_CAP_S
from workers.measure.inputs import DISTINCT
from workers.measure.stats import P50_SAMPLES, P99_SAMPLES

MIN_ROUNDS = 5
SCREENING_ROUNDS = 6
SLOW_ROUNDS = 6  # where two inferences do not fit into a window
P99_CAP_S = 60.0  # measured time per engine and batch size that a p99 may cost
SCREENING_WARM_UP_S = 0.3
SCREENING_WARM_UP_ITERATIONS = 20
# Calls of an engine at one batch size at the very least: two inputs bound, each run and called, five rounds of one.
LEAST_CALLS = 8
_START_S = 0.4  # fork, import of what is imported, load of a small model
_WARM_UP_S = 0.15  # three windows of 30 ms that agree, and a little
SETTLE_S = 0.02
_REST_S = 0.045  # after a window, until the engine's threads sleep


@dataclass(frozen=True)
class Plan:
    """`seconds` of a window; `iterations`: least number of calls in a window, by engine."""

    rounds: int
    seconds: float
    iterations: Mapping[str, int]
    refused: Mapping[str, str]


def plan_rounds(
    p50_ns: Mapping[str, float], min_seconds: float, rounds: int, want_p99: bool, *, screening: bool = False
) -> Plan:
    """How long to measure, from what the warm-up saw. Every engine gets the samples that carry its p50; slow models get
    fewer rounds (never under five); a p99 is gone for where it costs at most `P99_CAP_S`. A screening is content with
    one call a round: it tells what is clearly slower, and no percentile."""
    rounds = max(min(rounds, SCREENING_ROUNDS) if screening else rounds, MIN_ROUNDS)
    if max(p50_ns.values()) * 2 > min_seconds / rounds * 1e9:
        rounds = max(MIN_ROUNDS, min(rounds, MIN_ROUNDS if screening else SLOW_ROUNDS))
    iterations, refused = {}, {}
    for name, p50 in p50_ns.items():
        iterations[name] = 1 if screening else math.ceil(P50_SAMPLES / rounds)
        cost = P99_SAMPLES * p50 / 1e9
        if want_p99 and not screening and cost <= P99_CAP_S:
            iterations[name] = math.ceil(P99_SAMPLES / rounds)
        elif want_p99:
            why = f"{P99_SAMPLES} samples would take {cost:.0f} s, more than {P99_CAP_S:.0f} s"
            refused[name] = "a screening goes for no p99" if screening else why
    return Plan(rounds, min_seconds / rounds, iterations, refused)


def plan_seconds(plan: Plan, p50_ns: Mapping[str, float]) -> float:
    """What the windows of all engines take."""
    return plan.rounds * sum(
        max(plan.seconds, plan.iterations[name] * p50 / 1e9) + (SETTLE_S if p50 < SETTLE_BELOW_NS else 0.0) + _REST_S
        for name, p50 in p50_ns.items()
    )


def least_seconds(p50_ns: Iterable[float]) -> float:
    """What five rounds of one call take."""
    return MIN_ROUNDS * sum(p50 / 1e9 + min(5 * p50 / 1e9, SETTLE_S) + _REST_S for p50 in p50_ns)


def shrink(plan: Plan, p50_ns: Mapping[str, float], seconds: float) -> Plan:
    """`plan` with shorter windows, then with fewer rounds, so that it takes at most `seconds`; at the least, five
    rounds of one call."""
    if plan_seconds(plan, p50_ns) <= seconds:
        return plan
    refused = dict(plan.refused)
    for name, count in plan.iterations.items():
        if count * plan.rounds >= P99_SAMPLES:
            refused[name] = "the time left did not allow it"
    for step in range(1, 40):
        factor = 0.8**step
        smaller = replace(
            plan,
            rounds=plan.rounds if step <= 3 else MIN_ROUNDS,
            seconds=plan.seconds * factor,
            iterations={n: max(1, math.ceil(i * factor)) for n, i in plan.iterations.items()},
            refused=refused,
        )
        if plan_seconds(smaller, p50_ns) <= seconds:
            return smaller
    return Plan(MIN_ROUNDS, 0.0, dict.fromkeys(plan.iterations, 1), refused)


def warm_up_cap(min_seconds: float, screening: bool = False) -> float:
    """Seconds: 10, less where a short timing was asked for, 0.3 for a screening."""
    return SCREENING_WARM_UP_S if screening else min(WARM_UP_CAP_S, max(1.0, 4 * min_seconds))


def expected_seconds(
    p50_ms: Mapping[str, Mapping[int, float | None]],
    *,
    min_seconds: float,
    rounds: int = 10,
    want_p99: bool = False,
    screening: bool = False,
    cold: bool = True,
) -> float:
    """What the benchmark of these engines is expected to take: engine → batch size → p50 in ms, None where it is not
    known (then taken as small). The engine `baseline` counts twice, as it is measured twice."""
    calls = {i: {b: (p50 or 0.0) / 1e3 for b, p50 in at.items()} for i, at in p50_ms.items()}
    if BASELINE in calls:
        calls[again(BASELINE)] = calls[BASELINE]
    total = sum(_START_S + (_START_S + sum(at.values()) if cold else 0.0) for at in calls.values())
    for batch in sorted({b for at in calls.values() for b in at}):
        p50_ns = {i: max(at[batch], 1e-6) * 1e9 for i, at in calls.items() if batch in at}
        plan = plan_rounds(p50_ns, min_seconds, rounds, want_p99, screening=screening)
        cap = warm_up_cap(min_seconds, screening)
        for p50 in p50_ns.values():
            call = p50 / 1e9
            prepare = max(2 * call, min(DISTINCT * call, cap)) if screening else DISTINCT * call
            total += prepare + max(call, min(cap, max(_WARM_UP_S, 3 * call)))
        total += plan_seconds(plan, p50_ns)
    return total


def expected_sweep_seconds(
    p50_ms: Mapping[int, float | None], *, layouts: int, min_seconds: float = 1.0, passes: int = 2
) -> float:
    """What a sweep of one engine over so many layouts is expected to take, without a p99 limit: batch size → p50 in ms
    with all cores, None where it is not known (then taken as small)."""
    total = _START_S
    for p50 in p50_ms.values():
        call = (p50 or 0.0) / 1e3 * 2  # what fewer threads and busy neighbours make of it
        window = max(min_seconds / passes, (P50_SAMPLES / passes + 1) * call)
        total += layouts * passes * (_START_S / len(p50_ms) + DISTINCT * call + max(_WARM_UP_S, call) + window)
    return total
