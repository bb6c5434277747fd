"""Reads what an ONNX file says of itself, without the onnx library and without its weights.

A forward reader of the messages of onnx.proto. Tensor bytes are skipped by seeking, or read and thrown away where the
stream cannot seek, so memory is flat in the size of the model. The input is untrusted: every length is checked against
the message around it, and nesting, names and work are bounded. Whatever is wrong is `invalid_model`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from app.errors import invalid_model
from app.names import printable
from app.source_models.onnx_wire import ByteStream, Wire, check_name, damaged
from app.source_models.outline import MOST_NODES

# A subgraph is three messages deep, and protobuf reads no file of more than 100; shape inference writes a few deeper.
_MAX_GRAPH_DEPTH = 28
_MAX_NAME_BYTES = 4096
_MAX_RANK = 64
# Bytes of names, shapes and file locations that one header may hold.
_MAX_KEPT_BYTES = 32 << 20

_DTYPES = (
    "undefined", "float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool", "float16",
    "float64", "uint32", "uint64", "complex64", "complex128", "bfloat16", "float8e4m3fn", "float8e4m3fnuz",
    "float8e5m2", "float8e5m2fnuz", "uint4", "int4", "float4e2m1", "float8e8m0", "uint2", "int2", "float6e2m3",
    "float6e3m2",
)  # fmt: skip
_BITS = {
    "float32": 32, "uint8": 8, "int8": 8, "uint16": 16, "int16": 16, "int32": 32, "int64": 64, "bool": 8,
    "float16": 16, "float64": 64, "uint32": 32, "uint64": 64, "complex64": 64, "complex128": 128, "bfloat16": 16,
    "float8e4m3fn": 8, "float8e4m3fnuz": 8, "float8e5m2": 8, "float8e5m2fnuz": 8, "float8e8m0": 8, "uint4": 4,
    "int4": 4, "float4e2m1": 4, "uint2": 2, "int2": 2, "float6e2m3": 6, "float6e3m2": 6,
}  # fmt: skip


class TensorInfo(TypedDict):
    """An input or output. Dimensions are numbers or symbol names; `shape` is None where the rank is unknown. `dtype`
    is an element type, or "sequence", "map", "optional", "sparse_tensor", "opaque", "undefined"."""

    name: str
    dtype: str
    shape: list[int | str] | None


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose bytes stand in another file. `size_bytes` is the stated length, else what dtype and dimensions
    take (None where they are unknown)."""

    tensor: str
    location: str
    offset: int
    size_bytes: int | None


@dataclass
class OnnxHeader:
    """`inputs` are without initializers. `nodes` and `ops` count the graph and its subgraphs, not function bodies;
    an op of another domain than ai.onnx is written `domain.OpType`. `order`: the ops of the graph's own first nodes, in
    the file's order; `own_nodes`: how many it has. `parameters` counts initializer elements."""

    ir_version: int = 0
    opset_imports: dict[str, int] = field(default_factory=dict)
    producer_name: str = ""
    producer_version: str = ""
    graph_name: str = ""
    inputs: list[TensorInfo] = field(default_factory=list)
    outputs: list[TensorInfo] = field(default_factory=list)
    nodes: int = 0
    ops: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    own_nodes: int = 0
    parameters: int = 0
    functions: int = 0
    external: list[ExternalTensor] = field(default_factory=list)


def _bytes(number: int) -> int:
    """The tag of a length-delimited field."""
    return number << 3 | 2


def _int(number: int) -> int:
    """The tag of a varint field."""
    return number << 3


