"""The cheapest call of each engine, timed beside the call of a user: what is left when the inputs lie ready and the
outputs stay where the library put them. A caller who binds tensors sees these figures; `infer.py` does not."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from app.domain.failures import StageFailure
from workers.measure.disturbance import Window
from workers.measure.engine_process import EngineProcess
from workers.measure.figures import itself, rounded
from workers.measure.plan import MIN_ROUNDS, SETTLE_S
from workers.measure.stats import percentiles, ratio_of_medians

Array = np.ndarray[Any, Any]

WINDOW_S = 0.01
LEAST_CALLS = 4  # in a window: 12 in the fewest rounds that count carry a median
LEAST_CLEAN = 3  # rounds that nothing disturbed, for a speed-up
_REST_S = 0.03
_NS_PER_MS = 1e6


def bound_seconds(p50_ns: Collection[float]) -> float:
    """What it is expected to take for engines of these latencies; a binding may run once."""
    calls = sum(MIN_ROUNDS * (max(WINDOW_S, LEAST_CALLS * p50 / 1e9) + min(5 * p50 / 1e9, SETTLE_S)) for p50 in p50_ns)
    return calls + MIN_ROUNDS * _REST_S * len(p50_ns) + 16 * sum(p50_ns) / 1e9


def measure_bound(
    processes: Mapping[str, EngineProcess], p50_ns: Mapping[str, float], baseline: str, seed: int
) -> tuple[dict[str, dict[str, Any]], dict[str, Array], dict[str, StageFailure]]:
    """({engine: {p50_ms, samples, speedup {ratio, low, high}}}, {engine: latencies in ns}, engines that failed in it).

    The engines are warm from the measurement before, at the same batch size; `p50_ns` is what that saw of them. The
    speed-up is that of the bound calls over the bound calls of `baseline`, one process each; None where too few
    rounds were undisturbed.
    """
    found: dict[str, list[Window]] = {}
    failed: dict[str, StageFailure] = {}
    expected = dict(p50_ns)
    for name, process in processes.items():
        try:
            process.bind()
            found[name] = []
        except StageFailure as failure:
            failed[name] = failure
    draw = random.Random(f"{seed}/bound")  # noqa: S311  (an order of turns, no secret)
    for _ in range(MIN_ROUNDS):
        order = list(found)
        draw.shuffle(order)
        for name in order:
            try:
                window = processes[name].window(WINDOW_S, LEAST_CALLS, expected[name], SETTLE_S)
            except StageFailure as failure:
                failed[name] = failure
                del found[name]
                continue
            found[name].append(window)
            expected[name] = min(expected[name], float(np.median(window.latencies)))
    figures = {name: _figures(rounds, found.get(baseline), name == baseline, seed) for name, rounds in found.items()}
    return figures, {name: np.concatenate([w.latencies for w in rounds]) for name, rounds in found.items()}, failed


def _figures(rounds: list[Window], baseline: list[Window] | None, is_baseline: bool, seed: int) -> dict[str, Any]:
    """Of the rounds without company on either side; without enough of those there is no speed-up, and p50 is of all."""
    sides = [rounds] if baseline is None else [rounds, baseline]
    clean = [i for i in range(len(rounds)) if all(side[i].disturbance.disturbed is None for side in sides)]
    enough = len(clean) >= LEAST_CLEAN
    chosen = [rounds[i].latencies for i in (clean if enough else range(len(rounds)))]
    samples = np.concatenate(chosen)
    values, _ = percentiles(samples, _NS_PER_MS)
    speedup = itself()["speedup"] if is_baseline else None
    if baseline is not None and not is_baseline and enough:
        speedup = ratio_of_medians([baseline[i].latencies for i in clean], chosen, seed).to_json()
    return {"p50_ms": rounded(values["p50"]), "samples": len(samples), "speedup": speedup}
