"""Training as steps of a candidate: the calls of the stage `train`, and the trained program's way to ONNX. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from workers import devices, recipes
from workers.artifacts import EXPORTED_PROGRAM
from workers.candidates import Candidate, Case, Step
from workers.kernel import stages

GROUP = "quantization-aware training"
SUFFIX, NAME = "trained", "trained weights"
# What one call of a training may take: a job that is taken up again repeats one of them at most.
_CALL_S, _MOST_CALLS = 60.0, 10
_SEED = 17
_OWN_RANGES = "quantize_nncf"  # the stage that calibrates and places its rounding as OpenVINO's own tool does


@dataclass(frozen=True)
class Plan:
    """What stands before the steps of a candidate that is trained; empty with the reason where none is. `instead`: by
    stage, the steps that take its place, so that what was trained is rounded as it was trained."""

    steps: tuple[Step, ...] = ()
    instead: Mapping[str, Step] = field(default_factory=dict)
    why_not: str | None = None


def plan(case: Case) -> Plan:
    """Whether and how the job's weights may be trained. The rounding is that of the device, whatever quantizes later:
    all candidates start from one training."""
    terms = case.spec.quantization.training
    if terms.mode == "off":
        return Plan(why_not="the job switches it off")
    if EXPORTED_PROGRAM not in case.kinds:
        return Plan(why_not="only models uploaded as .pt2 can be trained")
    if not case.has_calibration:
        return Plan(why_not="it is for static int8, which needs calibration data")
    op_types = recipes.static_ops(case) or ["Conv", "MatMul", "Gemm"]
    if not case.wants("int8") or case.quantized or not case.has("Conv", "ConvTranspose", "MatMul", "Gemm"):
        return Plan(why_not="nothing would be quantized statically")
    own_data = terms.dataset_id is not None
    rounds = min(math.ceil(terms.max_seconds / _CALL_S), _MOST_CALLS)
    options: dict[str, Any] = {
        "rounds": rounds,
        "epochs": terms.epochs,
        "learning_rate": terms.learning_rate,
        "seconds": float(terms.max_seconds),
        "seed": _SEED,
        "op_types": op_types,
        "activations": devices.named(case.device).int8_activations,
        "reduce_range": devices.named(case.device) is devices.HOST and not case.int8_pays,
        "part": "calibration" if case.same_data and not own_data else "all",
        "shared": case.same_data,
        "metric": case.spec.validation.metric,
        "device": case.device,
    }
    calls = [Step("train", {**options, "round": i + 1}, ("training", "data"), group=GROUP) for i in range(rounds)]
    axes = {n: i.batch_axis for n, i in case.spec.inputs.items()} if case.spec.inputs else None
    exported: Mapping[str, Any] = {"format": "pt2", "batch_axes": axes}
    return Plan((*calls, Step("export", exported, ("data",), group=GROUP)), {_OWN_RANGES: _explicit(case, op_types)})


def _explicit(case: Case, op_types: Sequence[str]) -> Step:
    """Q/DQ nodes with the ranges that were learned."""
    step = recipes.static_int8(case, op_types)
    return replace(step, rounding=stages()[step.stage].rounding(step.options))


def trainable(candidate: Candidate) -> bool:
    """Whether it has static quantization to be trained for, and is not trained yet."""
    static = any(s.rounding is not None and "calibration" in s.extra for s in candidate.steps)
    return static and not any(s.group == GROUP for s in candidate.steps)
