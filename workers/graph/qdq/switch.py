"""One graph in which every quantizable node can be switched between float and simulated 8 bits while it runs.

Each node stands in an `If`: one branch is the node as it was, in the other its inputs, weights and (where its kernel
would) outputs pass through Q/DQ. All variants share one session and one copy of the weights; a variant costs a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from workers.graph.qdq import placement as qdq
from workers.graph.qdq.surgery import load_weight
from workers.graph.quantizable import computes_on_weights, follows_its_input

Array = np.ndarray[Any, Any]
Ranges = dict[str, tuple[float, float]]  # lowest and highest value by tensor
Recipe = Literal["dynamic_int8", "static_int8", "int8", "fp8"]

SWITCHES = "__quantized__"  # the added input: bool [number of nodes], in the order of `nodes`
_CLIPPING = ("Relu", "Clip")  # the quantizer folds them into the range of what they write


@dataclass(frozen=True)
class Simulation:
    """How a node is quantized: by `quantize` (dynamic_int8, static_int8) or by `convert` (int8, fp8: always symmetric).
    `ranges`: of the activations (static only). `rounded_outputs`: see `surgery`."""

    recipe: Recipe
    ranges: Mapping[str, tuple[float, float]]
    signed: bool
    per_channel: bool
    reduce_range: bool
    rounded_outputs: bool


@dataclass(frozen=True)
class Switchable:
    """A node that can be switched. `inputs`: the positions at which its activations are rounded; None: all of them."""

    name: str
    op_type: str
    inputs: tuple[int, ...] | None = None


def switchable(
    model: onnx.ModelProto, op_types: Collection[str], excluded: Collection[str], recipe: Recipe
) -> list[Switchable]:
    """The nodes that the recipe would quantize, in the graph's order. Those that only move or clip values are left out:
    the quantizer rounds them exactly where it rounds what they read."""
    weights = {i.name for i in model.graph.initializer if i.data_type == TensorProto.FLOAT}
    found = []
    for node in model.graph.node:
        if node.op_type not in op_types or node.name in excluded or follows_its_input(node.op_type):
            continue
        if recipe == "dynamic_int8" and not computes_on_weights(node, weights):
            continue
        found.append(Switchable(node.name, node.op_type))
    return found


def converted(model: onnx.ModelProto, wanted: qdq.Targets, ranges: Collection[str]) -> list[Switchable]:
    """The nodes at which `convert` places its pairs, in the graph's order, where there is a range."""
    positions: dict[int, list[int]] = {}
    for index, position in (*((i, 0) for i in wanted.nodes), *wanted.branches):
        if model.graph.node[index].input[position] in ranges:
            positions.setdefault(index, []).append(position)
    nodes = model.graph.node
    return [Switchable(nodes[i].name, nodes[i].op_type, tuple(at)) for i, at in sorted(positions.items())]


def write(prepared: Path, out: Path, nodes: Sequence[Switchable], simulation: Simulation) -> None:
    """Write the switchable form of the model file `prepared` to `out`, in the same folder (external weights are found
    there); the int8 weights go into a file of their own beside it."""
    model = onnx.load(prepared, load_external_data=False)
    with out.with_name(f"{out.name}.int8").open("wb") as data:
        _Writer(model, prepared.parent, data, simulation).rewrite(nodes)
    onnx.save(model, out)


