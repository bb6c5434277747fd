"""A quantized candidate, quantized otherwise: equalized, calibrated by another method, with nodes left in higher
precision. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from workers.candidates import Candidate, Step
from workers.search.limits import ALPHAS, HOPELESS
from workers.search.state import Facts


def is_quantized(plan: Candidate) -> bool:
    """Whether there is a step to mend: what only computes in another precision has none."""
    return any(step.rounding is not None for step in plan.steps)


def quantization(plan: Candidate) -> tuple[int, Step]:
    """The step that quantizes, and where it stands."""
    return next((i, s) for i, s in enumerate(plan.steps) if s.rounding is not None)


def other_ways(facts: Facts, plan: Candidate, loss: float) -> tuple[Candidate, ...]:
    """To quantize the same nodes. `loss`: percent, of the candidate as it is."""
    index, step = quantization(plan)
    assert step.rounding is not None
    found: list[Candidate] = []
    if step.rounding.in_onnx and facts.products and facts.has_calibration:
        found += [_equalized(plan, index, alpha, same_data=facts.same_data) for alpha in ALPHAS]
    spec = facts.spec
    free = spec.calibration is not None and spec.calibration.method == "auto"
    if "method" in step.options and free and loss <= HOPELESS * max(spec.validation.max_accuracy_loss_percent, 0.1):
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
    if not facts.training or "calibration" not in step.extra or plan.steps[0].group == facts.training[0].group:
        return None
    return plan.after(facts.training, "trained", "trained weights")


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
