"""Reading a graph for attention: who makes and reads a tensor, its type and dimensions, what it is at given sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from workers.graph.fuse.attention_dims import Dims
from workers.graph.interpreter import open_session
from workers.graph.onnx_graph import STANDARD_DOMAINS, opset_of, subgraphs
from workers.graph.rewriting import captured

Array = np.ndarray[Any, Any]

MOVES = frozenset(("Identity", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Slice", "Gather", "Cast"))
_MAX_NODES = 300  # of a mask's computation; more is no mask
_MAX_ELEMENTS = 1 << 24
_SMALL = 64  # elements; larger constants are tables


class View:
    """Of a model that does not change; `dims` and `types` as `inferred` finds them."""

    def __init__(self, model: ModelProto, dims: Mapping[str, Dims], types: Mapping[str, int]) -> None:
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.dims, self.types = dims, types
        self.opset = opset_of(model)
        self.index = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.outside = captured(model.graph) | {o.name for o in model.graph.output}
        given = {i.name for i in model.graph.input}  # an initializer that a caller may replace is no constant
        self._tensors = {t.name: t for t in model.graph.initializer if t.name not in given}
        self.initializers = {t.name for t in model.graph.initializer}
        self._evaluated: dict[tuple[str, int, int], Array | None] = {}

    def producer(self, name: str) -> NodeProto | None:
        """The node of the standard operators that makes a tensor."""
        index = self.index.get(name)
        if index is None or self.nodes[index].domain not in STANDARD_DOMAINS:
            return None
        return self.nodes[index]

    def made_by(self, name: str, op: str) -> NodeProto | None:
        node = self.producer(name)
        return node if node is not None and node.op_type == op else None

    def only_reader(self, name: str) -> NodeProto | None:
        """The one node that reads a tensor; None where several do, a body does, or it is an output."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outside else None

    def rank(self, name: str) -> int | None:
        dims = self.dims.get(name)
        return None if dims is None else len(dims)

    def known(self, name: str) -> Dims:
        """Its dimensions; none where not even their number is known."""
        return self.dims.get(name, ())

    def number(self, name: str) -> float | None:
        """The value of a tensor that holds one number, or many equal ones, whatever the inputs are."""
        value = self.constant(name)
        if value is None or not value.size or value.dtype.kind not in "fiu":
            return None
        first = value.reshape(-1)[0]
        same = value.size == 1 or bool(np.all(value == first))
        return float(first) if same else None

    def constant(self, name: str) -> Array | None:
        """The value of a tensor that depends on no input and no free dimension."""
        tensor = self._tensors.get(name)
        if tensor is not None:
            return numpy_helper.to_array(tensor) if np.prod(tensor.dims) <= _MAX_ELEMENTS else None
        first = self.evaluate(name, 3, 2)
        if first is None:
            return None
        second = self.evaluate(name, 5, 4)
        same = second is not None and first.shape == second.shape and np.array_equal(first, second, equal_nan=True)
        return first if same else None

    def evaluate(self, name: str, length: int, others: int, symbol: int | str = "") -> Array | None:
        """The value of a tensor that depends on the inputs' sizes alone, where the free dimension `symbol` (without
        one: each of them) is `length` and all others are `others`; None for every other tensor."""
        key = (f"{name}|{symbol}", length, others)
        if key not in self._evaluated:
            self._evaluated[key] = self._run(name, lambda dim: length if symbol in ("", dim) else others)
        return self._evaluated[key]

    def sources(self, name: str) -> tuple[list[NodeProto], list[NodeProto]] | None:
        """Above a tensor, in order: the nodes that compute it, and the Shape nodes that they end at; None where it
        depends on anything else than sizes and constants."""
        nodes: dict[int, NodeProto] = {}
        shapes: dict[int, NodeProto] = {}
        waiting = [name]
        while waiting:
            wanted = waiting.pop()
            if not wanted or wanted in self._tensors:
                continue
            node, index = self.producer(wanted), self.index.get(wanted)
            if node is None or index is None or list(subgraphs(node)) or node.op_type.startswith("Random"):
                return None
            if index in nodes or index in shapes:
                continue
            if node.op_type == "Shape" and self.rank(node.input[0]) is not None:
                shapes[index] = node
                continue
            nodes[index] = node
            if len(nodes) > _MAX_NODES:
                return None
            waiting += node.input
        return [nodes[i] for i in sorted(nodes)], [shapes[i] for i in sorted(shapes)]

    def numbers_in(self, name: str) -> tuple[list[int], list[int]]:
        """Of the computation of a tensor: the whole numbers in it, and the longest axis of each of its larger
        constants."""
        nodes = (self.sources(name) or ([], []))[0]
        attributes = [helper.get_attribute_value(a) for node in nodes for a in node.attribute]
        names = {name, *(i for node in nodes for i in node.input)}
        tensors = [self._tensors[n] for n in sorted(names) if n in self._tensors]
        tensors += [a for a in attributes if isinstance(a, TensorProto)]
        small = [numpy_helper.to_array(t).reshape(-1) for t in tensors if np.prod(t.dims) <= _SMALL]
        numbers = [int(v) for array in small if array.dtype.kind in "iuf" for v in array if np.isfinite(v)]
        for value in attributes:
            numbers += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)]
        return numbers, [max(t.dims) for t in tensors if np.prod(t.dims) > _SMALL]

    def _run(self, name: str, size: Any) -> Array | None:
        if name in self._tensors:
            return numpy_helper.to_array(self._tensors[name])
        found = self.sources(name)
        if found is None:
            return None
        nodes, shapes = found
        constants = {}
        for shape in shapes:
            dims = [d if isinstance(d, int) else size(d) for d in self.dims[shape.input[0]]]
            start = next((a.i for a in shape.attribute if a.name == "start"), 0)
            end = next((a.i for a in shape.attribute if a.name == "end"), len(dims))
            constants[shape.output[0]] = numpy_helper.from_array(np.array(dims[start:end], np.int64), shape.output[0])
        if name in constants:
            return numpy_helper.to_array(constants[name])
        read = {i for node in nodes for i in node.input}
        weights = [t for n, t in self._tensors.items() if n in read]
        return _evaluated(nodes, [*constants.values(), *weights], name, self.types.get(name, 0), self.model)


def _evaluated(
    nodes: list[NodeProto], tensors: list[TensorProto], name: str, elem_type: int, model: ModelProto
) -> Array | None:
    output = helper.make_empty_tensor_value_info(name)
    if elem_type:
        output.type.tensor_type.elem_type = elem_type
    graph = helper.make_graph(nodes, "mask", [], [output], tensors)
    small = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    if sum(int(np.prod(t.dims)) for t in tensors) > _MAX_ELEMENTS:
        return None
    try:
        (value,) = open_session(small.SerializeToString()).run(None, {})
    except Exception:  # sizes at which it cannot be computed, or an operator without a kernel
        return None
    return np.asarray(value)