# Tags of onnx.proto, by message.
_MODEL_IR, _MODEL_PRODUCER, _MODEL_PRODUCER_VERSION = _int(1), _bytes(2), _bytes(3)
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTION = _bytes(7), _bytes(8), _bytes(20), _bytes(25)
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INITIALIZER, _GRAPH_INPUT = _bytes(1), _bytes(2), _bytes(5), _bytes(11)
_GRAPH_OUTPUT, _GRAPH_SPARSE = _bytes(12), _bytes(15)
_NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = _bytes(3), _bytes(4), _bytes(5), _bytes(7)
_FUNCTION_NODE, _FUNCTION_ATTRIBUTE = _bytes(7), _bytes(11)
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = (_bytes(5), _bytes(10)), (_bytes(6), _bytes(11))
_ATTRIBUTE_SPARSE = (_bytes(22), _bytes(23))
# Elements of `floats` and `ints`: tree ensembles have millions of them, one field each.
_NUMBERS = re.compile(rb"(?:\x40[\x80-\xff]{0,9}[\x00-\x7f]|\x3d.{4})+", re.DOTALL)
_TENSOR_DIM, _TENSOR_DIMS_PACKED, _TENSOR_DTYPE, _TENSOR_NAME = _int(1), _bytes(1), _int(2), _bytes(8)
_TENSOR_EXTERNAL, _TENSOR_LOCATION = _bytes(13), _int(14)
_TYPE_KINDS: dict[int, str] = {
    _bytes(4): "sequence",
    _bytes(5): "map",
    _bytes(7): "opaque",
    _bytes(8): "sparse_tensor",
    _bytes(9): "optional",
}


