"""Whole decisions of the gate on engines whose true loss is known, and p99 constraints on engines whose true p99 is.

    python benchmarks/gate.py --runs 300

Each run is a search as the service makes it (`workers/search`): candidates are checked on the samples of the
search, mended where they seem to lose too much, chosen, confirmed on the other samples and judged. Only the stages are
stood in for: an engine's errors are drawn anew for every engine that is built, which is the worst case for choosing
among many. What ships is `pipeline/select.py`'s verdict.

Goals: an engine that loses 1.5 times the limit ships as *proven* in at most 5 % of the runs, whatever the number of
samples; one that loses half the limit ships in at least 90 % of them from 2,000 samples on. An engine 1.5 % over its
p99 limit passes in at most 5 %.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from _common import table, verdict

from app.domain.spec import OptimizationSpec
from workers import recipes
from workers.backends.onnxruntime import OnnxRuntimeBackend
from workers.candidates import Candidate, Case
from workers.measure.losses import bound_figures, loss_figures
from workers.measure.shares import judging
from workers.measure.stats import Level, Loss, p99_bound, paired_loss, paired_normalized_error
from workers.measure.truth import share_figures
from workers.pipeline.budget import Budget
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.checking import confidence_of_each, confirm
from workers.pipeline.checks import LOSS, p99_check
from workers.pipeline.planner import Plan
from workers.pipeline.select import Tried, judge
from workers.search.driver import Search
from workers.search.objective import BASELINE

Array = np.ndarray[Any, Any]
Draw = Callable[[np.random.Generator, float, int], Array]

LIMIT = 1.0  # percent
SAMPLES = (300, 700, 2000, 5000)
LARGE = 2000  # samples, from which on a good engine has to ship
MOST_FALSE, LEAST_SHIPPED = 0.05, 0.90
P99_OVER = 1.015
LOSSY = {"int8": 3.0, "int8-other": 2.8, "bf16": 2.6}  # and how fast they are
SAFE = "fp32"


def flips(rng: np.random.Generator, loss: float, n: int) -> Array:
    return (rng.random(n) < loss).astype(float)


def right_and_wrong(gained: float) -> Draw:
    """[n, 2]: whether the original and the engine are right; the engine gains `gained` times what it loses on the
    whole, and loses as much more."""

    def draw(rng: np.random.Generator, loss: float, n: int) -> Array:
        u, knows = rng.random(n), rng.random(n) < 0.5
        lost, won = u < (1 + gained) * loss, u > 1 - gained * loss
        original = np.where(lost, True, np.where(won, False, knows))
        return np.stack([original, np.where(lost, False, np.where(won, True, knows))], axis=1).astype(float)

    return draw


def spread(rng: np.random.Generator, loss: float, n: int) -> Array:
    """Of 1 − cosine: every sample loses something, some several times the mean."""
    return np.minimum(rng.exponential(loss, n), 2.0)


def seldom(rng: np.random.Generator, loss: float, n: int) -> Array:
    """Of 1 − cosine: few samples are wholly off, the others hardly."""
    return np.where(rng.random(n) < loss, 1.0, 1e-4)


def squares(rng: np.random.Generator, loss: float, n: int) -> Array:
    """Relative squared errors of samples, skewed, whose mean is loss²."""
    return np.asarray(loss**2 * np.exp(rng.normal(0, 1, n) - 0.5))


@dataclass(frozen=True)
class Metric:
    name: str
    draw: Draw
    loss: Callable[[Array, Level], Loss]


def _of_cosine(values: Array, level: Level) -> Loss:
    return paired_loss(values, zero_one=False, level=level, least=0.0, most=2.0)


METRICS = (
    Metric("agreement", flips, lambda v, level: paired_loss(v, zero_one=True, level=level, least=0.0)),
    Metric("top1", right_and_wrong(0.5), lambda v, level: share_figures(v, level)["losses"][0]),
    Metric("top1, many flips", right_and_wrong(1.0), lambda v, level: share_figures(v, level)["losses"][0]),
    Metric("cosine", spread, _of_cosine),
    Metric("cosine, seldom wrong", seldom, _of_cosine),
    Metric("normalized_error", squares, lambda v, level: paired_normalized_error(v, np.ones(len(v)), level)),
)


@dataclass
class Stages:
    """What the search asks of an `Evaluator`: engines are made at once, all lossy ones with the same true loss."""

    metric: Metric
    loss: float
    samples: int
    seed: int
    spec: OptimizationSpec
    apart: bool = True
    other_shapes: bool = False
    drawn: dict[tuple[str, str], Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        data = SimpleNamespace(size_bytes=1000)
        self.data = SimpleNamespace(
            calibration=SimpleNamespace(digest="c"),
            validation=SimpleNamespace(digest="v"),
            same=False,
            shapes=None,
            judging=self.samples,
            calibrating=300,
            training_samples=0,
        )
        self.export = SimpleNamespace(
            key="export",
            outputs={"model": data},
            data={"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}]},
        )

    def make(self, run: CandidateRun, _until: float) -> bool:
        graph: Any = SimpleNamespace(key=f"graph of {run.plan.id}", outputs=self.export.outputs, seconds=0.0)
        run.graph, run.steps = graph, [graph] * 3
        outputs = {"engine": SimpleNamespace(size_bytes=1000, digest=run.plan.id)}
        run.build = cast("Any", SimpleNamespace(data={"runtime": {}}, outputs=outputs))
        return True

    def _errors(self, run: CandidateRun, part: str) -> Array:
        """Other runtime options do not change the engine; everything else does."""
        engine = run.plan.id.split(".t1")[0].split(".nospin")[0]
        if (engine, part) not in self.drawn:
            rng = np.random.default_rng([self.seed, zlib.crc32(f"{engine}/{part}".encode())])
            loss = 0.0 if run.plan.lossless else self.loss
            self.drawn[engine, part] = self.metric.draw(rng, loss, judging(self.samples, cast("Any", part)))
        return self.drawn[engine, part]

    def _judged(self, run: CandidateRun, part: str, samples: int, confidence: float) -> dict[str, Any]:
        errors = self._errors(run, part)[:samples]
        level = Level(confidence)
        loss = self.metric.loss(errors, level)
        figures = loss_figures(0.0, 0.0, loss)
        bound = bound_figures([loss], level, LIMIT if part == "confirm" else None)
        facts = {"source": "dataset", "part": part, "samples": len(errors), "complete": True, "metric": "drawn"}
        return {**{k: v for k, v in figures.items() if k != "losses"}, **bound, **facts}

    def check(self, run: CandidateRun, samples: int, _until: float) -> bool:
        run.tried.accuracy = self._judged(run, "select", samples, 0.95)
        run.validate = cast(
            "Any", SimpleNamespace(options={"max_samples": samples}, data=run.tried.accuracy, seconds=0)
        )
        return True

    def confirm(self, run: CandidateRun, confidence: float, _until: float) -> bool:
        run.tried.accuracy = self._judged(run, "confirm", self.spec.validation.max_samples, confidence)
        return True

    def time(self, runs: Sequence[CandidateRun], _until: float, **_: Any) -> Any:
        engines = {run.plan.id: _figures(_ratio(run)) for run in runs}
        return SimpleNamespace(data={"engines": {**engines, BASELINE: _figures(1.0)}, "batch_sizes": [1]}, made={})

    def memory_bytes(self) -> float:
        return 1e12

    def expected_check_seconds(self, *_: Any) -> float:
        return 0.0

    def ranges_of(self, *_: Any) -> None:
        return None

    def quantized_before(self, *_: Any) -> bool:
        return True

    def call(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(data={"nodes": [{"name": f"n{i}", "op_type": "MatMul", "error": 1.0} for i in range(8)]})


def _ratio(run: CandidateRun) -> float:
    mended = run.plan.id.count(".") - run.plan.id.count(".t1") - run.plan.id.count(".nospin")
    return {**LOSSY, SAFE: 1.3}[run.plan.id.split(".")[0]] * (0.95 if mended else 1.0)


def _figures(ratio: float) -> dict[str, Any]:
    around = {"ratio": ratio, "low": 0.97 * ratio, "high": 1.03 * ratio}
    at = {"p50_ms": 10 / ratio, "mean_ms": 10 / ratio, "min_ms": 9 / ratio, "speedup": around}
    return {"batches": {"1": {**at, "throughput_ratio": around, "throughput_qps": 100 * ratio}}, "size_bytes": 1000}


def decision(metric: Metric, loss: float, samples: int, seed: int) -> tuple[bool, bool]:
    """Whether a lossy engine ships, and whether as proven. `loss`: the true one of all lossy engines, a fraction."""
    validation = {"dataset_id": "dst_v", "max_accuracy_loss_percent": LIMIT, "max_samples": 10_000}
    body = {"model_id": "m", "calibration": {"dataset_id": "dst_c"}, "validation": validation}
    spec = OptimizationSpec.model_validate({**body, "benchmark": {"batch_sizes": [1]}})
    case = Case(spec, {"MatMul": 8}, "transformer", isa=["avx512_vnni"], cores=2, has_calibration=True)
    stages: Any = Stages(metric, loss, samples, seed, spec)
    budget = Budget(900.0, lambda: 0.0)
    budget.share(30.0, 0)
    plan = Plan(tuple(_candidate(case, name) for name in (*LOSSY, SAFE)), ())
    found = Search(case, plan, {"onnxruntime": OnnxRuntimeBackend()}, stages, budget).run()
    confirm(spec, stages, found.finalists, budget.end, confidence_of_each(spec, found.finalists))
    for run in found.finalists:
        run.tried.figures = _figures(_ratio(run))
    picked = judge(spec, Tried(BASELINE, "fp32", True, figures=_figures(1.0)), [r.tried for r in found.runs], {}).picked
    shipped = next((r for r in found.runs if r.plan.id == picked), None)
    if shipped is None or shipped.plan.lossless:
        return False, False
    return True, any(c.name == LOSS and bool(c.proven) for c in shipped.tried.checks)


def _candidate(case: Case, name: str) -> Candidate:
    steps = (recipes.simplify(), *((recipes.static_int8(case, ["MatMul"]),) if "int8" in name else ()))
    precision = "int8" if "int8" in name else name
    return Candidate(name, name, "onnxruntime", precision, steps, lossless=name == SAFE)


# p99


def latencies(rng: np.random.Generator, n: int, rounds: int = 10) -> Array:
    """In ms: a skewed body, one call in fifty delayed, and a machine that is a little slower in some rounds."""
    body = np.exp(rng.normal(0, 0.03, n))
    delayed = np.where(rng.random(n) < 0.02, rng.exponential(0.1, n), 0.0)
    machine = np.repeat(np.exp(rng.normal(0, 0.005, rounds)), -(-n // rounds))[:n]
    return np.asarray((body + delayed) * machine)


def passes_p99(limit: float, samples: int, seed: int) -> bool:
    measured = latencies(np.random.default_rng(seed), samples)
    at = {"samples": samples, "p99_ms": float(np.quantile(measured, 0.99)), "p99_bound_ms": p99_bound(measured)}
    return p99_check(at, limit).passed


# All of it


def _cell(task: tuple[int, float, int, int]) -> tuple[float, float]:
    index, times, samples, runs = task
    found = [decision(METRICS[index], times * LIMIT / 100, samples, seed) for seed in range(runs)]
    return sum(s for s, _ in found) / runs, sum(p for _, p in found) / runs


def gate_table(runs: int, workers: int) -> tuple[str, bool]:
    tasks = [(i, times, n, runs) for i in range(len(METRICS)) for n in SAMPLES for times in (1.5, 0.5)]
    with ProcessPoolExecutor(workers) as pool:
        found: Mapping[Any, tuple[float, float]] = dict(zip(tasks, pool.map(_cell, tasks), strict=True))
    rows, good = [], True
    for i, metric in enumerate(METRICS):
        for n in SAMPLES:
            (bad_ships, bad_proven), (ships, proven) = found[i, 1.5, n, runs], found[i, 0.5, n, runs]
            good &= bad_proven <= MOST_FALSE and (n < LARGE or ships >= LEAST_SHIPPED)
            shares = (bad_proven, bad_ships, ships, proven)
            rows.append([metric.name, f"{n:,}", *(f"{100 * share:.1f} %" for share in shares)])
    head = ["metric", "samples", "1.5 × limit: proven", "ships", "0.5 × limit: ships", "proven"]
    return table(head, rows), good


def p99_table(runs: int) -> tuple[str, bool]:
    true = float(
        np.quantile(np.concatenate([latencies(np.random.default_rng(10**6 + i), 5000) for i in range(400)]), 0.99)
    )
    rows, good = [], True
    for samples in (299, 662, 2000):
        over, exactly, under = (
            sum(passes_p99(true / factor, samples, seed) for seed in range(runs)) / runs
            for factor in (P99_OVER, 1, 0.8)
        )
        good &= over <= MOST_FALSE
        rows.append([f"{samples:,}", *(f"{100 * share:.1f} %" for share in (over, exactly, under))])
    return table(["calls", "1.5 % over the limit: passes", "at the limit", "20 % under"], rows), good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="decisions of each kind")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    accuracy, kept = gate_table(arguments.runs, arguments.processes)
    print(accuracy, flush=True)
    print(f"\n1.5 × the limit proven in at most 5 %, half of it shipped in 90 % from {LARGE:,} on: {verdict(kept)}\n")
    latency, held = p99_table(10 * arguments.runs)
    print(latency)
    print(f"\n1.5 % over the p99 limit passes in at most 5 %: {verdict(held)}")
    return 0 if kept and held else 1


if __name__ == "__main__":
    raise SystemExit(main())
