"""What is worth trying on ONNX Runtime's CUDA provider."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workers import recipes
from workers.candidates import Candidate, Case, Proposal, Skipped, Step
from workers.devices.cuda import compute_capability

_NAME = "onnxruntime-cuda"


def precisions(hardware: Mapping[str, Any]) -> tuple[str, ...]:
    """What gains here: float16 on all GPUs, bfloat16 from Ampere on. int8 is no gain: the provider computes Q/DQ graphs
    in floating point."""
    return ("fp32", "fp16", "bf16") if compute_capability(hardware) >= 8.0 else ("fp32", "fp16")


def propose(case: Case) -> Proposal:
    """Priors: p50 over the CUDA provider's fp32 default (docs/gpu-figures.md)."""
    if case.spec.target.device == "cpu":
        return Proposal()
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    # Nodes that the job keeps in higher precision have their names in the graph as it is.
    plain = case.kind != "transformer" or case.spec.quantization.keep_nodes
    fused = None if plain else recipes.simplify(fusions=True)
    if case.wants("fp32"):
        candidates.append(_candidate("ortcuda-fp32", "CUDA, fp32", "fp32", [recipes.simplify()], lossless=True))
        if fused is not None:
            name = "CUDA, fp32, transformer fusions"
            candidates.append(_candidate("ortcuda-fp32-fused", name, "fp32", [fused], lossless=True, prior=0.75))
    convertible = case.has("Conv", "ConvTranspose", "MatMul", "Gemm", "Attention", "LSTM", "GRU")
    for precision, prior in (("fp16", 0.4), ("bf16", 0.5)):
        if not case.wants(precision) or precision not in precisions(case.hardware):
            continue
        if case.quantized or not convertible:
            skipped.append(Skipped(f"ortcuda-{precision}", "the model has no float32 products to convert"))
            continue
        steps = [recipes.simplify(), _converted(case, precision)]
        candidates.append(_candidate(f"ortcuda-{precision}", f"CUDA, {precision}", precision, steps, prior=prior))
        # In float16 the provider no longer finds the patterns by itself, whose constants are rounded; and bfloat16
        # needs a newer opset, to which no fused graph is converted.
        if fused is not None and precision == "fp16":
            steps, name = [fused, _converted(case, precision)], "CUDA, fp16, transformer fusions"
            candidates.append(_candidate("ortcuda-fp16-fused", name, precision, steps, prior=0.3))
    if case.wants("int8"):
        _int8(case, candidates, skipped)
    return Proposal(tuple(candidates), tuple(skipped))


def variants(case: Case, candidate: Candidate) -> tuple[Candidate, ...]:
    """One captured launch for all kernels, and for convolutions cuDNN's channels-last layout."""
    found = [candidate.variant("graph", "CUDA graph", cuda_graph=True)]
    if case.kind == "cnn" and candidate.precision in ("fp16", "bf16"):
        found.append(candidate.variant("nhwc", "channels last, CUDA graph", cuda_graph=True, prefer_nhwc=True))
    return tuple(found)


def _converted(case: Case, precision: str) -> Step:
    """Where there are data, a few samples tell which nodes leave float16's range, and stay in float32."""
    options = {"recipe": precision, **recipes.kept_nodes(case)}
    if precision != "fp16" or not case.has_calibration:
        return Step("convert", options)
    return Step("convert", {**options, **recipes.range_options(case)}, ("calibration",))


def _int8(case: Case, candidates: list[Candidate], skipped: list[Skipped]) -> None:
    asked = case.spec.precisions is not None
    if not asked or not case.has_calibration or case.quantized:
        reason = (
            "the CUDA provider has no int8 convolution or matrix product: it computes Q/DQ graphs in floating point"
            if case.has_calibration or not asked
            else "static int8 needs calibration data"
        )
        skipped.append(Skipped("ortcuda-int8", reason))
        return
    step = Step(
        "convert",
        {
            "recipe": "int8",
            "method": recipes.calibration_method(case),
            **recipes.calibration_options(case),
            **recipes.kept_nodes(case),
        },
        ("calibration",),
    )
    name = "CUDA, int8 Q/DQ computed in fp32"
    candidate = _candidate("ortcuda-int8", name, "int8", [recipes.simplify(), step], prior=1.5)
    # Rewriting Q/DQ for integer kernels, which the provider lacks, would send some of them to the CPU.
    candidates.append(replace(candidate, build_options={"session_config": {"session.disable_quant_qdq": "1"}}))


def _candidate(
    cid: str, name: str, precision: str, steps: list[Step], *, lossless: bool = False, prior: float = 0.98
) -> Candidate:
    gain = recipes.GRAPH_GAIN
    return Candidate(cid, name, _NAME, precision, tuple(steps), lossless=lossless, prior=prior, options_gain=gain)
