"""Channels of like size before the training: cross-layer equalization (Nagel et al. 2019, "Data-free quantization
through weight equalization and bias correction"), with sizes from data.

One scale for a whole activation leaves its small channels few levels, and weights take long to learn another size. So a
factor per channel goes from what writes an activation (a convolution or product, the batch norm behind it, or a layer
norm) to the products that read it; what lies between lets positive factors through. The program computes what it did.
Needs torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workers.graph.qat import placement

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

_MOST = 1e3  # of a factor, and its inverse the least
_GROUPS = 6  # among a convolution's arguments
_TINY = 1e-6  # of the largest channel: what is smaller is as good as unused


@dataclass(frozen=True)
class Pair:
    """`value`: the activation, whose channels lie on `axis`; `written`: parameters that make it, with the axis of its
    channels; `read`: (parameter of a product, its groups), for all that read it."""

    value: Node
    axis: int
    written: tuple[tuple[str, int], ...]
    read: tuple[tuple[str, int], ...]


class Sizes(torch.fx.Interpreter):
    """Runs the module and notes the largest magnitude in each channel of the pairs' activations."""

    def __init__(self, module: GraphModule, pairs: Collection[Pair]) -> None:
        super().__init__(module)
        self.axes = {pair.value: pair.axis for pair in pairs}
        self.found: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.axes:
            axis = self.axes[n] % result.dim()
            others = [d for d in range(result.dim()) if d != axis]
            largest = result.detach().abs().amax(dim=others)
            self.found[n] = torch.maximum(self.found.get(n, largest), largest)
        return result


def pairs_of(module: GraphModule) -> list[Pair]:
    """Those whose parameters nothing else reads."""
    once, parameters = _read_once(module), dict(module.named_parameters())
    found = []
    for node in module.graph.nodes:
        made = _written(node)
        if made is None:
            continue
        value, axis, written = made
        read = [_reads(user, value, axis, parameters) for user in value.users]
        known = [r for r in read if r is not None]
        names = [name for name, _ in (*written, *known)]
        if known and len(known) == len(read) and all(n in once for n in names) and len(set(names)) == len(names):
            found.append(Pair(value, axis, tuple(written), tuple(known)))
    return found


def equalize(module: GraphModule, pairs: Collection[Pair], sizes: Mapping[Node, Tensor]) -> int:
    """Change the parameters in place, pair by pair; answers for how many channels."""
    parameters = dict(module.named_parameters())
    channels = 0
    for pair in pairs:
        size = sizes[pair.value].double()
        largest = float(size.max())
        if not largest > 0 or not bool(torch.isfinite(size).all()):
            continue
        factors = _factors(size, [(parameters[name], groups) for name, groups in pair.read])
        factors = torch.where(size > _TINY * largest, factors.clamp(1 / _MOST, _MOST), torch.ones_like(size))
        with torch.no_grad():
            for name, axis in pair.written:
                tensor = parameters[name]
                shape = [-1 if d == axis else 1 for d in range(tensor.dim())]
                tensor.copy_(tensor.double() / factors.reshape(shape))
            for name, groups in pair.read:
                tensor = parameters[name]
                tensor.copy_(tensor.double() * _over_inputs(factors, tensor, groups))
        channels += len(size)
    return channels


def _factors(size: Tensor, readers: Collection[tuple[Tensor, int]]) -> Tensor:
    """Depthwise weights have a scale for each channel anyway: activations take all of the difference. Else it is shared
    between them and the weights."""
    factors, plain = size.clamp(min=_TINY * float(size.max())), [w for w, groups in readers if groups == 1]
    if plain:
        weights = torch.stack([_of_inputs(w) for w in plain]).amax(0).double()
        factors = (factors / weights.clamp(min=1e-12)).sqrt()
    mean: Tensor = factors.log().mean().exp()  # so that parameters are as large as they were, on the whole
    return factors / mean


def _of_inputs(weight: Tensor) -> Tensor:
    return weight.detach().abs().amax(dim=[d for d in range(weight.dim()) if d != 1])


def _over_inputs(factors: Tensor, weight: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return factors.reshape(1, -1, *[1] * (weight.dim() - 2))
    each = factors.repeat_interleave(weight.shape[0] // groups)  # depthwise: outputs of one input follow each other
    return each.reshape(-1, *[1] * (weight.dim() - 1))


def _read_once(module: GraphModule) -> set[str]:
    known = dict(module.named_parameters())
    count: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            count[str(node.target)] = count.get(str(node.target), 0) + len(node.users)
    return {name for name, times in count.items() if times == 1 and name in known}


def _written(node: Node) -> tuple[Node, int, list[tuple[str, int]]] | None:
    """The activation that begins here, its channels' axis, and the parameters that make it."""
    op = placement.operator(node)
    if op == "layer_norm":
        names = _names(node.args[2:4])
        whole = len(node.args) > 2 and len(node.args[1]) == 1 and names is not None and len(names) > 0  # type: ignore[arg-type]
        return (node, -1, [(n, 0) for n in names]) if whole and names is not None else None
    if op not in ("conv1d", "conv2d", "conv3d", "linear"):
        return None
    value, axis = node, -1 if op == "linear" else 1
    names = _names(node.args[1:3])
    if names is None or not names:
        return None
    norm = next(iter(node.users)) if len(node.users) == 1 else None
    if norm is not None and placement.operator(norm) == "batch_norm" and norm.args[0] is node:
        names, value = _names(norm.args[1:3]), norm
        if names is None or len(names) != 2:
            return None
    follower = next(iter(value.users)) if len(value.users) == 1 else None
    if follower is not None and placement.operator(follower) in ("relu", "relu_"):
        value = follower
    return value, axis, [(name, 0) for name in names]


def _names(values: Any) -> list[str] | None:
    """Of parameters, as far as there are some; None where something else stands there."""
    found = []
    for value in values:
        if value is None:
            continue
        if getattr(value, "op", None) != "get_attr":
            return None
        found.append(str(value.target))
    return found


def _reads(user: Node, value: Node, axis: int, parameters: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """The weights of a product that reads `value` once; 1 group, or as many as channels."""
    op, args = placement.operator(user), user.args
    if op not in ("conv1d", "conv2d", "conv3d", "linear") or (op == "linear") != (axis == -1):
        return None
    names = _names(args[1:2])
    if args[0] is not value or not names or sum(a is value for a in args) != 1:
        return None
    groups: Any = args[_GROUPS] if op != "linear" and len(args) > _GROUPS else 1
    weight = parameters.get(names[0])
    if weight is None or not (groups == 1 or weight.shape[1] == 1):
        return None
    batched = op == "linear" or value.meta["val"].dim() == weight.dim()
    return (names[0], groups) if batched else None
