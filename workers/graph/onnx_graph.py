"""Reading an ONNX graph: its nodes at every depth, inputs and outputs, external data, and what kind of network it is.

Pure functions on a `ModelProto`. A model whose weights lie in external files is read without them, so none of this
needs memory for the weights.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    StringStringEntryProto,
    TensorProto,
    ValueInfoProto,
    helper,
)

from workers.kernel import TensorSpec

VALUES_KEY = "anneal.values"
STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
CONTRIB_DOMAIN = "com.microsoft"  # of the ops that ONNX Runtime fuses

_QUANTIZED_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
        "MatMulNBits",
        "QAttention",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "MatMulIntegerToFloat",
        "QLinearAdd",
        "QGemm",
    }
)
_RECURRENT_OPS = frozenset({"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})
_CONV_OPS = frozenset({"Conv", "ConvTranspose", "QLinearConv", "ConvInteger", "FusedConv"})
_MATMUL_OPS = frozenset({"MatMul", "Gemm", "MatMulInteger", "QLinearMatMul", "FusedMatMul", "MatMulNBits", "QGemm"})
_ATTENTION_OPS = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention"})
_NORM_OPS = frozenset(
    {
        "LayerNormalization",
        "SkipLayerNormalization",
        "EmbedLayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
# Weights; int32 and int64 hold shapes, axes and indices.
_WEIGHT_TYPES = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT4,
        TensorProto.UINT4,
        TensorProto.FLOAT8E4M3FN,
        TensorProto.FLOAT8E5M2,
    }
)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of an If, Loop or Scan; none for other nodes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def nodes_of(nodes: Sequence[NodeProto]) -> Iterator[NodeProto]:
    """These nodes and all nodes in their bodies."""
    for node in nodes:
        yield node
        for body in subgraphs(node):
            yield from nodes_of(body.node)


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Every node: of the graph, of bodies at any depth, of the model's local functions."""
    yield from nodes_of(model.graph.node)
    for function in model.functions:
        yield from nodes_of(function.node)


