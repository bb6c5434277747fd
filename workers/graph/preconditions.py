"""What the quantizing stages share: which models and nodes they take, and calibration data."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import onnx
from onnx import ModelProto, TensorProto

from app.domain.failures import FailureKind, StageFailure, model_failure
from workers.data import Samples
from workers.graph import quantizable as quantization
from workers.graph import rewriting as graphs
from workers.graph.onnx_files import read_skeleton, save_model
from workers.graph.onnx_graph import model_specs, opset_of
from workers.graph.prepare import node_names, prepare

OLDEST_OPSET = 13  # QuantizeLinear with an axis, and Cast to bfloat16

_LOW_PRECISION = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

Part = Literal["all", "calibration"]


def check_source(model: ModelProto, exclude_nodes: Sequence[str]) -> None:
    """Raises StageFailure: `already_quantized`, `not_float32`, `opset_too_old`, `unknown_node`."""
    if quantization.is_quantized(model):
        raise model_failure(
            "already_quantized",
            "The model already holds quantized operators.",
            remedy="Upload the float32 model, or ask for no further precision.",
        )
    if any(i.data_type in _LOW_PRECISION for i in model.graph.initializer):
        raise model_failure(
            "not_float32",
            "The model's weights are already in float16 or bfloat16.",
            remedy="Upload the float32 model.",
        )
    opset = opset_of(model)
    if opset < OLDEST_OPSET:
        raise model_failure(
            "opset_too_old",
            f"Quantization needs opset {OLDEST_OPSET}; the model has {opset}.",
            remedy="Export the model with opset 17 or later.",
        )
    check_names(model, exclude_nodes)


def check_names(model: ModelProto, names: Sequence[str]) -> None:
    """Raises `unknown_node` for the first name that no node has, at any depth; it tells the closest ones."""
    known = node_names(model)
    unknown = sorted(set(names) - known)
    if not unknown:
        return
    close = difflib.get_close_matches(unknown[0], sorted(known), n=3)
    hint = f" The closest names are {', '.join(map(repr, close))}." if close else ""
    raise StageFailure(
        "unknown_node",
        f"{unknown[0]!r} is no node of the simplified model.{hint}",
        FailureKind.REQUEST,
        node=unknown[0],
        remedy="Use node names of the simplified model, as the report lists them.",
    )


def op_types_for(
    model: ModelProto,
    asked: Sequence[str] | None,
    excluded: Sequence[str],
    recipe: Literal["dynamic_int8", "static_int8"],
) -> list[str]:
    """The op types to quantize, sorted; raises `nothing_to_quantize`."""
    op_types = list(asked or quantization.default_op_types(model, recipe))
    if recipe == "dynamic_int8":
        op_types = [op for op in op_types if op not in quantization.DYNAMIC_FORBIDDEN]
    if not quantization.quantizable_nodes(model, op_types, excluded):
        raise nothing_to_quantize(f"no node of the types {', '.join(sorted(op_types)) or '(none)'}")
    return sorted(set(op_types))


def nothing_to_quantize(reason: str) -> StageFailure:
    return model_failure(
        "nothing_to_quantize",
        f"There is nothing to quantize: the model has {reason}.",
        remedy="Use another precision for this model.",
    )


def calibration_samples(data: Path, model: Path, part: Part, max_samples: int) -> Samples:
    """The calibration data set at `data` for the model file `model`."""
    graph = read_skeleton(model)
    inputs, outputs = model_specs(graph)
    return Samples(data, inputs, outputs, part=part, max_samples=max_samples)


def in_opset(prepared: Path, minimum: int, workspace: Path) -> Path:
    """The prepared model in at least this opset, with the types inferred anew; raises `opset_conversion_failed`."""
    model = onnx.load(prepared)
    if opset_of(model) >= minimum:
        return prepared
    folder = workspace / "raised"
    folder.mkdir()
    return prepare(save_model(graphs.raise_opset(model, minimum), folder), folder)
