"""Graphs whose precision is explicit: what of a graph each one takes, and how such a graph looks without any data."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import onnx
from onnx import ModelProto

from app.domain.failures import StageFailure, model_failure
from workers.graph import learned_ranges, rewriting
from workers.graph import preconditions as shared
from workers.graph.onnx_files import read_skeleton
from workers.graph.precision import floats, int4
from workers.graph.prepare import prepare
from workers.graph.qdq import placement

Recipe = Literal["fp16", "bf16", "int8", "fp8", "int4"]
High = Literal["fp32", "fp16", "bf16"]  # what int8, fp8 and int4 graphs compute in outside of their Q/DQ

_ANY_RANGE = (-1.0, 1.0)
_WITH_PRODUCTS = frozenset({*rewriting.WEIGHTED_OPS, "LSTM", "GRU", "RNN", "Attention", "Einsum"})


def least_opset(recipe: Recipe, high: High) -> int:
    """That a graph of this precision needs."""
    needed = {"int8": placement.OPSET, "fp8": placement.OPSET, "int4": int4.OPSET}
    least = needed.get(recipe, 0)
    return max(least, floats.BF16_OPSET) if "bf16" in (recipe, high) else least


def to_halves(model: ModelProto, low: floats.Low, keep: Collection[str] = ()) -> floats.Converted:
    """`floats.to_low`; raises `nothing_to_convert` where no product has a form in it."""
    made = floats.to_low(model, low, keep)
    if not set(made.by_op) & _WITH_PRODUCTS:
        raise _nothing(f"no product or convolution has a form in {low}")
    return made


def eight_bit_targets(
    model: ModelProto, eight: placement.Eight, op_types: Collection[str] | None = None, excluded: Collection[str] = ()
) -> placement.Targets:
    """`placement.targets`; raises `nothing_to_convert` where there are none."""
    wanted = placement.targets(model, eight, op_types, excluded)
    if not wanted.nodes:
        raise _nothing(f"no product or convolution that {eight} suits")
    return wanted


def placed(made: placement.Placed) -> placement.Placed:
    """Raises `nothing_to_convert` where nothing was placed."""
    if not made.by_op:
        raise _nothing("no product or convolution with float32 weights of a fitting shape")
    return made


def without_data(source: Path, recipe: Recipe, workspace: Path) -> ModelProto:
    """The ONNX model at `source` in this precision, the rest of it in float16 where that is not 16 bits itself. Its
    ranges are made up: it shows what such a graph is built of, and computes nothing of use. `workspace`: an empty
    folder. Raises StageFailure: `already_quantized`, `not_float32`, `opset_too_old`, `opset_conversion_failed`,
    `nothing_to_convert`."""
    original = read_skeleton(source)
    shared.check_source(original, ())
    high: High = "fp32" if recipe in ("fp16", "bf16") else "fp16"
    prepared = shared.in_opset(prepare(source, workspace), least_opset(recipe, high), workspace)
    model = onnx.load(prepared)
    if recipe in ("int8", "fp8"):
        targets = eight_bit_targets(model, recipe)
        ranges = dict.fromkeys(targets.tensors, _ANY_RANGE)
        model = placed(placement.place(model, recipe, targets, ranges, high)).model
    elif recipe == "int4":
        wanted = int4.targets(model, int4.BLOCKS[0], ())
        model = placed(int4.place(model, wanted, {}, high)).model
    elif recipe in ("fp16", "bf16"):
        model = to_halves(model, recipe).model
    if high != "fp32":
        model = floats.to_low(model, high).model
    rewriting.restore_interface(model, original)
    learned_ranges.attach(model, None)
    return model


def _nothing(reason: str) -> StageFailure:
    return model_failure(
        "nothing_to_convert",
        f"There is nothing to convert: the model has {reason}.",
        remedy="Use another precision for this model.",
    )
