"""What each node of a graph has to do, from its shapes: the same model gives the same figures on every machine.

A node's work is counted in multiply-adds. Reading or writing a value is counted as several of them, which is about what
it costs on a processor with vector instructions: so a product of small channels over a large image is not taken for
cheap, and what only adds or scales is not free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from workers.graph.interpreter import open_session
from workers.graph.rewriting import attribute

MOVED = 16  # multiply-adds in the time in which one value is read or written
_ASKED = "__shape__"
# They may write sequences or optional values.
_NO_TENSORS = (
    "If",
    "Loop",
    "Scan",
    "SequenceConstruct",
    "SequenceEmpty",
    "SplitToSequence",
    "SequenceInsert",
    "Optional",
)
_RECURRENT = ("LSTM", "GRU", "RNN")

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]


def node_work(prepared: Path, feeds: Mapping[str, Array]) -> dict[str, float]:
    """Work of the nodes of the main graph by name, on these inputs; those whose shapes do not come out are left out.
    `prepared`: a model file as `prepare` writes it."""
    model = onnx.load(prepared, load_external_data=False)
    known = _shapes(model, prepared, feeds)
    found = {}
    for node in model.graph.node:
        work = _work(node, known)
        if work is not None:
            found[node.name] = work
    return found


def _shapes(model: ModelProto, prepared: Path, feeds: Mapping[str, Array]) -> dict[str, Shape]:
    """Of every tensor, as it runs: sizes that depend on others are not to be had otherwise (positions that are cut to
    the length of the input, say)."""
    known: dict[str, Shape] = {i.name: tuple(i.dims) for i in model.graph.initializer}
    wanted = {n for node in model.graph.node if node.op_type not in _NO_TENSORS for n in _ends(node)} - {*known, ""}
    names = sorted(wanted - {o for node in model.graph.node if node.op_type in _NO_TENSORS for o in node.output})
    graph = model.graph
    asked = ModelProto()
    asked.CopyFrom(model)
    del asked.graph.output[:]
    for index, name in enumerate(names):
        asked.graph.node.append(helper.make_node("Shape", [name], [f"{_ASKED}{index}"], name=f"{_ASKED}{index}"))
        asked.graph.output.append(helper.make_tensor_value_info(f"{_ASKED}{index}", TensorProto.INT64, None))
    path = prepared.with_name("shapes.onnx")  # beside the external weights
    onnx.save(asked, path)
    try:
        session = open_session(path)
        read = {i.name for i in session.get_inputs()} & {i.name for i in graph.input}
        values = session.run(None, {name: value for name, value in feeds.items() if name in read})
    except Exception:  # the runtime raises its own classes; without shapes all nodes are taken to cost the same
        return known
    finally:
        path.unlink()
    return known | {n: tuple(int(size) for size in v) for n, v in zip(names, values, strict=True)}


def _ends(node: NodeProto) -> list[str]:
    """What it reads and writes, as far as its work follows from that."""
    return [*node.input[:2], *node.output[:1]]


def _work(node: NodeProto, known: Mapping[str, Shape]) -> float | None:
    """None where a shape that it needs is not known."""
    first, second = (known.get(name) for name in [*node.input[:2], "", ""][:2])
    out = known.get(node.output[0]) if node.output else None
    if first is None or out is None:
        return None
    moved = float(math.prod(first) + math.prod(out))
    products = _products(node, first, second or (), out)
    return None if products is None else products + MOVED * moved


def _products(node: NodeProto, first: Shape, second: Shape, out: Shape) -> float | None:
    op = node.op_type
    if op in ("Conv", "ConvTranspose"):
        # Each value that is written (read, where the convolution is transposed) meets the weights of its channel.
        return float(math.prod(out if op == "Conv" else first) * math.prod(second[1:])) if second else None
    if op in ("MatMul", "Gemm"):
        inner = first[0] if attribute(node, "transA", 0) else first[-1]
        return float(math.prod(out) * inner)
    if op in _RECURRENT:
        width = out[-1]  # [length, directions, batch, width]
        gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
        return float(math.prod(out) * gates * (first[-1] + width))
    return 0.0
