"""Reads the inputs and outputs of a `.pt2` (torch.export) from its JSON graph, without torch and without unpickling.

Layouts: up to torch 2.7 `serialized_exported_program.json` at the root, later `<name>/models/<model>.json`; both hold
an `ExportedProgram` of torch/_export/serde/schema.py. Only the signature and the tensors it names are decoded; the rest
of the graph, megabytes of it, is passed over as bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from app.domain.limits import INT64_MAX
from app.errors import AppError, invalid_model
from app.names import forbidden_character, printable
from app.source_models.onnx_header import TensorInfo
from app.source_models.outline import MOST_NODES

# GPT-2 small has 4 MiB of graph.
_MAX_GRAPH_BYTES = 32 << 20
_MAX_DECODED_BYTES = 4 << 20
# A graph of 100,000 nodes has about two million.
_MAX_BRACKETS = 3_000_000
_MAX_TENSORS = 10_000
_MAX_OPS = 10_000
_OLD_GRAPH = "serialized_exported_program.json"

# torch's ScalarType of the schema, with ONNX's names.
_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8e4m3fn", 30: "float8e5m2",
    31: "float8e4m3fnuz", 32: "float8e5m2fnuz", 33: "float8e8m0", 34: "uint32", 35: "uint64",
}  # fmt: skip

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_STRING_AT = re.compile(_STRING, re.DOTALL)
# Up to the next bracket outside of a string. Used with match(), never search(): that would be quadratic.
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+[\[\]{}]", re.DOTALL)
_SCALAR = re.compile(rb"[^\s,\]}]+")
_SPACE = re.compile(rb"\s*")
_TARGET = re.compile(rb'"target": ?"(?:torch\.ops\.)?([\w.:]{1,200})"')


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass
class Pt2Header:
    """`readable` is False where the graph is larger or of another schema than is read here: then inputs and outputs
    are empty. Symbolic dimensions have the names that torch.export gave them ("s17"). `order`: ops of the first
    nodes."""

    readable: bool = False
    inputs: list[TensorInfo] = field(default_factory=list)
    outputs: list[TensorInfo] = field(default_factory=list)
    ops: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    torch_version: str = ""


def pt2_graph_member(names: Iterable[str]) -> str | None:
    """The member that holds the exported graph; None where the archive is no torch.export file."""
    graphs = [n for n in names if n == _OLD_GRAPH or re.fullmatch(r"([^/]+/)?models/[^/]+\.json", n)]
    if len(graphs) > 1:
        graphs = [n for n in graphs if n.endswith("models/model.json")]
    return graphs[0] if len(graphs) == 1 else None


def read_pt2_header(stream: _Readable, size: int) -> Pt2Header:
    """`stream` is the graph member, of `size` bytes. Raises `invalid_model` where it is no JSON object."""
    if size > _MAX_GRAPH_BYTES:
        return Pt2Header()
    parts: list[bytes] = []
    while part := stream.read(1 << 20):
        parts.append(part)
        if sum(map(len, parts)) > _MAX_GRAPH_BYTES:
            return Pt2Header()
    text = b"".join(parts)
    try:
        return _read(text)
    except _UnknownSchema:
        return Pt2Header()
    except (ValueError, RecursionError, IndexError) as e:
        raise _damaged() from e


def _damaged() -> AppError:
    return invalid_model(
        "The .pt2 file is damaged: its graph is not valid JSON.",
        remedy="Save the program again with torch.export.save, and upload that file whole.",
    )


class _UnknownSchema(Exception):
    """The JSON is not of the shape that is read here."""


Span = tuple[int, int]


def _read(text: bytes) -> Pt2Header:
    start = _skip_space(text, 0)
    top = _spans(text, start)
    module = _spans(text, _need(top, "graph_module")[0])
    graph = _spans(text, _need(module, "graph")[0])
    signature = _decode(text, _need(module, "signature"))
    inputs = _tensor_names(signature, "input_specs", "user_input")
    outputs = _tensor_names(signature, "output_specs", "user_output")
    metas: dict[str, Any] = {}
    wanted = {*inputs, *outputs}
    for name, span in _members(text, _need(graph, "tensor_values")[0]):
        if name in wanted:
            metas[name] = _decode(text, span)
    header = Pt2Header(readable=True)
    header.inputs = [_tensor_info(name, metas.get(name)) for name in inputs]
    header.outputs = [_tensor_info(name, metas.get(name)) for name in outputs]
    for match in _TARGET.finditer(text, *graph.get("nodes", (0, 0))):
        op = match[1].decode()
        if op in header.ops or len(header.ops) < _MAX_OPS:
            header.ops[op] = header.ops.get(op, 0) + 1
        if len(header.order) < MOST_NODES:
            header.order.append(op)
    if "torch_version" in top and isinstance(version := _decode(text, top["torch_version"]), str):
        header.torch_version = printable(version[:100])
    return header


def _need(spans: dict[str, Span], key: str) -> Span:
    if key not in spans:
        raise _UnknownSchema(key)
    return spans[key]


def _skip_space(text: bytes, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _value_end(text: bytes, start: int) -> int:
    first = text[start : start + 1]
    if first in (b"{", b"["):
        depth, at = 0, start
        for _ in range(_MAX_BRACKETS):
            bracket = _TO_BRACKET.match(text, at)
            if not bracket:
                raise ValueError("unbalanced brackets")
            at = bracket.end()
            depth += 1 if text[at - 1] in b"[{" else -1
            if not depth:
                return at
        raise _UnknownSchema
    match = (_STRING_AT if first == b'"' else _SCALAR).match(text, start)
    if not match:
        raise ValueError("no value")
    return match.end()


def _members(text: bytes, start: int) -> Iterator[tuple[str, Span]]:
    """Key and place of every value of the object that starts at `start`."""
    if text[start : start + 1] != b"{":
        if start == 0 or not text:
            raise ValueError("not an object")
        raise _UnknownSchema
    at = _skip_space(text, start + 1)
    while text[at : at + 1] != b"}":
        key = _STRING_AT.match(text, at)
        if not key:
            raise ValueError("no key")
        at = _skip_space(text, key.end())
        if text[at : at + 1] != b":":
            raise ValueError("no colon")
        at = _skip_space(text, at + 1)
        end = _value_end(text, at)
        if len(key[0]) < 4096:
            yield str(json.loads(key[0])), (at, end)
        at = _skip_space(text, end)
        if text[at : at + 1] == b",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != b"}":
            raise ValueError("no comma")


def _spans(text: bytes, start: int) -> dict[str, Span]:
    spans: dict[str, Span] = {}
    for name, span in _members(text, start):
        spans[name] = span
        if len(spans) > 1000:
            raise _UnknownSchema
    return spans


def _decode(text: bytes, span: Span) -> Any:
    if span[1] - span[0] > _MAX_DECODED_BYTES:
        raise _UnknownSchema
    return json.loads(text[span[0] : span[1]])


def _tensor_names(signature: Any, specs: str, kind: str) -> list[str]:
    """The tensors among the user's inputs or outputs; numbers and None among them are no inputs of an engine."""
    names: list[str] = []
    try:
        for spec in signature[specs]:
            if kind in spec and "as_tensor" in (arg := spec[kind]["arg"]):
                name = arg["as_tensor"]["name"]
                if not isinstance(name, str) or len(names) >= _MAX_TENSORS:
                    raise _UnknownSchema
                names.append(_checked(name, "an input or output"))
    except (KeyError, TypeError) as e:
        raise _UnknownSchema from e
    return names


def _tensor_info(name: str, meta: Any) -> TensorInfo:
    try:
        return TensorInfo(name=name, dtype=_DTYPES[meta["dtype"]], shape=[_dimension(d) for d in meta["sizes"]])
    except (KeyError, TypeError) as e:
        raise _UnknownSchema from e


def _dimension(size: Any) -> int | str:
    number = size.get("as_int") if isinstance(size, dict) else None
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= INT64_MAX:
        return number
    expression = size["as_expr"]["expr_str"]
    if not isinstance(expression, str) or not 0 < len(expression) <= 1000:
        raise _UnknownSchema
    # "Add(Symbol('s0', positive=True, integer=True), Integer(1))" is "Add(s0, 1)"
    expression = re.sub(r"Symbol\('([^']+)'[^()]*\)", r"\1", expression)
    return _checked(re.sub(r"Integer\((-?\d+)\)", r"\1", expression), "a dimension")


def _checked(name: str, what: str) -> str:
    if character := forbidden_character(name):
        raise invalid_model(
            f"The name of {what} holds the control character {character}: {name[:200]!r}.",
            tensor=printable(name[:200]),
            remedy="Rename it to printable characters, and export the program again.",
        )
    return name
