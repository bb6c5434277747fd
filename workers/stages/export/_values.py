"""Which whole numbers an input may hold, where the graph tells: ids are bounded by the tables they index, lengths by
the time axis, picture numbers by the pictures. From the nodes that use them back to the inputs; nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from workers.graph.onnx_graph import STANDARD_DOMAINS, real_inputs, subgraphs, tensor_spec

Bounds = tuple[int, int | str]  # lowest, highest; a symbol: below its size (where the lowest is 1: up to its size)
_Dim = int | str | None

# What only moves or picks values: what is asked of the output is asked of the first input.
_MOVES = frozenset(
    (
        *("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice", "Split", "Expand"),
        *("Tile", "Gather", "GatherElements", "GatherND", "Dropout", "Floor", "Ceil", "Round", "Relu", "Abs", "Trilu"),
        *("ReduceMax", "ReduceMin", "DepthToSpace", "SpaceToDepth", "Compress", "ReverseSequence", "CastLike"),
    )
)
_JOINS = {"Concat": slice(None), "Max": slice(None), "Min": slice(None), "Where": slice(1, None)}
_SMALL = 4096  # elements of a constant that is read


def value_bounds(model: ModelProto) -> dict[str, Bounds]:
    """Input → the values it may hold. `model`: with inferred shapes; where one is not known, the only value that always
    fits (0, or the length 1)."""
    return _Search(model).run()


@dataclass(frozen=True)
class _Asked:
    """A node's demand on its input number `position`: at least `low`, below the size of an axis (`dim`)."""

    position: int
    dim: _Dim
    low: int = 0


