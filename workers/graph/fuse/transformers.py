"""ONNX Runtime's transformer fusions, and what the runtime itself fuses when it loads a model.

The fused graphs hold contrib ops (`com.microsoft`), so only ONNX Runtime runs them. The number of heads and the hidden
size are read off the graph: the optimizer's own guess covers BERT only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from workers.graph.onnx_graph import CONTRIB_DOMAIN

FUSIONS = ("conv+bn", "conv+relu", "attention", "gelu", "layernorm", "skip_layernorm")

_ATTENTION = tuple(
    f"{CONTRIB_DOMAIN}:{op}" for op in ("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention")
)  # not ONNX's own operator of that name
_GELU = ("Gelu", "BiasGelu", "FastGelu", "QuickGelu")
_LAYER_NORM = ("LayerNormalization", "SimplifiedLayerNormalization")
_SKIP_LAYER_NORM = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization")
_BETWEEN_SCORES_AND_SOFTMAX = ("Add", "Sub", "Mul", "Div", "Where", "Cast", "Clip")
_BETWEEN_SPLIT_AND_SCORES = ("Transpose", "Mul", "Div", "Cast", "Squeeze", "Unsqueeze", "Slice", "Gather")
_ACTIVATED = ("Relu", "LeakyRelu", "Clip", "HardSigmoid", "Sigmoid", "Tanh")
_MAX_MASK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Transformer:
    """A recognised architecture: its kind, attention heads, hidden size (heads x head size), blocks of attention."""

    kind: Literal["bert", "gpt2", "vit"]
    heads: int
    hidden_size: int
    blocks: int

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "heads": self.heads, "hidden_size": self.hidden_size, "blocks": self.blocks}


def recognise(model: ModelProto) -> Transformer | None:
    """The architecture of `model`, or None where it has no attention of one width that can be read off the graph.

    Every block of attention is found by its Softmax: up to the product of queries and keys, and on to the Reshape that
    splits the heads. GPT-2-like: a causal mask. ViT-like: images in, no token ids. BERT-like: every other encoder.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = _integer_constants(model)
    widths: Counter[tuple[int, int]] = Counter()
    for softmax in model.graph.node:
        if softmax.op_type != "Softmax":
            continue
        scores = _first_above(softmax, "MatMul", _BETWEEN_SCORES_AND_SOFTMAX, producers)
        # Along the queries: the keys may be turned by a Reshape of their own.
        split = scores and _first_above(
            scores, "Reshape", _BETWEEN_SPLIT_AND_SCORES, producers, inputs=scores.input[:1]
        )
        width = split and _split_width(split, producers, constants)
        if width:
            widths[width] += 1
    if len(widths) != 1:
        return None
    ((heads, size), blocks) = widths.most_common(1)[0]
    return Transformer(_kind(model), heads, heads * size, blocks)


def _kind(model: ModelProto) -> Literal["bert", "gpt2", "vit"]:
    if _has_causal_mask(model):
        return "gpt2"
    names = {i.name for i in model.graph.initializer}
    inputs = [i.type.tensor_type.elem_type for i in model.graph.input if i.name not in names]
    images = any(node.op_type == "Conv" for node in model.graph.node)
    if images and not any(t in (TensorProto.INT64, TensorProto.INT32) for t in inputs):
        return "vit"
    return "bert"


def _has_causal_mask(model: ModelProto) -> bool:
    """A Trilu node, or a constant square lower-triangular matrix of booleans or bytes."""
    if any(node.op_type == "Trilu" for node in model.graph.node):
        return True
    for tensor in model.graph.initializer:
        dims = list(tensor.dims)
        square = len(dims) >= 2 and dims[-1] == dims[-2] > 1 and int(np.prod(dims)) == dims[-1] ** 2
        if square and tensor.data_type in (TensorProto.BOOL, TensorProto.UINT8) and dims[-1] ** 2 <= _MAX_MASK_ELEMENTS:
            matrix = numpy_helper.to_array(tensor).reshape(dims[-2:]).astype(bool)
            if np.array_equal(matrix, np.tril(np.ones_like(matrix))):
                return True
    return False


def _integer_constants(model: ModelProto) -> Mapping[str, list[int]]:
    """Small constant int64 vectors by name, from initializers and Constant nodes."""
    tensors = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    tensors[node.output[0]] = attribute.t
    small = {n: t for n, t in tensors.items() if t.data_type == TensorProto.INT64 and int(np.prod(t.dims)) <= 8}
    return {name: numpy_helper.to_array(t).reshape(-1).tolist() for name, t in small.items()}