def reads(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, those in its bodies included (also those that the bodies make themselves)."""
    yield from node.input
    for body in subgraphs(node):
        for inner in body.node:
            yield from reads(inner)
        yield from (output.name for output in body.output)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every stored tensor: initializers and tensors in attributes, at every depth."""
    yield from _graph_tensors(model.graph)
    for node in all_nodes(model):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            elif attribute.type == AttributeProto.TENSORS:
                yield from attribute.tensors
            elif attribute.type == AttributeProto.SPARSE_TENSOR:
                yield attribute.sparse_tensor.values
                yield attribute.sparse_tensor.indices
        for body in subgraphs(node):
            yield from _graph_tensors(body)


def external_tensors(model: ModelProto) -> list[TensorProto]:
    """The tensors whose bytes lie in another file."""
    return [t for t in all_tensors(model) if t.data_location == TensorProto.EXTERNAL]


def node_label(node: NodeProto) -> str:
    """How an error names a node: its name, or its op and first output where it has none."""
    return node.name or f"{node.op_type} → {node.output[0] if node.output else '(nothing)'}"


def opset_of(model: ModelProto) -> int:
    """The version of the standard operator set that the model imports; 0 where it imports none."""
    return max((int(o.version) for o in model.opset_import if o.domain in STANDARD_DOMAINS), default=0)


def real_inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """The inputs a caller must give: those without an initializer."""
    initialized = {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    return [i for i in graph.input if i.name not in initialized]


def dtype_name(elem_type: int) -> str:
    """`TensorProto` element type → `float32`, `int64`, `bfloat16`, …; `undefined` for what is not known."""
    try:
        if elem_type == TensorProto.BFLOAT16:
            return "bfloat16"
        if elem_type == TensorProto.STRING:
            return "string"
        return str(helper.tensor_dtype_to_np_dtype(elem_type))
    except (KeyError, ValueError, TypeError):
        return "undefined"


def tensor_spec(info: ValueInfoProto) -> TensorSpec:
    """Name, dtype and shape; dimensions without a name get `<tensor>_dim_<axis>`."""
    tensor = info.type.tensor_type
    shape: list[int | str] = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            shape.append(int(dim.dim_value))
        else:
            shape.append(dim.dim_param or f"{info.name}_dim_{axis}")
    return TensorSpec(info.name, dtype_name(tensor.elem_type), tuple(shape))


def model_specs(model: ModelProto) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs (without initializers) and outputs."""
    inputs = with_values([tensor_spec(i) for i in real_inputs(model.graph)], metadata(model))
    return inputs, [tensor_spec(o) for o in model.graph.output]


def metadata(model: ModelProto) -> dict[str, str]:
    """The model's own properties."""
    return {entry.key: entry.value for entry in model.metadata_props}


def with_values(inputs: Sequence[TensorSpec], properties: Mapping[str, str]) -> list[TensorSpec]:
    """The inputs with the values that they may hold, as `set_values` wrote them into the model's properties."""
    try:
        told = json.loads(properties.get(VALUES_KEY, "{}"))
        found = {str(name): (int(low), high) for name, (low, high) in told.items() if isinstance(high, int | str)}
    except (ValueError, TypeError, AttributeError):  # somebody else's property of that name
        found = {}
    return [replace(spec, values=found.get(spec.name)) for spec in inputs]


def set_values(model: ModelProto, values: Mapping[str, tuple[int, int | str]]) -> None:
    """Write the values that inputs may hold into the model, where every stage and backend finds them."""
    kept = [entry for entry in model.metadata_props if entry.key != VALUES_KEY]
    told = {name: list(bounds) for name, bounds in sorted(values.items())}
    text = [StringStringEntryProto(key=VALUES_KEY, value=json.dumps(told))] if told else []
    del model.metadata_props[:]
    model.metadata_props.extend([*kept, *text])


def keep_values(model: ModelProto, original: ModelProto) -> None:
    """As `original` has them: rewriting a graph may lose a model's properties."""
    set_values(model, {s.name: s.values for s in model_specs(original)[0] if s.values is not None})


def parameter_count(model: ModelProto) -> int:
    """Stored numbers that are weights: every float and 8- or 4-bit tensor. Shapes and indices do not count."""
    return sum(math.prod(t.dims) for t in all_tensors(model) if t.data_type in _WEIGHT_TYPES)


def describe_structure(model: ModelProto) -> dict[str, Any]:
    """`{"ops": {op: count}, "kind": "cnn"|"transformer"|"rnn"|"other", "quantized": bool, "parameters": int}`.

    Every node counts: bodies and local functions too. `kind` is the family that decides how to optimize: recurrent
    ops make an rnn; attention (Softmax between MatMuls, with layer normalizations) a transformer, even behind a
    convolution that cuts patches; else convolutions a cnn. Plain perceptrons are "other".
    """
    ops = Counter(node.op_type for node in all_nodes(model))
    return {
        "ops": dict(sorted(ops.items())),
        "kind": _kind(ops),
        "quantized": any(ops[op] for op in _QUANTIZED_OPS),
        "parameters": parameter_count(model),
    }


def _kind(ops: Counter[str]) -> str:
    def count(names: frozenset[str]) -> int:
        return sum(ops[name] for name in names)

    if count(_RECURRENT_OPS):
        return "rnn"
    convolutions, products = count(_CONV_OPS), count(_MATMUL_OPS)
    # LayerNormalization before opset 17 is spelled with ReduceMean and Sqrt (RMS norm: with Pow and Sqrt).
    spelled = min(ops["ReduceMean"], ops["Sqrt"] + ops["Rsqrt"])
    norms = count(_NORM_OPS) or spelled
    # An attention layer has two products of activations and at least four of weights.
    attention = count(_ATTENTION_OPS) > 0 or (ops["Softmax"] > 0 and norms > 0 and products >= 4 * ops["Softmax"])
    if attention and products + 4 * count(_ATTENTION_OPS) >= convolutions:
        return "transformer"
    return "cnn" if convolutions else "other"
