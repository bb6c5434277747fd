"""float16 and bfloat16 copies of a graph in which the arithmetic itself is in 16 bits, for GPUs.

Inputs and outputs keep their types. In float32 stay: sums and powers, whose intermediate values pass the range of
float16 or lose their last bits (the parts of a written-out LayerNorm, of a norm, of an average); what stands between
two of those; what ONNX has no 16-bit form of; and what the caller names, such as nodes with measured values out of
range. Softmax and LayerNormalization are converted: GPU kernels accumulate them in float32 by themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from workers.graph import rewriting as graphs
from workers.graph.onnx_graph import opset_of, subgraphs

Low = Literal["fp16", "bf16"]
BF16_OPSET = 22  # Conv, pooling and others take bfloat16 from here on
USABLE_FP16 = 30_000.0  # half of the largest float16: room for a sum of two
RANGE_CRITICAL = frozenset(
    (
        *("Exp", "Log", "Pow", "CumSum", "Softplus", "LogSoftmax", "Reciprocal"),
        *("ReduceSum", "ReduceMean", "ReduceProd", "ReduceSumSquare", "ReduceL1", "ReduceL2"),
        *("ReduceLogSum", "ReduceLogSumExp", "LpNormalization", "MeanVarianceNormalization"),
        *("InstanceNormalization", "GroupNormalization", "LRN", "Range", "RandomNormal", "RandomUniform"),
    )
)
# Cheap ops that stay with their neighbours: an epsilon of 1e-5 and its root are no values for float16.
_FOLLOWERS = frozenset(("Add", "Sub", "Mul", "Div", "Sqrt", "Neg", "Abs", "Max", "Min", "Clip", "Identity"))
_NAMES: dict[Low, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_NUMPY: dict[Low, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Converted:
    """`by_op`: nodes that compute in 16 bits; `kept`: float nodes that stay in float32; `clamped`: constants beyond
    the usable range of float16, brought into it (masks of -inf or the lowest float)."""

    model: ModelProto
    by_op: Mapping[str, int]
    kept: Mapping[str, int]
    clamped: int


def to_low(model: ModelProto, low: Low, keep: Collection[str] = ()) -> Converted:
    """Convert a graph with inferred types. `keep`: names of nodes that stay in float32."""
    if low == "bf16":
        model = graphs.raise_opset(model, BF16_OPSET)
    return _Conversion(model, low, keep).run()


class _Conversion:
    def __init__(self, model: ModelProto, low: Low, keep: Collection[str]) -> None:
        self.model = model
        self.graph = model.graph
        self.low = low
        self.opset = opset_of(model)
        self.floats = graphs.float_tensors(model)
        self.weights = graphs.float_weights(model)
        self.keep = set(keep)
        self.outside = graphs.captured(self.graph) | {o.name for o in self.graph.output}
        self.made: dict[str, str] = {}  # float32 tensor → its 16-bit form
        self.nodes: list[NodeProto] = []
        self.clamped = 0

    def run(self) -> Converted:
        chosen = self._choose()
        full = {n for i, node in enumerate(self.graph.node) if i not in chosen for n in node.input} | self.outside
        by_op: Counter[str] = Counter()
        kept: Counter[str] = Counter()
        for index, node in enumerate(list(self.graph.node)):
            touches = any(name in self.floats for name in (*node.input, *node.output))
            if index not in chosen:
                kept[node.op_type] += touches
                self.nodes.append(node)
                continue
            by_op[node.op_type] += 1
            self._convert(node, full)
        graphs.replace_nodes(self.graph, self.nodes)
        graphs.drop_unused(self.graph)
        graphs.forget_inferred(self.model)
        return Converted(self.model, dict(sorted(by_op.items())), dict(sorted((+kept).items())), self.clamped)

    def _choose(self) -> set[int]:
        """Indices of the nodes to convert."""
        stays: set[str] = set()  # activations whose producer stays in float32
        chosen: set[int] = set()
        for index, node in enumerate(self.graph.node):
            floats = [n for n in (*node.input, *node.output) if n in self.floats]
            activations = [n for n in node.input if n in self.floats and n not in self.weights]
            follows = node.op_type in _FOLLOWERS and bool(activations) and all(n in stays for n in activations)
            if (
                floats
                and node.name not in self.keep
                and node.op_type not in (*RANGE_CRITICAL, "Constant", "Cast")
                and not follows
                and not list(subgraphs(node))
                and bool(_low_slots(node, self.opset, self.low))
            ):
                chosen.add(index)
            elif floats and node.op_type not in ("Constant", "Cast"):
                stays.update(node.output)
        return chosen

    def _convert(self, node: NodeProto, full: Collection[str]) -> None:
        slots = _low_slots(node, self.opset, self.low)
        for position, name in enumerate(node.input):
            if name in self.floats and slots.get(position, False):
                node.input[position] = self._low_form(name)
        back = []
        for position, name in enumerate(node.output):
            if name in self.floats:
                low = f"{name}_{self.low}"
                self.made[name] = low
                node.output[position] = low
                if name in full:
                    back.append(helper.make_node("Cast", [low], [name], f"{name}_to_fp32", to=TensorProto.FLOAT))
        self.nodes += [node, *back]

    def _low_form(self, name: str) -> str:
        if name in self.made:
            return self.made[name]
        low = self.made[name] = f"{name}_{self.low}"
        if name in self.weights:
            self.graph.initializer.append(self._weight(name, low))
        else:
            self.nodes.append(helper.make_node("Cast", [name], [low], f"{name}_to_{self.low}", to=_NAMES[self.low]))
        return low

    def _weight(self, name: str, low: str) -> TensorProto:
        array = graphs.array_of(self.weights[name])
        if self.low == "fp16":
            beyond = np.abs(array) > USABLE_FP16  # infinities too: a row of them makes Softmax NaN
            if beyond.any():
                self.clamped += 1
                array = np.where(beyond, np.sign(array) * np.float32(USABLE_FP16), array)
        tensor: TensorProto = numpy_helper.from_array(np.asarray(array.astype(_NUMPY[self.low]), order="C"), low)
        return tensor


def _low_slots(node: NodeProto, opset: int, low: Low) -> dict[int, bool]:
    """For each input that the op takes in 16 bits: True. Empty where the node has no 16-bit form as a whole: an output
    or a typed input that must be float32, or an op that is neither ONNX's nor one of ONNX Runtime's fused ones."""
    formal = graphs.formal_types(node, opset)
    if formal is None or not formal.inputs:
        return {}
    wanted = "tensor(float16)" if low == "fp16" else "tensor(bfloat16)"
    allowed = {name: wanted in types for name, types in formal.types.items()}
    floating = {name for name, types in formal.types.items() if "tensor(float)" in types}
    # An optional output that is not asked for does not matter (LayerNormalization).
    outputs = [formal.output(k) for k, name in enumerate(node.output) if name]
    if any(t in floating and not allowed[t] for t in outputs) or "tensor(float)" in outputs:
        return {}
    slots = {}
    for position in range(max(len(node.input), 1)):
        kind = formal.input(position)
        if kind in floating and not allowed[kind] and kind in outputs:
            return {}
        slots[position] = allowed.get(kind, False)
    return slots if any(slots.values()) else {}


def emulated(model: ModelProto, kind: Low = "bf16") -> ModelProto:
    """A graph with the same rounding that runs where there are no kernels for it (ONNX Runtime's CPU provider): every
    bfloat16 node, and every fused float16 node, computes in float32 on rounded inputs, and its outputs are rounded."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    low = {v.name for v in values if v.type.tensor_type.elem_type == _NAMES[kind]}
    low |= {i.name for i in model.graph.initializer if i.data_type == _NAMES[kind]}
    low |= {o for n in model.graph.node for o in n.output if o.endswith(f"_{kind}")}
    twin = ModelProto()
    twin.CopyFrom(model)
    nodes: list[NodeProto] = []
    widened: dict[str, str] = {}
    for node in twin.graph.node:
        theirs = kind == "fp16" and node.domain in ("", "ai.onnx")  # these run there
        if theirs or node.op_type == "Cast" or not any(n in low for n in (*node.input, *node.output)):
            nodes.append(node)
            continue
        for position, name in enumerate(node.input):
            if name in low:
                if name not in widened:
                    widened[name] = f"{name}_wide"
                    nodes.append(helper.make_node("Cast", [name], [widened[name]], to=TensorProto.FLOAT))
                node.input[position] = widened[name]
        narrow = []
        for position, name in enumerate(node.output):
            if name in low:
                node.output[position] = f"{name}_unrounded"
                narrow.append(helper.make_node("Cast", [f"{name}_unrounded"], [name], to=_NAMES[kind]))
        nodes += [node, *narrow]
    graphs.replace_nodes(twin.graph, nodes)
    graphs.forget_inferred(twin)
    return twin
