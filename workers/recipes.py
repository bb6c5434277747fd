"""Graph steps that several backends share, as data; which ops pay follows what was measured (docs/search.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.candidates import Case, Step

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


# What a CUDA graph gained over launching each kernel, at most: a BERT-base in float16 with fused operators, at batch 1
# on an H100 (docs/gpu-figures.md), where all precisions took the same time without one.
GRAPH_GAIN = 5.0

_RANGE_SAMPLES = 32  # each is an inference on the CPU
_SMALL_BYTES = 2_000_000
_FEW_CORES = 4


def is_small(case: Case) -> bool:
    """Whether a call takes well under a millisecond, by the size of the weights."""
    return 0 < case.size_bytes < _SMALL_BYTES


def why_not_one_thread(case: Case) -> str | None:
    """Why one thread is not expected to be faster than one per core; None where it may be. Not measured in the search;
    the sweep of what ships measures it."""
    if not case.size_bytes or is_small(case) or case.cores > _FEW_CORES:
        return None
    return f"a model of this size is expected to gain by all of {case.cores} cores; only the sweep measures one thread"


def simplify(*, fusions: bool = False) -> Step:
    return Step("simplify", {"fusions": fusions})


def calibration_options(case: Case) -> dict[str, Any]:
    """How a calibrating step takes its samples; what calibrates never judges."""
    assert case.spec.calibration is not None
    return {
        "max_samples": case.spec.calibration.max_samples,
        "part": "calibration" if case.same_data else "all",
    }


def range_options(case: Case) -> dict[str, Any]:
    """How a conversion to fp16 takes the samples that tell which nodes leave its range; only a few."""
    options = calibration_options(case)
    return {**options, "max_samples": min(options["max_samples"], _RANGE_SAMPLES)}


def calibration_method(case: Case) -> str:
    """The method asked for; `minmax` where the service is to choose (the others are tried when accuracy is lost)."""
    assert case.spec.calibration is not None
    method = case.spec.calibration.method
    return "minmax" if method == "auto" else method


def kept_nodes(case: Case) -> dict[str, Any]:
    """The nodes that the job keeps in higher precision, as an option of every quantizing step."""
    return {"exclude_nodes": sorted(set(case.spec.quantization.keep_nodes))}


def dynamic_int8(case: Case, op_types: Sequence[str], *, per_channel: bool = True) -> Step:
    options = {
        "recipe": "dynamic_int8",
        "op_types": [*op_types],
        "per_channel": per_channel,
        "reduce_range": not case.int8_pays,
        **kept_nodes(case),
    }
    return Step("quantize", options)


def static_int8(case: Case, op_types: Sequence[str], *, method: str | None = None) -> Step:
    """Q/DQ nodes in ONNX: uint8 activations and int8 weights per channel, as x86 wants them. Without dot-product
    instructions the 8-bit product may saturate in 16 bits: one bit less for the weights."""
    options = {
        "recipe": "static_int8",
        "method": method or calibration_method(case),
        "op_types": [*op_types],
        "activations": "uint8",
        "per_channel": True,
        "reduce_range": not case.int8_pays,
        **calibration_options(case),
        **kept_nodes(case),
    }
    return Step("quantize", options, ("calibration",))


def static_ops(case: Case) -> list[str]:
    """Op types to quantize statically: everything around convolutions, products only elsewhere."""
    return case.has(*(CNN_STATIC_OPS if case.kind == "cnn" else TRANSFORMER_STATIC_OPS))
