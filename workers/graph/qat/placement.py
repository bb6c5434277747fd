"""Where a program rounds: at what the product's Q/DQ passes round in the ONNX graph that it becomes.

They round what certain nodes read, by op type; around convolutions what they write, too. Rounding comes after what is
fused into a node: a batch norm and an activation behind a convolution, an activation behind a sum. Weights are rounded
per output channel, where a product reads them: a scale per channel is the same before and after a batch norm is folded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.domain.failures import StageFailure, model_failure
from workers.graph.quantizable import rounds_outputs

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

# ATen operator → the ONNX op type that it becomes, as far as such nodes are rounded.
_TYPES = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), "Conv"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "ConvTranspose"),
    **dict.fromkeys(("linear", "addmm"), "Gemm"),
    **dict.fromkeys(("mm", "matmul", "bmm", "scaled_dot_product_attention"), "MatMul"),
    **dict.fromkeys(("add", "add_"), "Add"),
    **dict.fromkeys(("mul", "mul_"), "Mul"),
    **dict.fromkeys(("max_pool1d", "max_pool2d"), "MaxPool"),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d"), "AveragePool"),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), "GlobalAveragePool"),
    **dict.fromkeys(("relu", "relu_"), "Relu"),
    **dict.fromkeys(("clamp", "clamp_", "hardtanh", "hardtanh_", "relu6", "relu6_"), "Clip"),
    "cat": "Concat",
}
_TORCH = frozenset({"aten", "prim", "prims", "symbolic_shapes"})
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_SUMS = frozenset({"Add"})
_ACTIVATIONS = frozenset({"Relu", "Clip"})
_BOUNDED = frozenset({"Clip"})
_MEANS = frozenset({"AveragePool"})
_NORMS = frozenset({"batch_norm", "_native_batch_norm_legit_no_training"})
# Hand on the numbers that they get, all of them: rounding is the same before and after.
_VIEWS = frozenset(
    {
        "view",
        "reshape",
        "flatten",
        "permute",
        "transpose",
        "t",
        "unsqueeze",
        "squeeze",
        "contiguous",
        "clone",
        "dropout",
    }
    | {"alias", "expand", "_unsafe_view"}
    | {"max_pool1d", "max_pool2d"}  # picks among what was rounded
)


@dataclass(frozen=True)
class Placed:
    """Modules that round. `points`: (name of the module, node whose value it rounds); `attentions`: names of modules,
    in the graph's order; `weights`: how many."""

    points: tuple[tuple[str, str], ...]
    attentions: tuple[str, ...]
    weights: int

    @property
    def activations(self) -> int:
        return len(self.points) + 4 * len(self.attentions)


def place(module: GraphModule, op_types: Collection[str], activations: str, levels: int) -> Placed:
    """Insert modules that round (`rounding`) into the graph, in place. `op_types`: of ONNX, as the quantizing step has
    them; `activations`: uint8 or int8; `levels`: of a weight on either side of zero. Raises StageFailure
    `nothing_to_train`."""
    graph, constants = module.graph, _constants(module)
    products = [n for n in graph.nodes if _type(n) in _PRODUCTS and _type(n) in _wanted(op_types)]
    weighted = [(n, w, axis) for n in products for w, axis in _weights(n) if w in constants]
    if not weighted:
        raise model_failure(
            "nothing_to_train",
            "Nothing in the program would learn to be rounded: it has no product or convolution with weights.",
            remedy="Switch quantization.training off for this model.",
        )
    points = _points(module, op_types, constants)
    names: dict[Node, str] = {}
    for count, point in enumerate(points):
        names[point] = names.get(_shared(point), f"_round_{count}")
    placed = [(name, point.name) for point, name in names.items()]
    for count, (node, weight, axis) in enumerate(weighted):
        _insert_weight(module, f"_weight_{count}", node, weight, axis, levels)
    for point, name in names.items():
        _insert_activation(module, name, point, activations)
    attentions = [n for n in products if operator(n) == "scaled_dot_product_attention"]
    for count, node in enumerate(attentions):
        _replace_attention(module, f"_attention_{count}", node, activations)
    graph.lint()
    module.recompile()
    return Placed(tuple(placed), tuple(f"_attention_{i}" for i in range(len(attentions))), len(weighted))


def check_trainable(program: Any) -> None:
    """Raise StageFailure `not_trainable`, with the node, for what cannot be trained whatever is done: state that the
    program changes, control flow, operators of another library."""
    signature = program.graph_signature
    changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if changed:
        node, what = next(iter(changed.items()))
        raise not_trainable(f"it changes {what!r} in place while it runs", str(node))
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        space = getattr(node.target, "namespace", None)
        if space == "higher_order":
            if not str(node.target).startswith("wrap_"):  # a part under `no_grad`, say, which runs as any other
                raise not_trainable(f"it branches or loops by its data ({node.target})", node.name)
        elif getattr(getattr(node.target, "_schema", None), "is_mutable", False) and _is_given(node.args[0]):
            raise not_trainable(f"it changes {node.args[0].name!r} in place while it runs", node.name)
        elif space is not None and space not in _TORCH:
            raise not_trainable(f"the operator {node.target} comes from another library than torch", node.name)
    if not any(t.is_floating_point() for t in program.parameters()):
        raise not_trainable("it has no parameters", None)


def _is_given(value: Any) -> bool:
    """Whether it is a buffer, a parameter or an input, and not what the program made of them."""
    return getattr(value, "op", None) in ("placeholder", "get_attr")