def _first_above(
    node: NodeProto,
    wanted: str,
    through: Iterable[str],
    producers: Mapping[str, NodeProto],
    *,
    inputs: Sequence[str] | None = None,
) -> NodeProto | None:
    """The nearest `wanted` node above `node` (above these of its `inputs`) that is reached only through ops in
    `through`, at most 8 of them."""
    names = [*(node.input if inputs is None else inputs)]
    for _ in range(8):
        above = [producers[name] for name in names if name in producers]
        for candidate in above:
            if candidate.op_type == wanted:
                return candidate
        names = [name for n in above if n.op_type in through for name in n.input]
    return None


def _split_width(
    reshape: NodeProto, producers: Mapping[str, NodeProto], constants: Mapping[str, list[int]]
) -> tuple[int, int] | None:
    """Heads and head size from a Reshape to [batch, sequence, heads, size], whose shape may be a Concat."""
    shape: list[int] | None = constants.get(reshape.input[1])
    source = producers.get(reshape.input[1])
    if shape is None and source is not None and source.op_type == "Concat":
        shape = []
        for name in source.input:
            shape += constants.get(name, [0])
    if shape is None or len(shape) != 4 or shape[2] <= 0 or shape[3] <= 0:
        return None
    return shape[2], shape[3]


def fuse(model: ModelProto, architecture: Transformer | None) -> ModelProto:
    """`model` with attention, GELU, LayerNorm and SkipLayerNorm fused where the patterns match; `model` is consumed.
    Without an architecture all but attention.

    Only fusions that keep the function and do not depend on the hardware: no approximated GELU, masks stay as they come
    (the one-dimensional mask index would assume padding at the right), no embedding fusion (it narrows id types).
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    kind, heads, hidden_size = "bert", 0, 0
    if architecture is not None:
        kind, heads, hidden_size = architecture.kind, architecture.heads, architecture.hidden_size
    options = FusionOptions(kind)
    options.enable_gelu_approximation = False
    options.enable_embed_layer_norm = False
    options.enable_attention = architecture is not None
    if kind == "bert":
        options.use_raw_attention_mask(True)
    opsets = {o.domain for o in model.opset_import}
    producer = (model.producer_name, model.producer_version)
    optimizer = optimize_by_fusion(model, kind, heads, hidden_size, options)
    fused: ModelProto = optimizer.model
    fused.producer_name, fused.producer_version = producer
    if CONTRIB_DOMAIN not in opsets and uses_contrib_ops(fused):
        fused.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
    return fused


def uses_contrib_ops(model: ModelProto) -> bool:
    return any(node.domain == CONTRIB_DOMAIN for node in model.graph.node)


def count_fused(before: ModelProto, after: ModelProto) -> dict[str, int]:
    """How many fusions by name turned graph `before` into graph `after`; every name of `FUSIONS` is there.

    "conv+bn" counts the BatchNormalizations folded into the Conv before them, "layernorm" the LayerNorms made from
    their parts, "skip_layernorm" those merged with the residual sum. "conv+relu" has no standard op, so it is never in
    the graph: the runtime does it at load (`fused_at_load`).
    """
    old, new = _ops(before), _ops(after)

    def made(*groups: tuple[str, ...]) -> int:
        return max(0, sum(new[op] - old[op] for group in groups for op in group))

    return {
        "conv+bn": max(0, _foldable_batch_norms(before) - _foldable_batch_norms(after)),
        "conv+relu": 0,
        "attention": made(_ATTENTION),
        "gelu": made(_GELU),
        "layernorm": made(_LAYER_NORM, _SKIP_LAYER_NORM),
        "skip_layernorm": made(_SKIP_LAYER_NORM),
    }


def fused_at_load(model: Path, workspace: Path) -> dict[str, int]:
    """What ONNX Runtime fuses by itself when it loads `model` (level EXTENDED, CPU), by name; zeros left out."""
    import onnx
    import onnxruntime as ort

    optimized = workspace / "at_load.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(optimized)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "at_load.data")
    options.log_severity_level = 4
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    before = onnx.load(model, load_external_data=False)
    after = onnx.load(optimized, load_external_data=False)
    counts = count_fused(before, after)
    counts["conv+relu"] = sum(
        any(a.name == "activation" and a.s.decode() in _ACTIVATED for a in node.attribute)
        for node in after.graph.node
        if node.op_type == "FusedConv"
    )
    for leftover in (optimized, workspace / "at_load.data"):
        leftover.unlink(missing_ok=True)
    return {name: count for name, count in counts.items() if count}


def _ops(model: ModelProto) -> Counter[str]:
    """Nodes by operator, and those of ONNX Runtime's own by domain and operator too."""
    nodes = model.graph.node
    contrib = Counter(f"{node.domain}:{node.op_type}" for node in nodes if node.domain == CONTRIB_DOMAIN)
    return Counter(node.op_type for node in nodes) + contrib


def _foldable_batch_norms(model: ModelProto) -> int:
    convolutions = {n.output[0] for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose", "FusedConv")}
    return sum(n.op_type == "BatchNormalization" and n.input[0] in convolutions for n in model.graph.node)
