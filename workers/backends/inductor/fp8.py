"""Matrix products in float8 (E4M3) with static scales, as `torch._scaled_mm` computes them on a GPU of compute
capability 8.9 or later.

One scale per tensor: of a weight its largest magnitude over 448, of an activation the largest that calibration saw over
448. What is beyond is clipped. Products of one input become one product, as Inductor does with float16's. Sums are kept
in more bits; what comes out is in the lower type of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workers.backends.inductor.nodes import cleaned, keep, op_of, tensor_of

if TYPE_CHECKING:
    from torch import dtype
    from torch.fx import GraphModule, Node

_MOST = 448.0  # the largest number of E4M3
_LEAST = 1e-6  # of a scale: an input that was always zero
_STEP = 16  # sizes that the kernels take are multiples of it


def quantize(graph: GraphModule, magnitudes: Mapping[str, float], to: dtype) -> int:
    """Have each `linear` of a lowered graph that is named in `magnitudes`, whose sizes suit, compute in float8 and give
    `to`. How many of them there are."""
    groups: dict[Any, list[Node]] = {}
    for node in graph.graph.nodes:
        if op_of(node) == "linear" and node.name in magnitudes and _suits(graph, node):
            source, biased = node.args[0], _bias(node) is not None
            if op_of(source) == "to":  # each product casts its input for itself
                source = source.args[0]
            groups.setdefault((source, biased), []).append(node)
    for number, ((_, biased), nodes) in enumerate(groups.items()):
        largest = max(magnitudes[node.name] for node in nodes)
        with graph.graph.inserting_before(nodes[0]):
            made = _product(graph, nodes, f"_fp8_{number}", largest, to, biased=biased)
        for node, value in zip(nodes, made, strict=True):
            node.replace_all_uses_with(value)
            graph.graph.erase_node(node)
    cleaned(graph)
    return sum(map(len, groups.values()))


def _suits(graph: GraphModule, node: Node) -> bool:
    weight, bias = tensor_of(graph, node.args[1]), _bias(node)
    if weight is None or (bias is not None and tensor_of(graph, bias) is None):
        return False
    return not any(size % _STEP for size in weight.shape)


def _bias(node: Node) -> Any:
    return node.args[2] if len(node.args) > 2 else None


def _product(
    graph: GraphModule, nodes: Sequence[Node], name: str, largest: float, to: dtype, *, biased: bool
) -> list[Node]:
    """What stands for each of `nodes`, products of one input."""
    import torch

    aten, call = torch.ops.aten, graph.graph.call_function
    weight = torch.cat([tensor_of(graph, n.args[1]).float() for n in nodes])
    scales = max(largest / _MOST, _LEAST), max(float(weight.abs().max()) / _MOST, _LEAST)
    kept = {
        "weight": (weight / scales[1]).clamp(-_MOST, _MOST).to(torch.float8_e4m3fn),
        "input_scale": torch.tensor(scales[0], dtype=torch.float32, device=weight.device),
        "weight_scale": torch.tensor(scales[1], dtype=torch.float32, device=weight.device),
        # Of two axes: a constant of fewer would be written into each kernel, which then serves one product only.
        "input_inverse": torch.full((1, 1), 1 / scales[0], dtype=torch.float32, device=weight.device),
    }
    if biased:
        kept["bias"] = torch.cat([tensor_of(graph, n.args[2]) for n in nodes]).to(to)
    stored = {part: keep(graph, f"{name}_{part}", value) for part, value in kept.items()}
    x = nodes[0].args[0]
    narrow = call(aten.clamp.default, (call(aten.mul.Tensor, (x, stored["input_inverse"])), -_MOST, _MOST))
    rows = call(aten.reshape.default, (call(aten.to.dtype, (narrow, torch.float8_e4m3fn)), [-1, weight.shape[1]]))
    turned = call(aten.t.default, (stored["weight"],))
    product = call(
        aten._scaled_mm.default,
        (rows, turned, stored["input_scale"], stored["weight_scale"], stored.get("bias"), None, to, True),
    )
    lead = [s if isinstance(s, int) else call(aten.sym_size.int, (x, i)) for i, s in enumerate(_sizes(nodes[0])[:-1])]
    whole = call(aten.reshape.default, (product, [*lead, weight.shape[0]]))
    if len(nodes) == 1:
        return [whole]
    wide = [tensor_of(graph, n.args[1]).shape[0] for n in nodes]
    starts = [sum(wide[:i]) for i in range(len(wide))]
    return [call(aten.slice.Tensor, (whole, -1, a, a + n)) for a, n in zip(starts, wide, strict=True)]


def _sizes(node: Node) -> list[Any]:
    return [*node.meta["val"].shape]
