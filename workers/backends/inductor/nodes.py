"""Nodes of an exported program's graph: what they are, and the tensors that lie in the graph's module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


def op_of(node: Any) -> str:
    """`conv2d` of `aten.conv2d.default`; empty where it is no ATen operator."""
    if not is_node(node) or node.op != "call_function":
        return ""
    text = str(node.target)
    return text.split(".")[1] if text.startswith("aten.") else ""


def is_node(value: Any) -> bool:
    from torch.fx import Node

    return isinstance(value, Node)


def is_float32(node: Node) -> bool:
    import torch

    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def tensor_of(graph: GraphModule, node: Any) -> Any:
    """The tensor that a `get_attr` node stands for; None where it is something else."""
    if not is_node(node) or node.op != "get_attr":
        return None
    owner: Any = graph
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    return owner


def keep(graph: GraphModule, name: str, value: Any) -> Node:
    """A node that stands for `value`, which is kept in the graph's module as `name`; inserted where the graph's
    insertion point is."""
    if not hasattr(graph, name):
        graph.register_buffer(name, value.detach())
    place = graph.graph.get_attr(name)
    place.meta["val"] = getattr(graph, name)
    return place


def cleaned(graph: GraphModule) -> None:
    """Without dead nodes, and without the tensors that no node reads any more."""
    graph.graph.eliminate_dead_code()
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for owner, name, path in list(_tensors(graph)):
        if path not in used:
            delattr(owner, name)
    graph.graph.lint()
    graph.recompile()


def _tensors(graph: GraphModule) -> Iterator[tuple[Any, str, str]]:
    """Every parameter and buffer: its module, its name there, and its path."""
    for prefix, module in graph.named_modules():
        for kept in (module._parameters, module._buffers):
            for name in kept:
                yield module, name, f"{prefix}.{name}" if prefix else name
