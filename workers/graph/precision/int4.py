"""int4 weight-only quantization, block by block: products read a quarter of the bytes, and compute as before.

The scale of every block is searched: the one that loses least of the product's output, where a channel counts as much
as its activations are large. After J. Lin et al., "AWQ: Activation-aware Weight Quantization", 2023 (its clipping; its
scaling of channels is in `awq`); without activations all channels count alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from workers.graph import rewriting as graphs
from workers.graph.qdq.placement import Placed, Scales, declare_floats

OPSET = 21  # int4, and DequantizeLinear in blocks
BLOCKS = (128, 64, 32)  # elements along the reduced axis; the largest that divides it
_RATIOS = np.linspace(1.0, 0.6, 9)  # of a block's largest magnitude
_LEVELS = 7.0  # of [-8, 7]; the eighth is used where rounding asks for it
_SCALE_TYPES: dict[Scales, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def targets(model: ModelProto, block_size: int, excluded: Collection[str]) -> dict[int, tuple[int, int]]:
    """Index of each MatMul or Gemm with two-dimensional weights → (the reduced axis of the weights, block size)."""
    weights = graphs.float_weights(model)
    found: dict[int, tuple[int, int]] = {}
    for index, node in enumerate(model.graph.node):
        weight = weights.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") and len(node.input) > 1 else None
        if weight is None or node.name in excluded or len(weight.dims) != 2 or node.input[0] in weights:
            continue
        axis = 1 - graphs.output_axis(node, 2)
        block = next((b for b in BLOCKS if b <= block_size and weight.dims[axis] % b == 0), None)
        if block is not None:
            found[index] = (axis, block)
    return found


def place(
    model: ModelProto,
    wanted: Mapping[int, tuple[int, int]],
    importance: Mapping[str, Any],
    scales: Scales = "fp32",
) -> Placed:
    """The model (in at least opset 21) with int4 weights at `wanted`. `importance`: mean square of each channel of the
    activations, by tensor name."""
    graph = model.graph
    weights = graphs.float_weights(model)
    done: dict[str, str] = {}
    before: list[NodeProto] = []
    by_op: Counter[str] = Counter()
    for index, (axis, block) in wanted.items():
        node = graph.node[index]
        name = node.input[1]
        key = f"{name}_axis{axis}"
        if key not in done:
            array = graphs.array_of(weights[name])
            channels = importance.get(node.input[0])
            if channels is None or np.shape(channels) != (array.shape[axis],):
                channels = np.ones(array.shape[axis], np.float32)
            packed, scale = quantize(array, axis, block, channels, _SCALE_TYPES[scales])
            graph.initializer.append(_int4(f"{key}_int4", packed))
            graph.initializer.append(numpy_helper.from_array(scale, f"{key}_scale"))
            done[key] = f"{key}_dequantized"
            inputs = [f"{key}_int4", f"{key}_scale"]
            name_of = f"{key}_DequantizeLinear"
            before.append(
                helper.make_node("DequantizeLinear", inputs, [done[key]], name_of, axis=axis, block_size=block)
            )
        node.input[1] = done[key]
        by_op[node.op_type] += 1
    graphs.replace_nodes(graph, [*before, *graph.node])
    graphs.drop_unused(graph)
    declare_floats(model, list(done.values()))
    return Placed(model, dict(sorted(by_op.items())), len(done))


def quantize(weight: Any, axis: int, block: int, importance: Any, scale_type: Any = np.float32) -> tuple[Any, Any]:
    """(int8 array of values in [-8, 7], float32 scales with `axis` divided by `block`) of a 2-d weight."""
    moved = np.moveaxis(np.asarray(weight, np.float32), axis, 0)  # reduced axis first
    size, columns = moved.shape
    blocks = moved.reshape(size // block, block, columns)
    cost = np.asarray(importance, np.float32).reshape(size // block, block, 1)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    best = np.full_like(largest, np.inf)
    scale = np.ones_like(largest)
    for ratio in _RATIOS:
        tried = np.maximum(largest * np.float32(ratio / _LEVELS), np.float32(2.0**-14))
        tried = tried.astype(scale_type).astype(np.float32)
        error = (((_rounded(blocks, tried) * tried - blocks) ** 2) * cost).sum(axis=1, keepdims=True)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, tried, scale)
    values = _rounded(blocks, scale).astype(np.int8).reshape(size, columns)
    scales = scale.reshape(size // block, columns)
    return np.ascontiguousarray(np.moveaxis(values, 0, axis)), np.ascontiguousarray(np.moveaxis(scales, 0, axis))


def rounded(weight: Any, block: int) -> Any:
    """A float32 weight [reduced axis, columns] as int4 gives it back, without a search: each block by its largest."""
    blocks = weight.reshape(weight.shape[0] // block, block, weight.shape[1])
    scale = np.maximum(np.abs(blocks).max(axis=1, keepdims=True) / np.float32(_LEVELS), np.float32(2.0**-14))
    return (_rounded(blocks, scale) * scale).reshape(weight.shape)


def _rounded(blocks: Any, scale: Any) -> Any:
    return np.clip(np.rint(blocks / scale), -8, 7)


def _int4(name: str, values: Any) -> TensorProto:
    """Two values to a byte, the first in the low half."""
    flat = values.reshape(-1).astype(np.uint8) & 0x0F
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed = (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)
    return helper.make_tensor(name, TensorProto.INT4, values.shape, packed.tobytes(), raw=True)
