"""Repairs of a Q/DQ graph that ONNX Runtime's quantizer wrote: nodes that stay in float read float values.

The quantizer puts every reader of a quantized tensor behind its Q/DQ pair, excluded nodes too, and every reader of a
shared weight behind the rounded one. A node that is to stay in float then computes on rounded values, and pays for a
pair between two float nodes.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, load, numpy_helper

from workers.graph.onnx_files import read_external
from workers.graph.onnx_graph import reads
from workers.graph.rewriting import captured, drop_unused

Q, DQ = "QuantizeLinear", "DequantizeLinear"
_TRANSPOSED = "_Transposed"  # what it appends to the weight of a Gemm that it rewrites to MatMul
_DEQUANTIZED = "_DequantizeLinear_Output"  # what the quantizer appends to a weight's name


def keep_float(
    model: ModelProto, source: Path, op_types: Collection[str], excluded: Collection[str], *, rounded_outputs: bool
) -> None:
    """Give the nodes that are not quantized their float inputs back, in place, and drop the pairs nobody reads.

    `source` is the float model file. `rounded_outputs`: quantized nodes write through a Q/DQ pair that their integer
    kernel takes over (convolutions): what they wrote stays rounded for every reader. Otherwise float nodes read each
    activation before its rounding.
    """
    graph = model.graph
    _restore_weights(model, source, op_types, excluded)
    pairs = _activation_pairs(graph)
    producers = {name: node for node in graph.node for name in node.output}
    dequantized = {name for node in graph.node if node.op_type == DQ for name in node.output}

    def on_integers(node: NodeProto | None) -> bool:
        return node is not None and _quantized(node, op_types, excluded) and not dequantized.isdisjoint(node.input)

    before = {dq: x for dq, x in pairs.items() if not (rounded_outputs and on_integers(producers.get(x)))}
    for node in graph.node:
        if node.op_type in (Q, DQ):
            continue
        if not _quantized(node, op_types, excluded) or dequantized.isdisjoint(node.input):
            for index, name in enumerate(node.input):
                node.input[index] = before.get(name, name)
    drop_unread(model)


def undo_dequantized_weights(model: ModelProto, source: Path) -> None:
    """Put float weights where a DequantizeLinear makes them from rounded ones, in place: the dynamic quantizer serves
    the float readers of a weight so, which it may have transposed before."""
    graph = model.graph
    weights = {i.name: i for i in load(source, load_external_data=False).graph.initializer}
    present = {i.name for i in graph.initializer}
    kept, restored = [], []
    for node in graph.node:
        name = node.output[0] if node.op_type == DQ and node.input[0] in present else ""
        original = weights.get(name) or weights.get(name.removesuffix(_TRANSPOSED))
        if not name or original is None:
            kept.append(node)
            continue
        tensor = load_weight(original, source.parent)
        if name not in weights:
            tensor = numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(tensor).T), name)
        restored.append(tensor)
    if restored:
        del graph.node[:]
        graph.node.extend(kept)
        graph.initializer.extend(restored)


def drop_unread(model: ModelProto) -> None:
    """Remove Q and DQ nodes whose values nobody reads, then initializers that nobody reads; in place."""
    graph = model.graph
    outputs = {o.name for o in graph.output}
    while True:
        used = {name for node in graph.node for name in reads(node)} | outputs
        kept = [n for n in graph.node if n.op_type not in (Q, DQ) or not used.isdisjoint(n.output)]
        if len(kept) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(kept)
    drop_unused(graph)


def load_weight(tensor: TensorProto, folder: Path) -> TensorProto:
    """A copy of an initializer with its data, read from `folder` where they are external."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    read_external(copy, folder)
    return copy


def _quantized(node: NodeProto, op_types: Collection[str], excluded: Collection[str]) -> bool:
    return node.op_type in op_types and node.name not in excluded


def _activation_pairs(graph: GraphProto) -> dict[str, str]:
    """Dequantized tensor → the float tensor that was rounded."""
    rounded = {n.output[0]: n.input[0] for n in graph.node if n.op_type == Q}
    return {n.output[0]: rounded[n.input[0]] for n in graph.node if n.op_type == DQ and n.input[0] in rounded}


def _restore_weights(model: ModelProto, source: Path, op_types: Collection[str], excluded: Collection[str]) -> None:
    """Readers in float get the float weight back, where the quantizer gave them the rounded one or took it away."""
    graph = model.graph
    weights = {i.name: i for i in load(source, load_external_data=False).graph.initializer}
    present = {i.name for i in graph.initializer}
    produced = {name for node in graph.node for name in node.output}
    rounded = {}  # dequantized weight → (the weight, the name of its float copy here)
    for node in graph.node:
        if node.op_type != DQ or node.input[0] not in present:
            continue
        name = node.output[0].removesuffix(_DEQUANTIZED)
        if name in weights:
            rounded[node.output[0]] = (name, f"{name}_float" if name in produced else name)
    wanted = {}
    for node in graph.node:
        if node.op_type in (Q, DQ) or _quantized(node, op_types, excluded):
            continue
        for index, name in enumerate(node.input):
            if name in rounded:
                weight, node.input[index] = rounded[name]
                wanted[node.input[index]] = weight
    for name in captured(graph):
        if name in weights and name not in present | produced:
            wanted[name] = name
    for name, weight in sorted(wanted.items()):
        if name not in present:
            tensor = load_weight(weights[weight], source.parent)
            tensor.name = name
            graph.initializer.append(tensor)
