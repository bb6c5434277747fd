"""What is quantized where, and what was: op types by recipe and architecture, and counts.

Which ops and signs follow what was measured on x86 with VNNI: unsigned activations and signed weights; transformers
only in MatMul and Gemm (quantized LayerNorm, masks and sums break them); never dynamic int8 on convolutions (4–22 times
slower).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Literal

from onnx import ModelProto, NodeProto

from workers.graph.onnx_graph import all_nodes

TRANSFORMER_OPS = ("MatMul", "Gemm")
# Convolutions with what stands between them, so that int8 values pass from one to the next.
CNN_OPS = (
    *("Conv", "ConvTranspose", "MatMul", "Gemm", "Add", "Mul", "Concat", "Resize", "Pad"),
    *("Relu", "LeakyRelu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"),
)
DYNAMIC_OPS = ("MatMul", "Gemm", "Attention", "LSTM")
DYNAMIC_FORBIDDEN = ("Conv", "ConvTranspose")
COMPUTE_OPS = ("Conv", "ConvTranspose", "MatMul", "Gemm")

_FOLLOWING_OPS = (
    *("Relu", "Clip", "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"),
    *("Split", "Slice", "Expand", "Resize", "Pad"),
)
_INTEGER_OPS = (
    *("MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    *("QAttention", "QGemm", "QLinearMatMul", "QLinearConv", "MatMulNBits"),
)
_QUANTIZATION_OPS = (*_INTEGER_OPS, "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def is_quantized(model: ModelProto) -> bool:
    return any(node.op_type in _QUANTIZATION_OPS for node in all_nodes(model))


def default_op_types(model: ModelProto, recipe: Literal["dynamic_int8", "static_int8"]) -> tuple[str, ...]:
    """The ops to quantize, by architecture: anything with attention or normalized features counts as a transformer."""
    if recipe == "dynamic_int8":
        return DYNAMIC_OPS
    ops = Counter(node.op_type for node in model.graph.node)
    attention = ops["Attention"] + ops["MultiHeadAttention"] + ops["LayerNormalization"] + ops["SkipLayerNormalization"]
    products = ops["MatMul"] > ops["Conv"] and ops["Softmax"] > 0
    return TRANSFORMER_OPS if attention or products or not (ops["Conv"] + ops["ConvTranspose"]) else CNN_OPS


def rounds_outputs(op_types: Collection[str]) -> bool:
    """Whether static quantization rounds what the nodes write, too: integer convolutions need it."""
    return not {"Conv", "ConvTranspose"}.isdisjoint(op_types)


def follows_its_input(op_type: str) -> bool:
    """Whether the op only moves, picks or clips values: it is rounded exactly where its input is."""
    return op_type in _FOLLOWING_OPS


def computes_on_weights(node: NodeProto, weights: Collection[str]) -> bool:
    """Whether dynamic quantization takes this node: its weights are constants."""
    position = {"Gather": 0, "EmbedLayerNormalization": 2}.get(node.op_type, 1)
    return len(node.input) > position and node.input[position] in weights


def quantizable_nodes(model: ModelProto, op_types: Collection[str], excluded: Collection[str]) -> list[str]:
    """Names of the nodes with weights that `op_types` covers."""
    heavy = {*COMPUTE_OPS, "Attention", "LSTM", "Gather", "EmbedLayerNormalization"} & set(op_types)
    return [n.name for n in model.graph.node if n.op_type in heavy and n.name not in excluded]


def count_quantized(model: ModelProto, op_types: Collection[str], excluded: Collection[str] = ()) -> dict[str, int]:
    """Nodes that compute on quantized values, by op type: integer kernels, and nodes of `op_types` whose first input is
    dequantized, and of products and convolutions the second one too. (A float node behind a quantized one reads a
    DequantizeLinear as well, and does not count; nor do those named by `excluded`.)"""
    dequantized = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        needed = 2 if node.op_type in COMPUTE_OPS else 1
        reads = node.op_type in op_types and bool(node.input) and dequantized.issuperset(node.input[:needed])
        if (reads and node.name not in excluded) or node.op_type in _INTEGER_OPS:
            counts[node.op_type] += 1
    return dict(sorted(counts.items()))


def computes_on_integers(counts: Mapping[str, int]) -> bool:
    """Whether a node that does real work is among the counted ones (a quantized Flatten alone is worth nothing)."""
    return any(op in counts for op in (*COMPUTE_OPS, *_INTEGER_OPS)) or bool(counts.get("Gather"))
