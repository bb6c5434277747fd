"""A quantized candidate, quantized otherwise: equalized, calibrated by another method, with nodes left in higher
precision. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from workers.candidates import Candidate, Step
from workers.search.limits import ALPHAS
from workers.search.state import Facts


def is_quantized(plan: Candidate) -> bool:
    """Whether there is a step to mend: what only computes in another precision has none."""
    return any(step.rounding is not None for step in plan.steps)


def quantization(plan: Candidate) -> tuple[int, Step]:
    """The step that quantizes, and where it stands."""
    return next((i, s) for i, s in enumerate(plan.steps) if s.rounding is not None)


def equalized(facts: Facts, plan: Candidate) -> tuple[Candidate, ...]:
    """The same nodes quantized after their activations were evened out."""
    index, step = quantization(plan)
    if step.rounding is None or not (step.rounding.in_onnx and facts.products and facts.has_calibration):
        return ()
    if _is_trained(facts, plan):
        return ()  # trained weights go with the ranges that they were trained with
    return tuple(_equalized(plan, index, alpha, same_data=facts.same_data) for alpha in ALPHAS)


def calibrated_otherwise(facts: Facts, plan: Candidate) -> tuple[Candidate, ...]:
    """The same nodes with other ranges; none where the job asks for a method."""
    index, step = quantization(plan)
    free = facts.spec.calibration is not None and facts.spec.calibration.method == "auto"
    if step.rounding is None or "method" not in step.options or not free or _is_trained(facts, plan):
        return ()
    found = []
    for method in (m for m in step.rounding.calibrations if m != step.options["method"]):
        other = replace(step, options={**step.options, "method": method})
        found.append(_changed(plan, index, other, method, f"{method} calibration"))
    return tuple(found)


def kept(plan: Candidate, nodes: Sequence[str]) -> Candidate:
    """The candidate with these nodes in higher precision."""
    index, step = quantization(plan)
    before = step.options.get("exclude_nodes", ())
    excluded = replace(step, options={**step.options, "exclude_nodes": sorted({*before, *nodes})})
    return _changed(plan, index, excluded, f"keep{len(nodes)}", f"{len(nodes)} sensitive nodes in higher precision")


def trained(facts: Facts, plan: Candidate) -> Candidate | None:
    """The candidate with trained weights; None where it has them, or is not quantized statically."""
    _, step = quantization(plan)
    if not facts.training or "calibration" not in step.extra or _is_trained(facts, plan):
        return None
    return plan.after(facts.training, "trained", "trained weights", facts.training_instead)


def _is_trained(facts: Facts, plan: Candidate) -> bool:
    return bool(facts.training) and plan.steps[0].group == facts.training[0].group


def _equalized(plan: Candidate, index: int, alpha: float, *, same_data: bool) -> Candidate:
    options = {"alpha": alpha, "part": "calibration" if same_data else "all"}
    steps = [*plan.steps]
    steps.insert(index, Step("equalize", options, ("calibration",)))
    return replace(
        plan, id=f"{plan.id}.equalized-{alpha}", name=f"{plan.name}, equalized ({alpha})", steps=tuple(steps)
    )


def _changed(plan: Candidate, index: int, step: Step, suffix: str, name: str) -> Candidate:
    steps = [*plan.steps]
    steps[index] = step
    return replace(plan, id=f"{plan.id}.{suffix}", name=f"{plan.name}, {name}", steps=tuple(steps))
