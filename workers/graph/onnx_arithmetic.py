"""Which arithmetic of an ONNX graph a runtime with narrower types would change. Pure, on a graph without its weights.

Several runtimes compute float64 in float32, and int64 in int32 or, for some operators, in float32. Indices, shapes and
masks bear that; timestamps, hashes and raw ids do not. So every integer tensor gets an interval that its values are
proven to stay in: from its type, from constants, from the operators that made it, and from the operators that it must
suit (what selects rows of a table of 100 lies in -100…99, or the original fails). What leaves the range that a narrower
type holds exactly is told; so is what cannot be bounded at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from workers.graph.onnx_graph import node_label, real_inputs, subgraphs
from workers.intervals import ANY, LONGEST, Interval, beyond, both, computed, outside

FLOAT32_EXACT = 1 << 24  # float32 holds every integer up to here
INT32_MOST = (1 << 31) - 1
_SUMMED = 1 << 16  # nor is one that is summed over, where its size is not known
_TOLD = 5
_SMALL_BYTES = 4096

_INTEGERS: Mapping[int, Interval] = {
    TensorProto.BOOL: (0, 1),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT16: (-(1 << 15), (1 << 15) - 1),
    TensorProto.UINT16: (0, (1 << 16) - 1),
    TensorProto.INT32: (-(1 << 31), INT32_MOST),
    TensorProto.UINT32: (0, (1 << 32) - 1),
    TensorProto.INT64: ANY,
    TensorProto.UINT64: (0, math.inf),
}
# By the names that exporters give: what a caller feeds there is never anything else.
_BY_NAME: Mapping[str, Interval] = {
    "mask": (0, 1),
    "token_type": (0, 15),
    "segment_id": (0, 15),
    "position_id": (0, LONGEST),
}

# Every value of the output is one of these inputs' (all of them where none are named).
_MOVES: Mapping[str, Sequence[int]] = {
    **dict.fromkeys(("Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "Expand", "Tile"), (0,)),
    **dict.fromkeys(("Slice", "Split", "Gather", "GatherND", "GatherElements", "Compress", "Unique", "TopK"), (0,)),
    **dict.fromkeys(("ReduceMax", "ReduceMin", "MaxPool", "Dropout", "SpaceToDepth", "DepthToSpace", "Trilu"), (0,)),
    **dict.fromkeys(("ReverseSequence",), (0,)),
    **dict.fromkeys(("Concat", "Max", "Min"), ()),
    **{"Where": (1, 2), "Pad": (0, 2), "ScatterND": (0, 2), "ScatterElements": (0, 2), "OneHot": (2,)},
}
_KEEPS_ALL = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "Expand", "Tile", "Concat")
_COMPARES = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal")
_COMPUTED_IN_FULL = ("Cast", "CastLike", *_MOVES)  # int32 is kept in them
# Integer inputs that the operator itself refuses where they are too large, or no memory could hold what comes of them.
_CHECKED = frozenset(
    {
        *((op, 1) for op in ("Gather", "GatherND", "GatherElements", "ScatterND", "ScatterElements", "Reshape")),
        *((op, 1) for op in ("Expand", "Tile", "TopK", "Split", "Pad", "ReverseSequence")),
        *((op, 4) for op in ("LSTM", "GRU", "RNN")),
        *((op, 0) for op in ("ConstantOfShape", "Loop", "EmbedLayerNormalization")),
        *(("EmbedLayerNormalization", 1), ("RoiAlign", 2), ("Resize", 3)),
    }
)
_PARAMETERS = frozenset(  # axes and the like, which nobody computes from data
    {
        *((op, 1) for op in ("Unsqueeze", "Squeeze", "CumSum", "OneHot", "ReduceSum", "Trilu")),
        *(("If", 0), ("Slice", 3), ("Slice", 4)),
    }
)
_SIZES_OF = ("Shape", "Size")
_FOUND_PLACES = ("NonZero", "ArgMax", "ArgMin", "NonMaxSuppression")
_QUANTIZED = (
    "DequantizeLinear",
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "MatMulInteger",
    "ConvInteger",
)
_LOGIC = ("And", "Or", "Xor", "Not", "IsNaN", "IsInf")


def describe_arithmetic(model: ModelProto) -> dict[str, Any]:
    """`float64`: tensors of that type that depend on the inputs; `integers`: [{node, op, tensor, inputs}], where
    integers may leave what int32 (moved) or float32 (computed with) holds, `inputs` being the model's that they come
    from; `assumed`: inputs that were taken to be small by their names alone. At most five of each."""
    if model.functions:
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(_light(model))
    graph = _Graph(_inferred(model), model)
    return {
        "float64": graph.doubles()[:_TOLD],
        "integers": list(graph.wide())[:_TOLD],
        "assumed": sorted(graph.assumed),
    }


def _light(model: ModelProto) -> ModelProto:
    """The model without the bytes of large weights, of which only type and dimensions matter."""
    light = ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    for field in ("input", "output", "value_info", "sparse_initializer"):
        getattr(graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _SMALL_BYTES or tensor.data_type in _INTEGERS:
            graph.initializer.append(tensor)
        else:
            graph.initializer.append(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
    return light


def _inferred(model: ModelProto) -> ModelProto:
    light = _light(model)
    try:
        return onnx.shape_inference.infer_shapes(light, data_prop=False)
    except Exception:  # its own classes, for operators and types that it does not know
        return light


@dataclass(frozen=True)
class _Value:
    """`fixed`: made of constants and sizes alone, whatever is fed. `constant`: of constants alone."""

    interval: Interval = ANY
    fixed: bool = False
    constant: bool = False


class _Graph:
    """One graph in topological order; bodies are looked into with what is known outside of them."""

    def __init__(self, inferred: ModelProto, model: ModelProto) -> None:
        self.graph = inferred.graph
        self.types: dict[str, int] = {}
        self.dims: dict[str, list[int | None]] = {}
        self.values: dict[str, _Value] = {}
        self.sources: dict[str, frozenset[str]] = {}
        self.assumed: set[str] = set()
        self._found: list[dict[str, Any]] = []
        self._inputs = real_inputs(model.graph)
        self._learn(self.graph)
        self._bounds = self._required()
        for value in self._inputs:
            self.sources[value.name] = frozenset({value.name})
            self.values[value.name] = _Value(self._input_interval(value.name))
        self._visit(self.graph)

    # What is known before any node is looked at

    def _learn(self, graph: GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.value_info):
            tensor = value.type.tensor_type
            if tensor.elem_type:
                self.types[value.name] = tensor.elem_type
                if tensor.HasField("shape"):
                    dims = [int(d.dim_value) if d.dim_value > 0 else None for d in tensor.shape.dim]
                    self.dims[value.name] = dims
        for tensor in graph.initializer:
            self.types[tensor.name], self.dims[tensor.name] = tensor.data_type, [*tensor.dims]
            self.values[tensor.name] = _Value(_constant_interval(tensor), fixed=True, constant=True)

    def _input_interval(self, name: str) -> Interval:
        own = _INTEGERS.get(self.types.get(name, 0), ANY)
        known = both(own, self._bounds.get(name, ANY))
        if self.types.get(name) in _INTEGERS and beyond(known, FLOAT32_EXACT):
            named = next((i for part, i in _BY_NAME.items() if part in name.lower()), None)
            if named is not None:
                self.assumed.add(name)
                return named
        return known

    def _required(self) -> dict[str, Interval]:
        """Tensor → what its values must lie in, or the original fails: from indices back through what keeps them."""
        bounds: dict[str, Interval] = {}
        read = {name for node in self.graph.node for name in node.input} | {o.name for o in self.graph.output}
        for node in reversed(self.graph.node):
            if not any(name in read for name in node.output):
                continue
            for position, name in enumerate(node.input):
                if (node.op_type, position) in _CHECKED:
                    most = self._selected_from(node)
                    self._tighten(bounds, name, (-most, most - 1))
            known = bounds.get(node.output[0]) if node.output else None
            if known is None:
                continue
            if node.op_type in _KEEPS_ALL or (node.op_type == "Cast" and self._is_integer(node.input[0])):
                kept = node.input if node.op_type == "Concat" else node.input[:1]
                for name in kept:
                    self._tighten(bounds, name, known)
            elif node.op_type in ("Add", "Sub") and len(node.input) == 2:
                self._through_sum(bounds, node, known)
        return bounds

    def _selected_from(self, node: NodeProto) -> int:
        """How many rows there are to select from; where that is not known, no more than an axis can have."""
        dims = self.dims.get(node.input[0]) if node.op_type in ("Gather", "GatherElements") else None
        axis = _attribute(node, "axis", 0)
        size = dims[axis] if dims and -len(dims) <= axis < len(dims) else None
        return LONGEST if size is None else size

    def _through_sum(self, bounds: dict[str, Interval], node: NodeProto, known: Interval) -> None:
        """Ids that are shifted by a constant before they select."""
        for own, other in ((0, 1), (1, 0)):
            shift = self.values.get(node.input[other])
            if shift is None or not shift.constant:
                continue
            low, high = shift.interval
            if node.op_type == "Add":
                self._tighten(bounds, node.input[own], (known[0] - high, known[1] - low))
            elif own == 0:
                self._tighten(bounds, node.input[own], (known[0] + low, known[1] + high))

    @staticmethod
    def _tighten(bounds: dict[str, Interval], name: str, interval: Interval) -> None:
        bounds[name] = both(bounds.get(name, ANY), interval)

    def _is_integer(self, name: str) -> bool:
        return self.types.get(name, TensorProto.FLOAT) in _INTEGERS

    # Forward, node by node

    def _visit(self, graph: GraphProto) -> None:
        for node in graph.node:
            self._node(node)
        for value in graph.output:
            if self._is_integer(value.name) and self._carried_beyond(value.name):
                self._tell(value.name, None)

    def _node(self, node: NodeProto) -> None:
        known = [self.values.get(name, _Value()) for name in node.input if name]
        fixed = bool(known or node.op_type == "Constant") and all(v.fixed for v in known)
        fixed = fixed or node.op_type in _SIZES_OF
        fixed = fixed and not node.op_type.startswith(("Random", "Bernoulli", "Multinomial"))
        bodies = list(subgraphs(node))
        fixed = fixed and not bodies
        constant = fixed and all(v.constant for v in known) and node.op_type not in _SIZES_OF
        sources = frozenset[str]().union(*(self.sources.get(name, frozenset()) for name in node.input))
        if not fixed:
            self._check(node)
        for body in bodies:
            self._body(body, sources)
        for index, name in enumerate(node.output):
            if not name:
                continue
            interval = self._result(node, index) if self._is_integer(name) else ANY
            if fixed and not constant:  # sizes, and what is computed of them
                interval = both(interval, (-LONGEST, LONGEST))
            interval = both(interval, self._bounds.get(name, ANY))
            own = _INTEGERS.get(self.types.get(name, 0), ANY)
            if not fixed and outside(interval, own):
                interval = own
            self.values[name] = _Value(interval, fixed=fixed, constant=constant)
            self.sources[name] = sources

    def _body(self, body: GraphProto, sources: frozenset[str]) -> None:
        self._learn(body)
        for value in body.input:
            own = _INTEGERS.get(self.types.get(value.name, 0), ANY)
            self.values[value.name], self.sources[value.name] = _Value(own), sources
        self._visit(body)

    def _check(self, node: NodeProto) -> None:
        """Tell of the node where an integer that it reads or computes may be too large."""
        op = node.op_type
        if op in _SIZES_OF or op in _LOGIC or op in _QUANTIZED or op == "Constant":
            return
        read = [
            (position, name)
            for position, name in enumerate(node.input)
            if name and self._is_integer(name) and (op, position) not in _CHECKED | _PARAMETERS
        ]
        if op in _COMPUTED_IN_FULL and op != "OneHot":
            cast = op in ("Cast", "CastLike")
            too_large = [n for _, n in read if cast and self._carried_beyond(n)]
            # A limit that a Slice takes is clamped to the size: only what is fed there can be too large to be told.
            too_large += [n for p, n in read if op == "Slice" and p in (1, 2) and self._carried_beyond(n)]
            if op in ("Max", "Min", "TopK", "ReduceMax", "ReduceMin"):
                too_large += [n for _, n in read if self._beyond_exact(n)]
        else:
            too_large = [n for _, n in read if self._beyond_exact(n)]
            for index, name in enumerate(node.output):
                if read and name and self._is_integer(name) and op not in _FOUND_PLACES:
                    own = _INTEGERS[self.types[name]]
                    result = self._result(node, index)
                    if beyond(result, FLOAT32_EXACT) or (outside(result, own) and op not in _COMPARES):
                        too_large.append(read[0][1])
        if too_large:
            self._tell(too_large[0], node)

    def _beyond_exact(self, name: str) -> bool:
        value = self.values.get(name, _Value())
        return not value.constant and not value.fixed and beyond(value.interval, FLOAT32_EXACT)

    def _carried_beyond(self, name: str) -> bool:
        value = self.values.get(name, _Value())
        return not value.fixed and outside(value.interval, (-INT32_MOST - 1, INT32_MOST))

    def _result(self, node: NodeProto, index: int) -> Interval:
        """What the values of an integer output stay in."""
        op = node.op_type
        own = _INTEGERS.get(self.types.get(node.output[index], 0), ANY)
        inputs = [self.values.get(name, _Value()).interval for name in node.input]
        if op == "Constant":
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
            return own if tensor is None else _constant_interval(tensor)
        if op in _SIZES_OF or op in _FOUND_PLACES or (op in ("TopK", "Unique") and index):
            return (0, LONGEST)
        if op in _COMPARES or op in _LOGIC:
            return (0, 1)
        if op in ("Cast", "CastLike"):
            return both(inputs[0], own) if inputs and self._is_integer(node.input[0]) else own
        if op in _MOVES:
            picked = [inputs[i] for i in _MOVES[op] if i < len(inputs)] or inputs
            if op == "Pad" and len(inputs) < 3:
                picked.append((0, 0))
            return (min(low for low, _ in picked), max(high for _, high in picked)) if picked else own
        return computed(op, inputs, self._summed(node), _attribute(node, "fmod", 0)) or own

    def _summed(self, node: NodeProto) -> int:
        """How many values a sum adds up at most."""
        dims = self.dims.get(node.input[0]) if node.input else None
        return math.prod(d or _SUMMED for d in dims) if dims and node.op_type == "ReduceSum" and all(dims) else _SUMMED

    def _tell(self, tensor: str, node: NodeProto | None) -> None:
        self._found.append(
            {
                "node": node_label(node) if node is not None else None,
                "op": node.op_type if node is not None else None,
                "tensor": tensor,
                "inputs": sorted(self.sources.get(tensor, frozenset()))[:_TOLD],
            }
        )

    # What comes of it

    def wide(self) -> Iterator[dict[str, Any]]:
        yield from self._found

    def doubles(self) -> list[str]:
        names = [name for name, kind in self.types.items() if kind == TensorProto.DOUBLE]
        return [name for name in names if not self.values.get(name, _Value()).constant]


def _constant_interval(tensor: TensorProto) -> Interval:
    """Of a stored tensor of integers; unbounded where its bytes are elsewhere."""
    own = _INTEGERS.get(tensor.data_type, ANY)
    if tensor.data_type not in _INTEGERS or tensor.data_location == TensorProto.EXTERNAL:
        return own
    values: Any = numpy_helper.to_array(tensor)
    return (int(np.min(values)), int(np.max(values))) if values.size else (0, 0)


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)
