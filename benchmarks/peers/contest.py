"""Engines side by side: each warm in its own process, in turns, in an order drawn anew every round."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from peers.runner import EngineFailed, Runner
from workers.measure.stats import ratio_of_medians

Array = np.ndarray[Any, Any]

ROUNDS = 20  # short turns: on a machine that is slow at times, all engines of a round see the same moment
SLOW_ROUNDS = 6
SLOW_S = 0.3  # of one call: rounds of such engines take long
LEAST_CALLS = 3  # in a round; one where calls are slow
WARM_UP_S = 4.0


def measure(
    specs: Mapping[str, Mapping[str, Any]],
    data: Path,
    folder: Path,
    batches: tuple[int, ...],
    seconds: float,
    axes: Mapping[str, int | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """For each engine: `facts`, `outputs` (arrays on all of the data), `rounds` ({batch: latencies in ns, one array per
    round}), or `error`. `seconds`: measured time per engine and batch, over all rounds. `axes`: of the inputs whose
    samples lie along another one than the first."""
    found: dict[str, dict[str, Any]] = {name: {} for name in specs}
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for name, spec in specs.items():
            runner = stack.enter_context(Runner(name, spec, data, axes or {}))
            try:
                found[name]["facts"] = runner.load()
                found[name]["outputs"] = runner.outputs(folder / f"{name}.npz")
                runners[name] = runner
            except EngineFailed as failure:
                found[name]["error"] = str(failure)
                runner.__exit__()
        for batch in batches:
            timed = one_batch(runners, batch, seconds, found)
            for name, rounds in timed.items():
                found[name].setdefault("rounds", {})[batch] = rounds
    return found


def one_batch(
    runners: dict[str, Runner], batch: int, seconds: float, found: dict[str, dict[str, Any]]
) -> dict[str, list[Array]]:
    """An engine that fails is taken out of `runners`, its error goes into `found`."""
    rounds: dict[str, list[Array]] = {}
    p50_s: dict[str, float] = {}

    def out(name: str, failure: EngineFailed) -> None:
        found[name]["error"] = f"batch {batch}: {failure}"
        rounds.pop(name, None)
        runners.pop(name).__exit__()

    for name, runner in list(runners.items()):
        try:
            runner.prepare(batch)
            p50_s[name] = runner.warm_up(WARM_UP_S)
            rounds[name] = []
        except EngineFailed as failure:
            out(name, failure)
    draw = random.Random(batch)
    count = SLOW_ROUNDS if max(p50_s.values(), default=0) > SLOW_S else ROUNDS
    for _ in range(count):
        order = list(rounds)
        draw.shuffle(order)
        for name in order:
            try:
                rounds[name].append(runners[name].window(seconds / count, 1 if p50_s[name] > SLOW_S else LEAST_CALLS))
            except EngineFailed as failure:
                out(name, failure)
    return rounds


def figures(mine: list[Array], reference: list[Array]) -> dict[str, Any]:
    """p50 in ms, and its ratio to the reference's with a 95 % interval (lower is better)."""
    p50 = float(np.median(np.concatenate(mine))) / 1e6
    calls = sum(len(r) for r in mine)
    return {"p50_ms": float(f"{p50:.5g}"), "calls": calls, "ratio": ratio_of_medians(mine, reference).to_json()}
