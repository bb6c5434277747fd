"""float16 and bfloat16 copies of a graph."""

from __future__ import annotations

import heapq
import warnings
from collections import Counter
from collections.abc import Sequence

import ml_dtypes
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from workers.graph.onnx_graph import reads

_WEIGHTED_OPS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "Attention")
_LOW_PRECISION = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def has_low_precision_weights(model: ModelProto) -> bool:
    return any(i.data_type in _LOW_PRECISION for i in model.graph.initializer)


def to_float16(model: ModelProto, excluded: Sequence[str] = ()) -> ModelProto:
    """Weights and activations in float16, inputs and outputs as they were; ops without float16 kernels stay float32.

    Values beyond the range of float16 (±65504) are clamped to it.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted: ModelProto = convert_float_to_float16(
            model,
            keep_io_types=True,
            op_block_list=sorted(DEFAULT_OP_BLOCK_LIST),
            node_block_list=sorted(excluded) or None,
            disable_shape_infer=True,  # `prepare` has done it
        )
    sort_nodes(converted)
    return converted


def to_bfloat16(model: ModelProto, excluded: Sequence[str] = ()) -> int:
    """Store the weights of Conv, MatMul, Gemm and LSTM in bfloat16, cast back where they are used; in place.

    The result computes in float32 on any runtime (ONNX Runtime's CPU provider has no bfloat16 kernels) with weights of
    half the size; backends with bfloat16 units fold the casts. Returns the number of nodes that read such a weight.
    """
    graph = model.graph
    weights = {i.name: i for i in graph.initializer if i.data_type == TensorProto.FLOAT}
    outputs = {o.name for o in graph.output}
    casts: dict[str, NodeProto] = {}
    readers = 0
    for node in graph.node:
        if node.op_type not in _WEIGHTED_OPS or node.name in excluded:
            continue
        names = [
            name for name in node.input if name in weights and len(weights[name].dims) >= 2 and name not in outputs
        ]
        for name in names:
            casts.setdefault(name, helper.make_node("Cast", [f"{name}_bf16"], [name], f"{name}_from_bf16", to=1))
        readers += bool(names)
    for name in casts:
        rounded = numpy_helper.to_array(weights[name]).astype(ml_dtypes.bfloat16)
        weights[name].CopyFrom(
            helper.make_tensor(f"{name}_bf16", TensorProto.BFLOAT16, rounded.shape, rounded.tobytes(), raw=True)
        )
    nodes = [*casts.values(), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return readers


def count_low_precision(model: ModelProto) -> dict[str, int]:
    """Nodes that read a float16 or bfloat16 weight (directly or through its Cast), by op type."""
    weights = {i.name for i in model.graph.initializer if i.data_type in _LOW_PRECISION}
    casts = {n.output[0] for n in model.graph.node if n.op_type == "Cast" and n.input[0] in weights}
    readers = [n for n in model.graph.node if n.op_type != "Cast" and any(i in weights | casts for i in n.input)]
    return dict(sorted(Counter(n.op_type for n in readers).items()))


def sort_nodes(model: ModelProto) -> None:
    """Bring the graph's nodes into topological order, stable; converters append nodes at the end."""
    nodes = list(model.graph.node)
    producer = {output: index for index, node in enumerate(nodes) for output in node.output if output}
    needs = [{producer[name] for name in reads(node) if name in producer} for node in nodes]
    readers: dict[int, list[int]] = {}
    for index, sources in enumerate(needs):
        for source in sources:
            readers.setdefault(source, []).append(index)
    waiting = [len(sources) for sources in needs]
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers.get(index, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) == len(nodes):
        del model.graph.node[:]
        model.graph.node.extend(nodes[index] for index in order)