class _Scan:
    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._header = OnnxHeader()
        self._initializers: set[str] = set()
        self._kept = 0
        self._keys: dict[str, str] = {}
        self._symbols: set[str] = set()

    def model(self) -> OnnxHeader:
        wire, header = self._wire, self._header
        graphs = 0
        for tag, value in wire.fields(wire.size):
            end = wire.pos + value
            if tag == _MODEL_IR:
                header.ir_version = value
            elif tag == _MODEL_PRODUCER:
                header.producer_name = printable(self._text(value))
            elif tag == _MODEL_PRODUCER_VERSION:
                header.producer_version = printable(self._text(value))
            elif tag == _MODEL_OPSET:
                self._opset(end)
            elif tag == _MODEL_GRAPH:
                graphs += 1
                self._graph(end, 0, top=True)
            elif tag == _MODEL_TRAINING:
                for inner, length in wire.fields(end):
                    if inner in (_bytes(1), _bytes(2)):
                        self._graph(wire.pos + length, 1, counted=False)
            elif tag == _MODEL_FUNCTION:
                header.functions += 1
                self._function(end)
        if not graphs:
            raise damaged("it holds no graph")
        if not header.ir_version:
            raise damaged("it states no IR version")
        if header.parameters >= 1 << 62:
            raise damaged("its tensors have impossible dimensions")
        header.inputs = [i for i in header.inputs if i["name"] not in self._initializers]
        self._name_unknown_dimensions()
        return header

    def _keep(self, size: int) -> None:
        """Counts what stays in memory: a fixed price per item and its bytes."""
        self._kept += size + 32
        if self._kept > _MAX_KEPT_BYTES:
            raise damaged(f"its names and shapes take more than {_MAX_KEPT_BYTES} bytes")

    def _text(self, size: int) -> str:
        at = self._wire.pos
        if size > _MAX_NAME_BYTES:
            raise damaged(f"the name at byte {at} is longer than {_MAX_NAME_BYTES} bytes")
        self._keep(size)
        try:
            return self._wire.take(size).decode()
        except UnicodeDecodeError:
            raise damaged(f"the name at byte {at} is not UTF-8") from None

    def _name(self, size: int, what: str) -> str:
        """A name that others refer to: refused where it holds control characters."""
        at = self._wire.pos
        return check_name(self._text(size), what, at)

    def _opset(self, end: int) -> None:
        domain, version = "", 0
        for tag, value in self._wire.fields(end):
            if tag == _bytes(1):
                domain = self._name(value, "an operator-set domain")
            elif tag == _int(2):
                version = _signed(value)
        self._header.opset_imports[domain or "ai.onnx"] = version

    def _graph(self, end: int, depth: int, *, top: bool = False, counted: bool = True) -> None:
        if depth > _MAX_GRAPH_DEPTH:
            raise damaged(f"its graphs are nested more than {_MAX_GRAPH_DEPTH} deep")
        wire = self._wire
        for tag, value in wire.fields(end):
            if tag == _GRAPH_NODE:
                self._node(wire.pos + value, depth, counted=counted)
            elif tag == _GRAPH_INITIALIZER:
                self._tensor(wire.pos + value, initializer=top, counted=counted)
            elif tag == _GRAPH_SPARSE:
                self._sparse(wire.pos + value, initializer=top)
            elif not top:
                continue
            elif tag == _GRAPH_NAME:
                self._header.graph_name = printable(self._text(value))
            elif tag == _GRAPH_INPUT:
                self._header.inputs.append(self._value_info(wire.pos + value))
            elif tag == _GRAPH_OUTPUT:
                self._header.outputs.append(self._value_info(wire.pos + value))

    def _function(self, end: int) -> None:
        wire = self._wire
        for tag, value in wire.fields(end):
            if tag == _FUNCTION_NODE:
                self._node(wire.pos + value, 0, counted=False)
            elif tag == _FUNCTION_ATTRIBUTE:
                self._attribute(wire.pos + value, 0, counted=False)

    def _node(self, end: int, depth: int, *, counted: bool) -> None:
        wire = self._wire
        op = domain = ""
        for tag, value in wire.fields(end):
            if tag == _NODE_ATTRIBUTE:
                self._attribute(wire.pos + value, depth, counted=counted)
            elif tag == _NODE_OP:
                op = self._transient(value, "an op type")
            elif tag == _NODE_DOMAIN:
                domain = self._transient(value, "the domain of an op")
            elif tag == _NODE_NAME and value <= _MAX_NAME_BYTES:
                # Not kept; but what fails later is told by it.
                self._transient(value, "a node")
        if not counted:
            return
        header = self._header
        key = f"{domain}.{op}" if domain not in ("", "ai.onnx") else op
        if key not in header.ops:
            self._keep(len(key))
        key = self._keys.setdefault(key, key)
        header.ops[key] = header.ops.get(key, 0) + 1
        header.nodes += 1
        if depth == 0:
            header.own_nodes += 1
            if len(header.order) < MOST_NODES:
                header.order.append(key)

    def _transient(self, size: int, what: str | None = None) -> str:
        """A text that is usually known already, so that it costs nothing to keep; a checked name where it is `what`."""
        kept = self._kept
        text = self._text(size) if what is None else self._name(size, what)
        self._kept = kept
        return text

    def _attribute(self, end: int, depth: int, *, counted: bool) -> None:
        wire = self._wire
        for tag, value in wire.fields(end, ignored=_NUMBERS):
            if tag in _ATTRIBUTE_TENSORS:
                self._tensor(wire.pos + value, counted=False)
            elif tag in _ATTRIBUTE_GRAPHS:
                self._graph(wire.pos + value, depth + 1, counted=counted)
            elif tag in _ATTRIBUTE_SPARSE:
                self._sparse(wire.pos + value)

    def _sparse(self, end: int, *, initializer: bool = False) -> None:
        # A sparse initializer has the name of its values.
        for tag, value in self._wire.fields(end):
            if tag == _bytes(1):
                self._tensor(self._wire.pos + value, initializer=initializer)
            elif tag == _bytes(2):
                self._tensor(self._wire.pos + value, counted=False)

    def _tensor(self, end: int, *, initializer: bool = False, counted: bool = True) -> None:
        wire = self._wire
        name, dtype, external = "", 0, False
        dims: list[int] = []
        entries: dict[str, str] = {}
        for tag, value in wire.fields(end):
            if tag == _TENSOR_DIM:
                dims.append(_signed(value))
            elif tag == _TENSOR_DIMS_PACKED:
                stop = wire.pos + value
                while wire.pos < stop and len(dims) <= _MAX_RANK:
                    dims.append(_signed(wire.varint()))
            elif tag == _TENSOR_DTYPE:
                dtype = value
            elif tag == _TENSOR_NAME:
                name = self._transient(value, "a tensor")
            elif tag == _TENSOR_EXTERNAL:
                key, text = self._entry(wire.pos + value)
                if key in ("location", "offset", "length"):
                    entries[key] = text
            elif tag == _TENSOR_LOCATION:
                external = value == 1
            if len(dims) > _MAX_RANK:
                raise damaged(f"the tensor before byte {wire.pos} has more than {_MAX_RANK} dimensions")
        elements = 1
        for dim in dims:
            elements *= max(dim, 0)
        if initializer:
            self._keep(len(name))
            self._initializers.add(name)
        if counted:
            self._header.parameters += elements
        if external:
            self._external(name, entries, elements, _dtype_name(dtype))

    def _entry(self, end: int) -> tuple[str, str]:
        key = text = ""
        for tag, value in self._wire.fields(end):
            if tag == _bytes(1):
                key = self._transient(value)
            elif tag == _bytes(2):
                text = self._transient(value)
        return key, text

    def _external(self, name: str, entries: dict[str, str], elements: int, dtype: str) -> None:
        numbers: dict[Literal["offset", "length"], int] = {}
        for key in ("offset", "length"):
            text = entries.get(key)
            if text is None:
                continue
            if not (text.isascii() and text.isdigit() and len(text) < 20):
                raise invalid_model(
                    f"The external data of the tensor {name!r} has the {key} {text[:50]!r}, which is no number.",
                    tensor=name,
                )
            numbers[key] = int(text)
        location = entries.get("location", "")
        if not location:
            raise invalid_model(f"The external data of the tensor {name!r} names no file.", tensor=name)
        self._keep(len(name) + len(location) + 100)
        size = numbers.get("length")
        if size is None and dtype in _BITS:
            size = (elements * _BITS[dtype] + 7) // 8
        self._header.external.append(ExternalTensor(name, location, numbers.get("offset", 0), size))

    def _value_info(self, end: int) -> TensorInfo:
        wire = self._wire
        info = TensorInfo(name="", dtype="undefined", shape=None)
        for tag, value in wire.fields(end):
            if tag == _bytes(1):
                info["name"] = self._name(value, "an input or output")
            elif tag == _bytes(2):
                for kind, length in wire.fields(wire.pos + value):
                    if kind == _bytes(1):
                        self._tensor_type(wire.pos + length, info)
                    elif kind in _TYPE_KINDS:
                        info["dtype"] = _TYPE_KINDS[kind]
        self._keep(100)
        return info

    def _tensor_type(self, end: int, info: TensorInfo) -> None:
        for tag, value in self._wire.fields(end):
            if tag == _int(1):
                info["dtype"] = _dtype_name(value)
            elif tag == _bytes(2):
                stop = self._wire.pos + value
                dims = self._wire.fields(stop)
                shape = [self._dimension(self._wire.pos + length) for dim, length in dims if dim == _bytes(1)]
                info["shape"] = shape
                if len(shape) > _MAX_RANK:
                    raise damaged(f"the tensor {info['name']!r} has more than {_MAX_RANK} dimensions")

    def _dimension(self, end: int) -> int | str:
        """A number, a symbol, or "" where nothing is known (-1 is written by some exporters)."""
        dimension: int | str = ""
        for tag, value in self._wire.fields(end):
            if tag == _int(1):
                dimension = _signed(value) if _signed(value) >= 0 else ""
            elif tag == _bytes(2):
                dimension = self._name(value, "a dimension")
        self._keep(8)
        if isinstance(dimension, str):
            self._symbols.add(dimension)
        return dimension

    def _name_unknown_dimensions(self) -> None:
        number = 0
        for info in (*self._header.inputs, *self._header.outputs):
            shape = info["shape"] or []
            for axis, dimension in enumerate(shape):
                if dimension == "":
                    while f"unk__{number}" in self._symbols:
                        number += 1
                    shape[axis] = f"unk__{number}"
                    number += 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _dtype_name(value: int) -> str:
    return _DTYPES[value] if value < len(_DTYPES) else f"unknown_{value}"


def read_onnx_header(stream: ByteStream, size: int) -> OnnxHeader:
    """Reads a ModelProto of `size` bytes from the start of the stream. Raises `invalid_model`."""
    return _Scan(Wire(stream, size)).model()
