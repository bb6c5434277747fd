"""What is done to an exported program's graph before Inductor compiles it: batch norms folded into convolutions, and
products computed in fewer bits.

The rules of mixed precision are those of `torch.autocast`: matrix products and convolutions in the lower type, what
sums or exponentiates beyond them in float32. Here they are written into the graph, which keeps the ranges of its
dynamic sizes; tracing the program again under autocast loses them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from app.domain.failures import model_failure

if TYPE_CHECKING:
    from torch import dtype
    from torch.fx import GraphModule, Node

# Computed in the lower type: all their float32 inputs are cast.
_PRODUCTS = (
    *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "scaled_dot_product_attention"),
)
# Taken in the type that comes: they round once, or compute inside in float32 anyhow. Where types meet they promote.
_FOLLOWERS = (
    *("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "hardsigmoid", "leaky_relu"),
    *("gelu", "silu", "silu_", "sigmoid", "tanh", "elu", "mish", "clamp", "clamp_min", "clamp_max", "abs", "neg"),
    *("add", "add_", "sub", "mul", "mul_", "div", "softmax", "_softmax", "layer_norm", "batch_norm", "group_norm"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_avg_pool1d", "mean"),
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze", "squeeze"),
    *("cat", "stack", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "expand", "contiguous"),
    *("clone", "dropout", "alias", "detach", "constant_pad_nd", "pad", "upsample_nearest2d", "upsample_bilinear2d"),
    *("pixel_shuffle", "roll", "flip", "narrow", "movedim", "expand_as", "view_as", "repeat", "maximum", "minimum"),
)
_TEXT = re.compile(r"[\w ,.>:/-]{0,1000}", re.ASCII)
_LISTS = ("unbind", "split", "split_with_sizes", "chunk")


def lowered(torch: Any, program: Any, precision: str, device: str) -> tuple[GraphModule, int]:
    """The graph of an exported program as it is to be compiled, on `device`, and how many batch norms were folded.
    Raises StageFailure(`nothing_to_convert`), and what torch raises."""
    if device == "cuda":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, "cuda")
    graph = program.module()
    if hasattr(graph, "_guards_fn"):  # sizes are checked by the session
        for node in graph.graph.find_nodes(op="call_module", target="_guards_fn"):
            graph.graph.erase_node(node)
        delattr(graph, "_guards_fn")
    for node in list(graph.graph.nodes):  # what the trace knew of types and devices: "cuda" is not "cuda:0"
        if _op(node) == "_assert_tensor_metadata":
            graph.graph.erase_node(node)
    _cleaned(graph)
    check_texts(graph)
    folded = fold_batch_norms(graph)
    if precision != "fp32" and not lower(graph, {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]):
        raise model_failure(
            "nothing_to_convert",
            "The program has no float32 product or convolution.",
            remedy="Use fp32 for this model.",
        )
    return graph, folded


def check_texts(graph: GraphModule) -> None:
    """Texts among the arguments (a rounding mode, an equation) are pasted into the source that is compiled: refuse
    what could be more than that. Raises StageFailure(`unsafe_program`)."""
    from torch.utils import _pytree as pytree

    for node in graph.graph.nodes:
        if node.op == "call_function":
            texts = (a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, str))
            odd = next((text for text in texts if not _TEXT.fullmatch(text)), None)
            if odd is not None:
                raise model_failure(
                    "unsafe_program",
                    f"Node {node.name!r} has the text {odd[:60]!r} among its arguments, which is not compiled.",
                    node=node.name,
                    remedy="Export a model of plain tensors and standard ATen operators.",
                )


def fold_batch_norms(graph: GraphModule) -> int:
    """Fold each batch norm (in inference) that alone reads a convolution into that convolution's weights; how many were
    folded. The same arithmetic but for rounding."""
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    folded = 0
    for node in list(graph.graph.nodes):
        conv: Any = node.args[0] if _op(node) == "batch_norm" and node.args else None
        if not _is_node(conv) or not _op(conv).startswith("conv") or "transpose" in _op(conv) or len(conv.users) > 1:
            continue
        x, weight, bias, *rest = [*conv.args, None, None][: max(len(conv.args), 3)]
        _, gamma, beta, mean, variance, training, _momentum, eps, *_ = node.args
        stored = (weight, bias, gamma, beta, mean, variance)
        tensors = [_stored(graph, n) for n in stored]
        missing = any(t is None and n is not None for t, n in zip(tensors, stored, strict=True))
        if training or missing or conv.kwargs or any(tensors[i] is None for i in (0, 4, 5)):
            continue
        w, b, g, s, m, v = tensors
        fused = fuse_conv_bn_weights(w, b, m, v, eps, g, s)
        places = []
        with graph.graph.inserting_before(conv):
            for part, value in zip(("weight", "bias"), fused, strict=True):
                name = f"_folded_{folded}_{part}"
                graph.register_buffer(name, value.detach())
                place = graph.graph.get_attr(name)
                place.meta["val"] = value.detach()
                places.append(place)
        conv.args = (x, *places, *rest)
        node.replace_all_uses_with(conv)
        graph.graph.erase_node(node)
        folded += 1
    _cleaned(graph)
    return folded


def lower(graph: GraphModule, to: dtype) -> int:
    """Have products and convolutions compute in `to`; inputs and outputs of the program keep their types. How many
    products there are."""
    import torch

    cast = torch.ops.aten.to.dtype
    lowered: set[Node] = set()  # whose values are, or may be, in the lower type
    products = 0
    for node in list(graph.graph.nodes):
        if node.op == "output" or (node.op == "call_function" and _rule(node) == "float32"):
            if _in_place(node) and any(n in lowered for n in node.all_input_nodes):
                raise model_failure(
                    "unsupported_op",
                    f"{_op(node)} changes a tensor in place, which is not computed in a lower type.",
                    node=node.name,
                    remedy="Use fp32 for this model, or export it without the operation in place.",
                )
            _replace(graph, node, lambda n: n in lowered, cast, torch.float32)
        elif _rule(node) == "lower":
            _replace(graph, node, _is_float32, cast, to)
            lowered.add(node)
            products += 1
        elif _rule(node) == "follow" and any(n in lowered for n in node.all_input_nodes):
            lowered.add(node)
    _cleaned(graph)
    return products


def _rule(node: Node) -> str:
    """`lower`, `follow`, or `float32` for whatever is not known to bear a narrower type."""
    import operator

    if node.op != "call_function":
        return "none"
    if node.target is operator.getitem:
        source = node.args[0]
        return "follow" if _is_node(source) and _op(source) in _LISTS else "float32"
    op = _op(node)
    if op in _PRODUCTS and _is_float32(node):
        return "lower"
    return "follow" if op in _FOLLOWERS and not _casts(node) else "float32"


def _in_place(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _casts(node: Node) -> bool:
    """Whether it names the type that it computes in, as `softmax(x, dim, dtype)` may."""
    import torch

    return any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))


def _replace(graph: GraphModule, node: Node, which: Any, cast: Any, to: dtype) -> None:
    """Those inputs of `node`, cast."""
    for source in node.all_input_nodes:
        if not which(source):
            continue
        with graph.graph.inserting_before(node):
            made = graph.graph.call_function(cast, (source, to))
        node.replace_input_with(source, made)


def _op(node: Any) -> str:
    """`conv2d` of `aten.conv2d.default`; empty where it is no ATen operator."""
    if not _is_node(node) or node.op != "call_function":
        return ""
    text = str(node.target)
    return text.split(".")[1] if text.startswith("aten.") else ""


def _is_node(value: Any) -> bool:
    from torch.fx import Node

    return isinstance(value, Node)


def _is_float32(node: Node) -> bool:
    import torch

    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _stored(graph: GraphModule, node: Any) -> Any:
    """The tensor that a `get_attr` node stands for; None where it is something else."""
    if not _is_node(node) or node.op != "get_attr":
        return None
    owner: Any = graph
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    return owner


def _cleaned(graph: GraphModule) -> None:
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
