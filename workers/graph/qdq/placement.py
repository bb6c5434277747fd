"""Q/DQ nodes placed by TensorRT's rules, for int8 and fp8 (E4M3).

Symmetric, with static positive scales: activations per tensor, weights per output channel. Pairs stand on the first
input of every Conv, ConvTranspose, Gemm and MatMul with weights, and on the skip branch of a residual Add, so that the
sum is fused into the convolution before it. Weights are stored in eight bits with a DequantizeLinear; biases stay in
floating point. Products of two activations (attention) stay as they are. One pair serves all readers of a tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from workers.graph import rewriting as graphs

Eight = Literal["int8", "fp8"]
Scales = Literal["fp32", "fp16", "bf16"]
OPSET = 19  # Q/DQ of float8, and of float16 and bfloat16 values
LARGEST: dict[Eight, float] = {"int8": 127.0, "fp8": 448.0}
_SCALE_TYPES: dict[Scales, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
# Smallest scale by the type it is stored in; below the normal numbers of float16 the bits run out.
_LEAST: dict[Scales, float] = {"fp32": 1e-12, "fp16": 2.0**-14, "bf16": 1e-12}
_FP8_CHANNELS = 16  # tensor cores take fp8 in groups of 16


@dataclass(frozen=True)
class Targets:
    """`nodes`: indices of the nodes whose first input and weights are quantized; `branches`: (index, input position) of
    residual sums; `tensors`: the activations that need a range."""

    nodes: tuple[int, ...]
    branches: tuple[tuple[int, int], ...]
    tensors: tuple[str, ...] = ()


@dataclass
class Placed:
    model: ModelProto
    by_op: Mapping[str, int]
    pairs: int
    left: Mapping[str, int] = field(default_factory=dict)


def targets(model: ModelProto, eight: Eight, op_types: Collection[str] | None, excluded: Collection[str]) -> Targets:
    """What there is to quantize; needs inferred types."""
    weights, floats = graphs.float_weights(model), graphs.float_tensors(model)
    nodes = _weighted(model, eight, op_types, excluded)
    branches = _residuals(model, set(nodes), weights, floats, excluded) if _with_sums(op_types) else []
    tensors = [model.graph.node[i].input[0] for i in nodes] + [model.graph.node[i].input[k] for i, k in branches]
    return Targets(tuple(nodes), tuple(branches), tuple(sorted(set(tensors))))


def roundable(model: ModelProto, eight: Eight, op_types: Collection[str] | None) -> tuple[str, ...]:
    """The activations that get a pair whichever nodes are excluded, sorted: which side of a sum that is depends on
    that."""
    everything = targets(model, eight, op_types, ())
    sums = [model.graph.node[index].input for index, _ in everything.branches]
    return tuple(sorted({*everything.tensors, *(name for names in sums for name in names)}))


def _with_sums(op_types: Collection[str] | None) -> bool:
    return op_types is None or "Add" in op_types


def _weighted(
    model: ModelProto, eight: Eight, op_types: Collection[str] | None, excluded: Collection[str]
) -> list[int]:
    graph = model.graph
    weights, floats = graphs.float_weights(model), graphs.float_tensors(model)
    wanted = set(graphs.WEIGHTED_OPS if op_types is None else op_types)
    return [
        index
        for index, node in enumerate(graph.node)
        if node.op_type in wanted
        and node.op_type in graphs.WEIGHTED_OPS
        and node.name not in excluded
        and len(node.input) > 1
        and node.input[1] in weights
        and node.input[0] in floats
        and node.input[0] not in weights
        and (eight == "int8" or _suits_fp8(node, weights[node.input[1]]))
        and len(weights[node.input[1]].dims) >= 2
    ]


def _suits_fp8(node: NodeProto, weight: TensorProto) -> bool:
    """fp8 kernels exist for plain convolutions and products whose channels fill the tensor cores' groups."""
    if node.op_type == "ConvTranspose" or int(graphs.attribute(node, "group", 1)) != 1:
        return False
    return all(size % _FP8_CHANNELS == 0 for size in list(weight.dims)[:2])


def _residuals(
    model: ModelProto,
    nodes: set[int],
    weights: Mapping[str, TensorProto],
    floats: set[str],
    excluded: Collection[str],
) -> list[tuple[int, int]]:
    """Sums of a quantized convolution's output (read by nothing else) and another activation: the other's position."""
    graph = model.graph
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(o.name for o in graph.output)
    convolutions = {graph.node[i].output[0] for i in nodes if graph.node[i].op_type in ("Conv", "ConvTranspose")}
    found = []
    for index, node in enumerate(graph.node):
        if node.op_type != "Add" or node.name in excluded or any(n in weights or n not in floats for n in node.input):
            continue
        fused = [k for k, n in enumerate(node.input) if n in convolutions and readers[n] == 1]
        if fused:
            found.append((index, 1 - fused[-1]))
    return found


