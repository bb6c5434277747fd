"""Which candidates to try. Pure: the spec, what the export found out, the hardware, and what this worker's backends
offer go in; candidates come out as data. A candidate is a list of keyed actions, so it can be cached, resumed, compared
and moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.domain.spec import OptimizationSpec

# Where int8 gains on x86, by measurement. Convolutions never dynamically: ConvInteger is 4 to 22 times slower.
DYNAMIC_OPS = ("MatMul", "Gemm", "Attention", "LSTM")
TRANSFORMER_STATIC_OPS = ("MatMul", "Gemm")  # LayerNorm, masks and Add break when quantized
CNN_STATIC_OPS = (
    "Conv",
    "MatMul",
    "Gemm",
    "Add",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Relu",
    "Clip",
    "Concat",
    "Mul",
)
INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})


@dataclass(frozen=True)
class Step:
    """One stage call of a candidate; `extra` names further inputs beside the graph that flows from step to step."""

    stage: str
    options: Mapping[str, Any]
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A configuration to try: the graph steps, then how the backend builds it."""

    id: str
    name: str
    backend: str
    precision: str
    steps: tuple[Step, ...]
    build_options: Mapping[str, Any] = field(default_factory=dict)
    lossless: bool = False  # the same arithmetic: differs from the original by rounding only

    @property
    def recipe(self) -> str:
        return " → ".join([_describe(s) for s in self.steps] + ["build"])


@dataclass(frozen=True)
class Skipped:
    """Something the user asked for, or would expect, that is not tried; and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    candidates: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Facts:
    """What the planner knows of the case. `ops`: op type → count in the exported graph."""

    ops: Mapping[str, int]
    kind: str
    quantized: bool
    isa: Sequence[str]
    backends: Sequence[str]
    has_calibration: bool
    same_data: bool  # one data set for calibration and validation: it is split


def plan(spec: OptimizationSpec, facts: Facts) -> Plan:
    """The candidates to try, the plainest first."""
    wanted = spec.precisions or ["fp32", "int8"]
    if "onnxruntime" not in facts.backends or not _allowed(spec, "onnxruntime"):
        return Plan((), (Skipped("all", "this worker has no backend that the job allows"),))
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    if "fp32" in wanted:
        candidates.append(_candidate("fp32-simplified", "simplified fp32", "fp32", [_simplify()], lossless=True))
        if facts.kind == "transformer":
            fused = _simplify(fusions=True)
            candidates.append(_candidate("fp32-fused", "fp32, transformer fusions", "fp32", [fused], lossless=True))
    if "int8" in wanted:
        _int8(spec, facts, candidates, skipped)
    skipped += [
        Skipped(precision, f"no recipe for {precision} gains on this hardware with the backends of this worker")
        for precision in wanted
        if precision not in ("fp32", "int8")
    ]
    return Plan(tuple(candidates), tuple(skipped))


def _int8(spec: OptimizationSpec, facts: Facts, candidates: list[Candidate], skipped: list[Skipped]) -> None:
    if facts.quantized:
        skipped.append(Skipped("int8", "the model is quantized already"))
        return
    # Without dot-product instructions the 8-bit product may saturate in 16 bits: one bit less for the weights.
    reduce_range = not INT8_FLAGS & set(facts.isa)
    dynamic = [op for op in DYNAMIC_OPS if facts.ops.get(op)]
    mostly_conv = facts.kind == "cnn"
    if dynamic and not mostly_conv:
        step = Step(
            "quantize",
            {"recipe": "dynamic_int8", "op_types": dynamic, "per_channel": True, "reduce_range": reduce_range},
        )
        candidates.append(_candidate("int8-dynamic", "dynamic int8", "int8", [_simplify(), step]))
    else:
        reason = (
            "convolutions run slower with dynamic int8" if mostly_conv else "no operator that dynamic int8 speeds up"
        )
        skipped.append(Skipped("int8-dynamic", reason))
    static = CNN_STATIC_OPS if mostly_conv else TRANSFORMER_STATIC_OPS
    static_ops = [op for op in static if facts.ops.get(op)]
    if not facts.has_calibration:
        skipped.append(Skipped("int8-static", "static int8 needs calibration data"))
    elif not any(facts.ops.get(op) for op in ("Conv", "MatMul", "Gemm")):
        skipped.append(Skipped("int8-static", "no operator that static int8 speeds up"))
    else:
        assert spec.calibration is not None
        method = "minmax" if spec.calibration.method == "auto" else spec.calibration.method
        step = Step(
            "quantize",
            {
                "recipe": "static_int8",
                "method": method,
                "op_types": static_ops,
                "activations": "uint8",
                "per_channel": True,
                "reduce_range": reduce_range,
                "max_samples": spec.calibration.max_samples,
                "part": "calibration" if facts.same_data else "all",
            },
            ("calibration",),
        )
        name = f"static int8 QDQ, {method} calibration"
        candidates.append(_candidate("int8-static", name, "int8", [_simplify(), step]))


def _candidate(cid: str, name: str, precision: str, steps: Sequence[Step], *, lossless: bool = False) -> Candidate:
    return Candidate(cid, name, "onnxruntime", precision, tuple(steps), lossless=lossless)


def _simplify(*, fusions: bool = False) -> Step:
    return Step("simplify", {"fusions": fusions})


def _allowed(spec: OptimizationSpec, backend: str) -> bool:
    return spec.target.backends is None or backend in spec.target.backends


def _describe(step: Step) -> str:
    if step.stage == "quantize":
        method = step.options.get("method")
        return f"quantize({step.options['recipe']}{', ' + str(method) if method else ''})"
    if step.stage == "simplify":
        return "simplify(fusions)" if step.options.get("fusions") else "simplify"
    return step.stage