class _Search:
    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        self._shapes: dict[str, tuple[_Dim, ...]] = {}
        self._constants: dict[str, TensorProto] = {}
        self._need: dict[str, Bounds] = {}
        self._symbols = {d for i in real_inputs(model.graph) for d in tensor_spec(i).shape if isinstance(d, str)}

    def run(self) -> dict[str, Bounds]:
        self._learn(self._graph)
        self._walk(self._graph)
        found = {}
        for info in real_inputs(self._graph):
            bounds = self._need.get(info.name)
            if bounds is not None and info.type.tensor_type.elem_type != TensorProto.BOOL:
                found[info.name] = bounds
        return found

    def _learn(self, graph: GraphProto) -> None:
        for info in (*graph.input, *graph.value_info, *graph.output):
            if info.type.tensor_type.HasField("shape"):
                dims = info.type.tensor_type.shape.dim
                self._shapes[info.name] = tuple(d.dim_value if d.dim_value > 0 else d.dim_param or None for d in dims)
        for tensor in graph.initializer:
            self._shapes[tensor.name] = tuple(tensor.dims)
            self._constants[tensor.name] = tensor
        for node in graph.node:
            value = next((a.t for a in node.attribute if a.name == "value" and node.op_type == "Constant"), None)
            if value is not None:
                self._shapes[node.output[0]] = tuple(value.dims)
                self._constants[node.output[0]] = value
            for body in subgraphs(node):
                self._learn(body)

    def _walk(self, graph: GraphProto) -> None:
        """The last node first: what is asked of a tensor is known before its maker is looked at."""
        for node in reversed(graph.node):
            for body in subgraphs(node):
                self._walk(body)
            for asked in _demands(node, self._dim, self._shape):
                if asked.position < len(node.input) and node.input[asked.position]:
                    self._ask(node.input[asked.position], self._bounds(asked))
            if node.domain in STANDARD_DOMAINS:
                self._pass_on(node)

    def _bounds(self, asked: _Asked) -> Bounds:
        if isinstance(asked.dim, int):
            return asked.low, asked.dim - 1 + asked.low
        return asked.low, asked.dim if asked.dim in self._symbols else asked.low

    def _ask(self, name: str, bounds: Bounds) -> None:
        known = self._need.get(name)
        if known is None:
            self._need[name] = bounds
            return
        highs = [h for _, h in (known, bounds) if isinstance(h, int)]
        low = max(known[0], bounds[0])
        high: int | str = min(highs) if highs else known[1]
        if isinstance(high, str) or low <= high:
            self._need[name] = (low, high)

    def _pass_on(self, node: NodeProto) -> None:
        wanted = next((self._need[o] for o in node.output if o in self._need), None)
        if wanted is None:
            return
        if node.op_type in _MOVES:
            self._ask(node.input[0], wanted)
        elif node.op_type in _JOINS:
            for name in node.input[_JOINS[node.op_type]]:
                self._ask(name, wanted)
        elif node.op_type in ("Add", "Sub", "Mul", "Div", "Neg"):
            self._calculate(node, wanted)

    def _calculate(self, node: NodeProto, wanted: Bounds) -> None:
        """Through sums and products with a constant: the value must fit for each of the constant's elements."""
        low, high = wanted
        if isinstance(high, str):
            return
        if node.op_type == "Neg":
            self._ask(node.input[0], (-high, -low))
            return
        sides = [self._numbers(name) for name in node.input]
        if (sides[0] is None) == (sides[1] is None):
            return
        numbers, name = (sides[1], node.input[0]) if sides[0] is None else (sides[0], node.input[1])
        assert numbers is not None
        small, large = int(np.floor(numbers.min())), int(np.ceil(numbers.max()))
        op = node.op_type
        if op == "Add":
            self._ask(name, (low - small, max(low - small, high - large)))
        elif op == "Sub" and sides[0] is None:
            self._ask(name, (low + large, max(low + large, high + small)))
        elif op == "Sub":
            self._ask(name, (large - high, max(large - high, small - low)))
        elif op == "Mul" and small > 0:
            self._ask(name, (-(-low // small), max(-(-low // small), high // large)))
        elif op == "Div" and sides[0] is None and small > 0:
            self._ask(name, (low * large, max(low * large, high * small)))

    def _numbers(self, name: str) -> np.ndarray[Any, Any] | None:
        tensor = self._constants.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL or int(np.prod(tensor.dims)) > _SMALL:
            return None
        values = numpy_helper.to_array(tensor)
        return values if values.size and values.dtype.kind in "iuf" and np.isfinite(values).all() else None

    def _shape(self, name: str) -> tuple[_Dim, ...] | None:
        return self._shapes.get(name)

    def _dim(self, name: str, axis: int) -> _Dim:
        shape = self._shapes.get(name)
        return shape[axis] if shape and -len(shape) <= axis < len(shape) else None


def _demands(
    node: NodeProto, dim: Callable[[str, int], _Dim], shape: Callable[[str], tuple[_Dim, ...] | None]
) -> list[_Asked]:
    """What a node asks of the whole numbers among its inputs, by the operators' definitions."""
    read = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in ("axis", "layout", "time_axis")}
    axis, inputs = int(read.get("axis", 0)), node.input
    match node.op_type:
        case "Gather" | "GatherElements":
            return [_Asked(1, dim(inputs[0], axis))]
        case "ScatterElements" | "Scatter":
            return [_Asked(1, dim(inputs[0], axis))]
        case "GatherND" | "ScatterND":
            deep = (shape(inputs[1]) or (None,))[-1]
            sizes = [dim(inputs[0], i) for i in range(deep)] if isinstance(deep, int) else [None]
            known = [s for s in sizes if isinstance(s, int)]
            return [
                _Asked(1, min(known) if len(known) == len(sizes) else next((s for s in sizes if s not in known), None))
            ]
        case "LSTM" | "GRU" | "RNN":
            return [_Asked(4, dim(inputs[0], 1 if read.get("layout") else 0), low=1)]
        case "ReverseSequence":
            return [_Asked(1, dim(inputs[0], int(read.get("time_axis", 0))), low=1)]
        case "RoiAlign":
            return [_Asked(2, dim(inputs[0], 0))]
        case "TopK":
            return [_Asked(1, dim(inputs[0], int(read.get("axis", -1))), low=1)]
        case "ArrayFeatureExtractor":
            return [_Asked(1, dim(inputs[0], -1))]
        case "EmbedLayerNormalization":
            return [_Asked(0, dim(inputs[2], 0)), _Asked(1, dim(inputs[4], 0))]
        case _:
            return []


def seen_values(arrays: Mapping[str, list[np.ndarray[Any, Any]]]) -> dict[str, Bounds]:
    """The lowest and the highest whole number that data hold, for inputs of integers."""
    found: dict[str, Bounds] = {}
    for name, parts in arrays.items():
        if all(a.dtype.kind in "iu" and a.size for a in parts):
            found[name] = (min(int(a.min()) for a in parts), max(int(a.max()) for a in parts))
    return found