def not_trainable(why: str, node: str | None) -> StageFailure:
    return model_failure(
        "not_trainable",
        f"The program cannot be trained: {why}.",
        node=node,
        remedy="The ways after training are tried all the same: other calibration, equalization, and nodes kept in "
        "higher precision. Switch quantization.training off to spare the try.",
    )


def _wanted(op_types: Collection[str]) -> frozenset[str]:
    """A `linear` is a Gemm or a MatMul by its input's rank."""
    found = frozenset(op_types)
    return found | {"Gemm", "MatMul"} if found & {"Gemm", "MatMul"} else found


def operator(node: Any) -> str | None:
    """The ATen operator's name, without its overload."""
    target = getattr(node, "target", None)
    if getattr(node, "op", None) != "call_function" or getattr(target, "namespace", None) != "aten":
        return None
    return str(getattr(target, "_opname", str(target).split(".")[1]))


def _type(node: Any) -> str | None:
    return _TYPES.get(operator(node) or "")


def _constants(module: GraphModule) -> set[Node]:
    """What depends on parameters and buffers alone."""
    found: set[Node] = set()
    for node in module.graph.nodes:
        read = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and read and all(n in found for n in read)):
            found.add(node)
    return found


def _weights(node: Node) -> Iterator[tuple[Node, int]]:
    """Inputs of a product that may be its weights, with the axis of the output channels."""
    op, args = operator(node), node.args
    if op in ("mm", "matmul", "bmm"):
        yield args[1], -1  # type: ignore[misc]  # tensors stand there
        yield args[0], -2  # type: ignore[misc]
    elif op == "addmm":
        yield args[2], -1  # type: ignore[misc]
    elif op is not None and op.startswith("conv_transpose"):
        yield args[1], 1  # type: ignore[misc]
    elif op == "convolution":
        yield args[1], 1 if args[6] else 0  # type: ignore[misc]
    elif op != "scaled_dot_product_attention":
        yield args[1], 0  # type: ignore[misc]


def _read(node: Node) -> Iterator[Any]:
    """The tensors that are rounded on the way into a node."""
    op, args = operator(node), node.args
    if op == "scaled_dot_product_attention":
        return
    if op == "cat":
        yield from args[0]  # type: ignore[misc]
    elif op == "addmm":
        yield from args[1:3]
    elif op in ("mm", "matmul", "bmm", "add", "add_", "mul", "mul_"):
        yield from args[:2]
    else:
        yield args[0]


def _points(module: GraphModule, op_types: Collection[str], constants: set[Node]) -> list[Node]:
    """The nodes whose values are rounded, in the graph's order."""
    wanted, outputs = _wanted(op_types), rounds_outputs(op_types)
    found: set[Node] = set()
    for node in module.graph.nodes:
        if _type(node) not in wanted:
            continue
        read = [n for n in _read(node) if n not in constants]
        for value in [*read, *([node] if outputs else [])]:
            source = _source(value)
            if source is not None and source not in constants and _is_float(source):
                found.add(_fused(source))
    return [node for node in module.graph.nodes if node in found]


def _source(value: Any) -> Node | None:
    """The node that made these numbers; None for a number that is no tensor."""
    while operator(value) in _VIEWS:
        value = value.args[0]
    return value if hasattr(value, "all_input_nodes") else None


def _shared(point: Node) -> Any:
    """Whose range it has: of a mean of neighbours that of what it reads; None where it has its own."""
    source = _source(point.args[0]) if _type(point) in _MEANS else None
    return _fused(source) if source is not None else None


def _fused(node: Node) -> Node:
    """The last one of what becomes one node with this one."""
    if _type(node) in _PRODUCTS:
        follower = _only_user(node)
        if follower is not None and operator(follower) in _NORMS and follower.args[0] is node:
            node = follower
    if _type(node) in _PRODUCTS | _SUMS or operator(node) in _NORMS:
        follower = _only_user(node)
        if follower is not None and _type(follower) in _ACTIVATIONS:
            node = follower
    return node


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_float(node: Node) -> bool:
    import torch

    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _insert_weight(module: GraphModule, name: str, node: Node, weight: Node, axis: int, levels: int) -> None:
    from workers.graph.qat.rounding import RoundedWeight

    module.add_submodule(name, RoundedWeight(axis, levels))
    with module.graph.inserting_before(node):
        rounded = module.graph.call_module(name, (weight,))
    node.replace_input_with(weight, rounded)


def _insert_activation(module: GraphModule, name: str, point: Node, activations: Any) -> None:
    """Every reader but what tells of its shape gets the rounded values."""
    from workers.graph.qat.rounding import RoundedActivation

    if not hasattr(module, name):
        module.add_submodule(name, RoundedActivation(activations, bounded=_type(point) in _BOUNDED))
    readers = [user for user in point.users if operator(user) is None or not str(operator(user)).startswith("sym_")]
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    with module.graph.inserting_after(inputs[-1] if point in inputs else point):
        rounded = module.graph.call_module(name, (point,))
    for user in readers:
        user.replace_input_with(point, rounded)


def _replace_attention(module: GraphModule, name: str, node: Node, activations: Any) -> None:
    from workers.graph.qat.rounding import RoundedAttention

    module.add_submodule(name, RoundedAttention(activations))
    with module.graph.inserting_before(node):
        made = module.graph.call_module(name, node.args, dict(node.kwargs))
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)