def place(
    model: ModelProto,
    eight: Eight,
    wanted: Targets,
    ranges: Mapping[str, tuple[float, float]],
    scales: Scales = "fp32",
) -> Placed:
    """The model (in at least opset 19) with Q/DQ at `wanted`; tensors without a range are left as they are. `scales`:
    the type that the scales will have; weights are rounded by the scale as stored."""
    graph = model.graph
    graph_nodes = list(graph.node)
    weights = graphs.float_weights(model)
    writer = _Writer(eight, scales)
    by_op: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for index in wanted.nodes:
        node = graph_nodes[index]
        if node.input[0] not in ranges:
            left[node.op_type] += 1
            continue
        weight = weights[node.input[1]]
        axis = graphs.output_axis(node, len(weight.dims))
        node.input[0] = writer.activation(node.input[0], ranges)
        node.input[1] = writer.weight(weight, axis)
        by_op[node.op_type] += 1
    for index, position in wanted.branches:
        node = graph_nodes[index]
        if node.input[position] in ranges:
            node.input[position] = writer.activation(node.input[position], ranges)
            by_op["Add"] += 1
    ordered = list(writer.of_weights)
    for name in (i.name for i in graph.input):
        ordered += writer.of_activations.pop(name, [])
    for node in graph_nodes:
        ordered.append(node)
        for name in node.output:
            ordered += writer.of_activations.pop(name, [])
    graph.initializer.extend(writer.initializers)
    declare_floats(model, [n.output[0] for n in ordered if n.op_type == "DequantizeLinear"])
    graphs.replace_nodes(graph, ordered)
    graphs.drop_unused(graph)
    return Placed(model, dict(sorted(by_op.items())), writer.pairs, dict(sorted(left.items())))


def declare_floats(model: ModelProto, names: Collection[str]) -> None:
    """Note the type of new tensors, for who converts the graph further."""
    known = {v.name for v in model.graph.value_info}
    for name in names:
        if name not in known:
            model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


class _Writer:
    """Makes the Q/DQ nodes and their constants; what is asked for twice is made once."""

    def __init__(self, eight: Eight, scales: Scales) -> None:
        self.eight = eight
        self.scales = scales
        self.initializers: list[TensorProto] = []
        self.of_weights: list[NodeProto] = []
        self.of_activations: dict[str, list[NodeProto]] = {}
        self.pairs = 0
        self._done: dict[tuple[str, int], str] = {}

    def activation(self, name: str, ranges: Mapping[str, tuple[float, float]]) -> str:
        if (name, -1) in self._done:
            return self._done[name, -1]
        low, high = ranges[name]
        scale = self._scale(np.asarray(max(-low, high), np.float32))
        self._constant(f"{name}_scale", scale)
        self.initializers.append(_zero(f"{name}_zero", self.eight, ()))
        q, dq = f"{name}_quantized", f"{name}_dequantized"
        parts = [f"{name}_scale", f"{name}_zero"]
        self.of_activations[name] = [
            helper.make_node("QuantizeLinear", [name, *parts], [q], f"{name}_QuantizeLinear"),
            helper.make_node("DequantizeLinear", [q, *parts], [dq], f"{name}_DequantizeLinear"),
        ]
        self.pairs += 1
        self._done[name, -1] = dq
        return dq

    def weight(self, weight: TensorProto, axis: int) -> str:
        name = weight.name
        if (name, axis) in self._done:
            return self._done[name, axis]
        array = graphs.array_of(weight)
        others = tuple(a for a in range(array.ndim) if a != axis)
        scale = self._scale(np.abs(array).max(axis=others, initial=0.0))
        shape = [-1 if a == axis else 1 for a in range(array.ndim)]
        ratio = array / scale.astype(np.float32).reshape(shape)
        prefix = f"{name}_axis{axis}"
        self.initializers.append(_eight_bits(f"{prefix}_quantized", ratio, self.eight))
        self._constant(f"{prefix}_scale", scale)
        self.initializers.append(_zero(f"{prefix}_zero", self.eight, scale.shape))
        dq = f"{prefix}_dequantized"
        inputs = [f"{prefix}_{part}" for part in ("quantized", "scale", "zero")]
        self.of_weights.append(
            helper.make_node("DequantizeLinear", inputs, [dq], f"{prefix}_DequantizeLinear", axis=axis)
        )
        self._done[name, axis] = dq
        return dq

    def _scale(self, largest: Any) -> Any:
        """Positive, and as it will be stored: rounding it later would shift every value."""
        scale = np.maximum(np.asarray(largest, np.float32) / LARGEST[self.eight], _LEAST[self.scales])
        return scale.astype(_SCALE_TYPES[self.scales]).astype(np.float32)

    def _constant(self, name: str, array: Any) -> None:
        self.initializers.append(numpy_helper.from_array(np.asarray(array, np.float32), name))


def _eight_bits(name: str, ratio: Any, eight: Eight) -> TensorProto:
    if eight == "int8":
        rounded = np.clip(np.rint(ratio), -127, 127).astype(np.int8)
        tensor: TensorProto = numpy_helper.from_array(rounded, name)
        return tensor
    bits = np.clip(ratio, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, bits.shape, bits.tobytes(), raw=True)


def _zero(name: str, eight: Eight, shape: tuple[int, ...]) -> TensorProto:
    kind = TensorProto.INT8 if eight == "int8" else TensorProto.FLOAT8E4M3FN
    count = int(np.prod(shape))
    return helper.make_tensor(name, kind, shape, bytes(count), raw=True)
