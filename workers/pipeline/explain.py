"""After the verdict: what each part of the shipped engine gained and cost (measured by leaving it out), how to run it
(batch size, instances, threads), and where its time goes. They use what is left of the budget, and say so where it is
too little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.domain.failures import StageFailure
from workers.kernel import Backend
from workers.pipeline.ablation import Part, parts
from workers.pipeline.evaluate import SEED, CandidateRun, Evaluator
from workers.pipeline.runner import Outcome

if TYPE_CHECKING:
    from workers.pipeline.optimize import Optimization

_ABLATION_SHARE = 0.5  # of what the budget leaves; the sweep gets the rest
_ABLATION_SECONDS = 1.0  # per engine, at the batch size of the final metrics
_SWEEP_SECONDS = 1.0  # per configuration
_LEAST_S = 3.0
_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass
class Ablated:
    """One part of the shipped engine. `figures`: of the engine without it, compared with the shipped one in the same
    run. `accuracy`: of the engine without it."""

    part: Part
    run: CandidateRun | None = None
    figures: Mapping[str, Any] | None = None
    accuracy: Mapping[str, Any] | None = None
    reason: str | None = None


def ablate(found: Optimization, evaluator: Evaluator, backends: Mapping[str, Backend]) -> list[Ablated]:
    """Each part of the picked candidate with the engine that lacks it, timed beside the picked one."""
    picked = found.picked
    if picked is None:
        return []
    budget = found.budget
    until = budget.elapsed() + _ABLATION_SHARE * budget.left(budget.end)
    others = [r.plan for r in found.runs if r.build is not None]
    defaults = dict(backends[picked.plan.backend].plain_runtime)
    ablated = [Ablated(p) for p in parts(picked.plan, others, defaults)]
    made: list[CandidateRun] = []
    for item in sorted(ablated, key=lambda item: _urgency(item.part)):
        without = item.part.without
        if without is None:
            item.reason = item.part.reason
            continue
        run = CandidateRun.of(without)
        if budget.left(until) < _LEAST_S:
            item.reason = f"not measured: the budget of {found.spec.budget_seconds} s left no time for it"
        elif not evaluator.make(run, until):
            item.reason = f"the engine without it could not be built: {run.tried.failed}"
        elif not evaluator.check(run, _samples(found), until):
            item.reason = f"the engine without it does not work: {run.tried.failed or 'its outputs are broken'}"
        else:
            item.run, item.accuracy = run, run.tried.accuracy
            made.append(run)
    if made:
        _time(found, evaluator, picked, ablated, made, until)
    return ablated


def _urgency(part: Part) -> int:
    """Where the time does not hold all of them, what usually matters most is measured: it comes first."""
    if part.stage is None:  # the backend, its runtime options, nodes kept
        return 1
    return 0 if "quantize" in part.stage or part.stage == "convert" else 2


def _samples(found: Optimization) -> int:
    """As many as judged the picked one: the difference is then between like and like."""
    assert found.picked is not None
    validate = found.picked.validate
    return int(validate.options["max_samples"]) if validate else found.spec.validation.max_samples


def _time(
    found: Optimization,
    evaluator: Evaluator,
    picked: CandidateRun,
    ablated: list[Ablated],
    made: list[CandidateRun],
    until: float,
) -> None:
    groups = evaluator.groups_that_fit([picked, *made])
    side_by_side = groups[0] if groups and picked in groups[0] else [picked]
    seconds = min(_ABLATION_SECONDS, found.spec.benchmark.min_seconds)
    try:
        timed = evaluator.time(
            side_by_side,
            until,
            min_seconds=seconds,
            screening=True,
            compare_to=picked.plan.id,
            batch_sizes=[int(found.verdict.primary_batch)],
        )
    except StageFailure as failure:
        if not _is_ours_to_bear(failure):
            raise
        for item in ablated:
            item.reason = item.reason or f"not measured: {failure.detail}"
        return
    engines = timed.data["engines"]
    for item in ablated:
        if item.run is not None:
            item.figures = engines.get(item.run.plan.id)


def sweep(found: Optimization, evaluator: Evaluator) -> Outcome | None:
    """Batch sizes × instances × threads of what ships; None where the budget leaves no time."""
    budget = found.budget
    if budget.left(budget.end) < _LEAST_S:
        return None
    spec = found.spec
    inputs = {"engine": found.engine}
    if evaluator.data.validation is not None:
        inputs["data"] = evaluator.data.validation
    # Who wants the lowest latency has named the batch sizes; throughput and cost may lie beyond them.
    more = _BATCHES if found.export.data.get("dynamic_batch") and spec.objective != "latency" else ()
    options = {
        "backend": found.backend,
        "runtime": found.runtime,
        "batch_sizes": sorted({*spec.benchmark.batch_sizes, *more}),
        "min_seconds": min(_SWEEP_SECONDS, spec.benchmark.min_seconds),
        "p99_limit_ms": spec.constraints.p99_latency_ms,
        "objective": spec.objective,
        "shapes": evaluator.data.shapes,
        "seed": SEED,
    }
    try:
        return evaluator.call("sweep", inputs, options, found.verdict.picked, budget.end)
    except StageFailure as failure:
        if not _is_ours_to_bear(failure):
            raise
        return None


def profile(found: Optimization, evaluator: Evaluator) -> Outcome | None:
    """Layer by layer, and against the machine's memory bandwidth; None where the budget leaves no time."""
    budget = found.budget
    if budget.left(budget.end) < _LEAST_S:
        return None
    inputs = {"engine": found.engine}
    if evaluator.data.validation is not None:
        inputs["data"] = evaluator.data.validation
    options = {
        "backend": found.backend,
        "runtime": found.runtime,
        "batch": int(found.verdict.primary_batch),
        "shapes": evaluator.data.shapes,
        "seed": SEED,
    }
    try:
        return evaluator.call("profile", inputs, options, found.verdict.picked, budget.end)
    except StageFailure as failure:
        if not _is_ours_to_bear(failure):
            raise
        return None


def _is_ours_to_bear(failure: StageFailure) -> bool:
    """What ships is proven already: an explanation that takes too long or too much memory does not fail the job."""
    return failure.code in ("timed_out", "out_of_memory", "budget_exhausted")
