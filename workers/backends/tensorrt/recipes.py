"""What TensorRT is worth trying with, by compute capability, model kind and data at hand. Pure.

Priors are expected p50 latency over ONNX Runtime's fp32 CUDA default at batch 1, from NVIDIA's published ratios; none
was measured by this service yet. They decide the order of trying only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers import recipes
from workers.backends.tensorrt.graph import NEEDS, least_capability
from workers.backends.tensorrt.library import TENSORRT, Library
from workers.backends.tensorrt.probe import capability
from workers.candidates import Candidate, Case, Narrowing, Proposal, Skipped, Step

# Large integers are held to be narrowed until a run on a GPU shows which of its layers keep int64.
ARITHMETIC = Narrowing("float32", "int32, or in float32", "TensorRT 11's documentation; never run here")
CONVERTED_OPS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
# What the rest of a graph computes in, for a candidate's name.
_REST = {"fp16": "", "bf16": "", "int8": ", the rest fp16", "fp8": ", the rest fp16", "int4": " weights, the rest fp16"}
_PRIORS = {"fp32": 0.85, "tf32": 0.7, "fp16": 0.4, "bf16": 0.45, "int8": 0.3, "fp8": 0.3, "int4": 0.6}
# int8 has kernels for every convolution, fp8 for products and attention.
_PRIORS_BY_KIND = {"cnn": {"int8": 0.25, "fp8": 0.42}, "transformer": {"int8": 0.38, "fp8": 0.28}}


def propose(case: Case, library: Library = TENSORRT) -> Proposal:
    if case.spec.target.device == "cpu":
        return Proposal()
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    gpu = case.hardware.get("gpu") or {}
    found = str(gpu.get("compute_capability", ""))
    if capability(found) == (0, 0):
        return Proposal((), (Skipped(library.name, "this worker knows of no NVIDIA GPU"),))
    if not library.builds_for(found):
        known = ", ".join(library.capabilities)
        lacks = f"{library.title} runs on compute capability {known}; this GPU has {found}"
        return Proposal((), (Skipped(library.name, lacks),))
    short, title = library.prefix, library.title
    if case.wants("fp32"):
        plain = [recipes.simplify()]
        candidates.append(_candidate(library, case, f"{short}-fp32", f"{title} fp32", "fp32", plain, tf32=False))
        if capability(found) >= (8, 0):
            name = f"{title} fp32 with TF32"
            candidates.append(_candidate(library, case, f"{short}-tf32", name, "fp32", plain, tf32=True))
        else:
            skipped.append(Skipped(f"{short}-tf32", f"TF32 needs compute capability 8.0, this GPU has {found}"))
    for precision in ("fp16", "bf16", "int8", "fp8", "int4"):
        if not case.wants(precision):
            continue
        reason = _why_not(case, precision, found)
        if reason:
            skipped.append(Skipped(f"{short}-{precision}", reason))
        else:
            steps = [recipes.simplify(), _step(case, precision)]
            name = f"{title} {precision}{_REST[precision]}"
            candidates.append(_candidate(library, case, f"{short}-{precision}", name, precision, steps, tf32=True))
    return Proposal(tuple(candidates), tuple(skipped))


def variants(candidate: Candidate) -> Sequence[Candidate]:
    """With and without CUDA graph: it saves the launches, which small models at small batches spend their time on."""
    return (candidate.variant("graph", "CUDA graph", cuda_graph=True),)


def _why_not(case: Case, precision: str, found: str) -> str | None:
    if capability(found) < NEEDS[precision]:
        return f"{precision} needs compute capability {least_capability(precision)}, this GPU has {found}"
    if case.quantized:
        return "the model is quantized already: its own Q/DQ nodes decide"
    ops = ("MatMul", "Gemm") if precision == "int4" else CONVERTED_OPS
    if not case.has(*ops):
        return f"no operator that {precision} speeds up"
    if precision in ("int8", "fp8") and not case.has_calibration:
        return f"static {precision} needs calibration data"
    if precision == "int4" and case.spec.precisions is None:
        return "int4 weights gain where few tokens are computed at a time; ask for it to have it tried"
    return None


def _step(case: Case, precision: str) -> Step:
    """The graph in explicit precision. What is not in eight or four bits is fp16, the fastest that all of these GPUs
    have. bf16 has float32's range, and asks no samples."""
    options: dict[str, Any] = {"recipe": precision, **recipes.kept_nodes(case)}
    if _REST[precision]:
        options["high_precision"] = "fp16"
    calibrated = precision in ("int8", "fp8") or (case.has_calibration and precision != "bf16")
    if not calibrated:
        return Step("convert", options)
    if precision in ("int8", "fp8"):
        options["method"] = recipes.calibration_method(case)
    samples = recipes.range_options(case) if precision == "fp16" else recipes.calibration_options(case)
    return Step("convert", {**options, **samples}, ("calibration",))


def _candidate(
    library: Library, case: Case, cid: str, name: str, precision: str, steps: list[Step], *, tf32: bool
) -> Candidate:
    gpu = (case.hardware.get("gpu") or {}).get("compute_capability")
    options = {
        **case.spec.tensorrt.model_dump(exclude_defaults=True),
        **({} if library.needs_gpu else {"target": str(gpu)}),
        "precision": precision,
        "tf32": tf32,
        "batch_sizes": sorted(case.spec.benchmark.batch_sizes),
    }
    priors = _PRIORS | _PRIORS_BY_KIND.get(case.kind, {})
    prior = priors["tf32" if precision == "fp32" and tf32 else precision]
    # TF32 keeps ten bits of the mantissa: only plain fp32 differs by rounding alone.
    narrows = ARITHMETIC.of(case)
    lossless = precision == "fp32" and not tf32 and narrows is None
    return Candidate(
        cid,
        name,
        library.name,
        precision,
        tuple(steps),
        options,
        lossless=lossless,
        prior=prior,
        narrows=narrows,
        options_gain=recipes.GRAPH_GAIN,
    )
