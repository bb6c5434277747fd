"""Products of an exported program's graph computed in float16 or bfloat16.

The rules are those of `torch.autocast`: matrix products and convolutions in the lower type, what sums or exponentiates
beyond them in float32. Here they are written into the graph, which keeps the ranges of its dynamic sizes; tracing the
program again under autocast loses them. Weights are cast here and now: as a cast in the graph each call would read all
of them in float32 (ViT-B/16 at batch 1 on an H200: 0.96 ms, and 0.71 ms without).

`whole` keeps to the lower type between the products as well, as `module.half()` does and autocast does not: what meets
lowered values and is computed from constants, positions and masks alone is cast too, and embeddings are looked up in
the lower type. On a GPU such values are most of the memory traffic, and fused attention is found in one type only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from app.domain.failures import model_failure
from workers.backends.inductor.nodes import cleaned, is_float32, is_node, keep, op_of, tensor_of

if TYPE_CHECKING:
    from torch import dtype
    from torch.fx import GraphModule, Node

    Nodes = frozenset[Node]

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
_LISTS = ("unbind", "split", "split_with_sizes", "chunk")
_STATISTICS = ("batch_norm",)  # whose constants stay in float32: a variance may leave float16's range


def lower(graph: GraphModule, to: dtype, *, whole: bool = False) -> int:
    """Have products and convolutions compute in `to`; inputs and outputs of the program keep their types. How many
    products there are. Raises StageFailure(`unsupported_op`)."""
    import torch

    still = _without_activations(graph)
    casts = _Casts(graph, to, still)
    lowered: set[Node] = set()  # whose values are, or may be, in the lower type
    products = 0
    for node in list(graph.graph.nodes):
        rule = _rule(node)
        if whole and op_of(node) == "embedding" and is_float32(node):
            casts.into(node, is_float32)
            lowered.add(node)
        elif node.op == "output" or rule == "float32":
            if _in_place(node) and any(n in lowered for n in node.all_input_nodes):
                raise _in_place_refused(node)
            casts.back(node, lowered, torch.float32)
        elif rule == "lower":
            casts.into(node, is_float32)
            lowered.add(node)
            products += 1
        elif rule == "follow" and any(n in lowered for n in node.all_input_nodes):
            if whole and op_of(node) not in _STATISTICS:
                casts.into(node, lambda n: n in still and is_float32(n))
            lowered.add(node)
    cleaned(graph)
    return products


class _Casts:
    """Of nodes' inputs: stored tensors are cast once and kept so, all others where they are read."""

    def __init__(self, graph: GraphModule, to: dtype, still: Nodes) -> None:
        import torch

        self._graph, self._to, self._still, self._cast = graph, to, still, torch.ops.aten.to.dtype
        # Masks are often the least number of float32: infinite in float16, and a row of them is no number at all.
        self._most = torch.finfo(to).max if to == torch.float16 else None
        self._kept: dict[str, str] = {}

    def into(self, node: Node, which: Callable[[Node], bool]) -> None:
        """Those inputs of `node`, in the lower type."""
        for source in [n for n in node.all_input_nodes if which(n)]:
            with self._graph.graph.inserting_before(node):
                node.replace_input_with(source, self._lowered(source))

    def back(self, node: Node, which: set[Node], to: dtype) -> None:
        """Those inputs of `node`, in `to`."""
        for source in [n for n in node.all_input_nodes if n in which]:
            with self._graph.graph.inserting_before(node):
                node.replace_input_with(source, self._graph.graph.call_function(self._cast, (source, to)))

    def _lowered(self, source: Node) -> Node:
        import torch

        tensor = tensor_of(self._graph, source)
        if tensor is not None:
            if self._most is not None:
                tensor = tensor.clamp(-self._most, self._most)
            name = self._kept.setdefault(str(source.target), f"_lowered_{len(self._kept)}")
            return keep(self._graph, name, tensor.detach().to(self._to))
        made = source
        if self._most is not None and source in self._still:
            made = self._graph.graph.call_function(torch.ops.aten.clamp.default, (source, -self._most, self._most))
        return self._graph.graph.call_function(self._cast, (made, self._to))


def _without_activations(graph: GraphModule) -> Nodes:
    """What is computed from constants, sizes, integers and truth values alone: positions, masks."""
    import torch

    found: set[Node] = set()
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            still = not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point
        elif node.op == "call_function":
            sizes = not isinstance(value, torch.Tensor | tuple | list)
            still = sizes or (op_of(node) != "embedding" and all(n in found for n in node.all_input_nodes))
        else:
            still = node.op == "get_attr"
        if still:
            found.add(node)
    return frozenset(found)


def _rule(node: Node) -> str:
    """`lower`, `follow`, or `float32` for whatever is not known to bear a narrower type."""
    import operator

    if node.op != "call_function":
        return "none"
    if node.target is operator.getitem:
        source = node.args[0]
        return "follow" if is_node(source) and op_of(source) in _LISTS else "float32"
    op = op_of(node)
    if op in _PRODUCTS and is_float32(node):
        return "lower"
    return "follow" if op in _FOLLOWERS and not _casts(node) else "float32"


def _in_place(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _in_place_refused(node: Node) -> Exception:
    return model_failure(
        "unsupported_op",
        f"{op_of(node)} changes a tensor in place, which is not computed in a lower type.",
        node=node.name,
        remedy="Use fp32 for this model, or export it without the operation in place.",
    )


def _casts(node: Node) -> bool:
    """Whether it names the type that it computes in, as `softmax(x, dim, dtype)` may."""
    import torch

    return any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))