@dataclass
class _Branch:
    """The quantized branch of one node while it is written."""

    name: str
    nodes: list[NodeProto] = field(default_factory=list)

    def add(self, op: str, inputs: Sequence[str], part: str, outputs: int = 1, **attributes: Any) -> list[str]:
        names = [f"{self.name}/{part}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"{self.name}/{part}", **attributes))
        return names


class _Writer:
    def __init__(self, model: onnx.ModelProto, folder: Path, data: IO[bytes], simulation: Simulation) -> None:
        self.model, self.folder, self.data, self.simulation = model, folder, data, simulation
        self.weights = {i.name: i for i in model.graph.initializer if i.data_type == TensorProto.FLOAT}
        self.readers = Counter(name for node in model.graph.node for name in node.input)
        self.outputs = {o.name for o in model.graph.output}
        self.by_input = {name: node for node in model.graph.node for name in node.input}
        self.rounded: dict[tuple[str, int | None], tuple[str, str, str]] = {}
        self.constants: dict[str, TensorProto] = {}
        self.positions: dict[str, tuple[int, ...] | None] = {}
        self.eight: qdq.Eight = "fp8" if simulation.recipe == "fp8" else "int8"

    def rewrite(self, switchable: Sequence[Switchable]) -> None:
        graph = self.model.graph
        order = {node.name: index for index, node in enumerate(switchable)}
        self.positions = {node.name: node.inputs for node in switchable}
        nodes: list[NodeProto] = []
        for node in graph.node:
            index = order.get(node.name)
            nodes += [node] if index is None else self._switched(node, index)
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(self.constants.values())
        graph.input.append(helper.make_tensor_value_info(SWITCHES, TensorProto.BOOL, [len(switchable)]))

    def _switched(self, node: NodeProto, index: int) -> list[NodeProto]:
        at = self._constant(f"{SWITCHES}/at/{index}", np.asarray(index, np.int64))
        flag = f"{SWITCHES}/{index}"
        outputs = [name for name in node.output if name]
        plain = NodeProto()
        plain.CopyFrom(node)
        plain.output[:] = [f"{SWITCHES}/{index}/float/{name}" if name else "" for name in node.output]
        branches = {
            "then_branch": self._graph("quantized", self._quantized(node, index)),
            "else_branch": self._graph("float", ([plain], [n for n in plain.output if n])),
        }
        return [
            helper.make_node("Gather", [SWITCHES, at], [flag], name=flag),
            helper.make_node("If", [flag], outputs, name=f"{flag}/if", **branches),
        ]

    @staticmethod
    def _graph(name: str, content: tuple[list[NodeProto], list[str]]) -> onnx.GraphProto:
        nodes, outputs = content
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        return helper.make_graph(nodes, name, [], values)

    def _quantized(self, node: NodeProto, index: int) -> tuple[list[NodeProto], list[str]]:
        branch = _Branch(f"{SWITCHES}/{index}/int8")
        copy = NodeProto()
        copy.CopyFrom(node)
        for position, name in enumerate(node.input):
            copy.input[position] = self._rounded_input(branch, node, position, name)
        copy.output[:] = [f"{branch.name}/{name}" if name else "" for name in node.output]
        branch.nodes.append(copy)
        outputs = []
        for name in (n for n in node.output if n):
            here = f"{branch.name}/{name}"
            found = self._output_range(name)
            outputs.append(here if found is None else self._round(branch, here, found, f"out/{name}"))
        return branch.nodes, outputs

    def _rounded_input(self, branch: _Branch, node: NodeProto, position: int, name: str) -> str:
        if name in self.weights:
            if position == 2 and node.op_type in ("Conv", "ConvTranspose", "Gemm"):
                return name  # a bias has 32 bits
            if len(self.weights[name].dims) < 2 and node.op_type in ("LSTM", "Attention"):
                return name
            axis = weight_axis(node, len(self.weights[name].dims)) if self.simulation.per_channel else None
            arguments = self._weight(name, axis)
            attributes = {} if axis is None else {"axis": axis}
            return branch.add("DequantizeLinear", arguments, f"weight{position}", **attributes)[0]
        if self.simulation.recipe == "dynamic_int8":
            if position != 0 or node.op_type == "Gather":
                return name
            made = branch.add("DynamicQuantizeLinear", [name], f"q{position}", 3)
            return branch.add("DequantizeLinear", made, f"dq{position}")[0]
        positions, found = self.positions[node.name], self.simulation.ranges.get(name)
        rounded = found is not None and (positions is None or position in positions)
        return self._round(branch, name, found, f"in{position}") if rounded and found else name

    def _output_range(self, name: str) -> tuple[float, float] | None:
        if not self.simulation.rounded_outputs or self.simulation.recipe != "static_int8":
            return None
        after = self.by_input.get(name)
        alone = self.readers[name] == 1 and name not in self.outputs
        if alone and after is not None and after.op_type in _CLIPPING:
            name = after.output[0]
        return self.simulation.ranges.get(name)

    def _round(self, branch: _Branch, name: str, limits: tuple[float, float], part: str) -> str:
        scale, zero_point = activation_parameters(*limits, signed=self.simulation.signed, eight=self.eight)
        arguments = [
            self._constant(f"{branch.name}/{part}/scale", scale),
            self._constant(f"{branch.name}/{part}/zero_point", zero_point),
        ]
        (rounded,) = branch.add("QuantizeLinear", [name, *arguments], f"{part}/q")
        return branch.add("DequantizeLinear", [rounded, *arguments], f"{part}/dq")[0]

    def _constant(self, name: str, value: Array) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def _weight(self, name: str, axis: int | None) -> tuple[str, str, str]:
        """Names of the int8 values, the scales and the zero points of a weight; made once for all its readers."""
        key = (name, axis)
        if key not in self.rounded:
            values = numpy_helper.to_array(load_weight(self.weights[name], self.folder))
            bits, scale = quantized_weight(values, axis, reduce_range=self.simulation.reduce_range, eight=self.eight)
            label = f"{SWITCHES}/{name}/{axis}"
            tensor = TensorProto(
                name=f"{label}/{self.eight}",
                data_type=TensorProto.INT8 if self.eight == "int8" else TensorProto.FLOAT8E4M3FN,
                dims=bits.shape,
                data_location=TensorProto.EXTERNAL,
            )
            start = self.data.tell()
            self.data.write(bits.tobytes())
            place = {"location": Path(self.data.name).name, "offset": start, "length": self.data.tell() - start}
            for entry, told in place.items():
                tensor.external_data.add(key=entry, value=str(told))
            self.constants[tensor.name] = tensor
            zeros = np.zeros(scale.shape, bits.dtype)
            self.rounded[key] = (
                tensor.name,
                self._constant(f"{label}/scale", scale),
                self._constant(f"{label}/zero_point", zeros),
            )
        return self.rounded[key]


def weight_axis(node: NodeProto, rank: int) -> int | None:
    """The axis of a weight's output channels, or None where it is rounded as a whole."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    by_op = {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1, "Gemm": 0 if transposed else 1, "LSTM": 1}
    by_op["Attention"] = 1
    axis = by_op.get(node.op_type)
    return None if axis is None or rank < 2 else axis


def activation_parameters(low: float, high: float, *, signed: bool, eight: qdq.Eight = "int8") -> tuple[Array, Array]:
    """Scale and zero point of uint8 (asymmetric), int8 or fp8 (symmetric) over [low, high], which holds zero."""
    if signed:
        limit, largest = max(-low, high), qdq.LARGEST[eight]
        zero = np.asarray(0, np.int8 if eight == "int8" else ml_dtypes.float8_e4m3fn)
        return np.asarray(limit / largest if limit > 0 else 1.0, np.float32), zero
    scale = (high - low) / 255 if high > low else 1.0
    return np.asarray(scale, np.float32), np.asarray(round(-low / scale), np.uint8)


def quantized_weight(
    values: Array, axis: int | None, *, reduce_range: bool, eight: qdq.Eight = "int8"
) -> tuple[Array, Array]:
    """Symmetric 8-bit values and their scale(s), as ONNX Runtime and `convert` make them; seven bits if
    `reduce_range`."""
    top = 64 if reduce_range else qdq.LARGEST[eight]

    def rounded(ratio: Array) -> Array:
        if eight == "fp8":
            return np.clip(ratio, -top, top).astype(ml_dtypes.float8_e4m3fn)
        return np.clip(np.rint(ratio), -top, top).astype(np.int8)

    if axis is None:
        limit = np.abs(values).max(initial=0.0)
        scale = np.float32(limit / top if limit > 0 else 1.0)
        return rounded(values / scale), np.asarray(scale)
    others = tuple(i for i in range(values.ndim) if i != axis)
    limits = np.abs(values).max(axis=others, initial=0.0)
    scales = np.where(limits > 0, limits / top, 1.0).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    return rounded(values / scales.reshape(shape)), scales
