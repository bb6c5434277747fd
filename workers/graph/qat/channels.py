"""Channels of like size before the training: cross-layer equalization (Nagel et al. 2019, "Data-free quantization
through weight equalization and bias correction"), with sizes from data.

One scale for a whole activation leaves its small channels few levels, and weights take long to learn another size. So a
factor per channel goes from what writes an activation (a convolution or product, the batch norm behind it, or a layer
norm) to the products that read it; what lies between lets positive factors through. What is summed goes together: all
that write the sum's terms get one factor. The program computes what it did. Needs torch.
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
# Let a positive factor of a channel through, where the channels stay what they are (`_keeps`).
_CARRY = frozenset({"relu", "relu_", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "mean", "flatten", "view"})
_CARRY |= {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "add", "add_", "dropout", "clone", "contiguous", "alias"}
_SUMS, _ACTIVATIONS = frozenset({"add", "add_"}), frozenset({"relu", "relu_"})


@dataclass(frozen=True)
class Group:
    """`values`: rounded activations with the same channels, each with the axis where they lie; `written`: parameters
    that make them, with the axis of their channels; `read`: (parameter of a product, its groups), for all that read
    them."""

    values: tuple[tuple[Node, int], ...]
    written: tuple[tuple[str, int], ...]
    read: tuple[tuple[str, int], ...]


class Sizes(torch.fx.Interpreter):
    """Runs the module and notes the largest magnitude in each channel of the groups' activations."""

    def __init__(self, module: GraphModule, groups: Collection[Group]) -> None:
        super().__init__(module)
        self.axes = {value: axis for group in groups for value, axis in group.values}
        self.found: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.axes:
            others = [d for d in range(result.dim()) if d != self.axes[n]]
            largest = result.detach().abs().amax(dim=others)
            self.found[n] = torch.maximum(self.found.get(n, largest), largest)
        return result


def groups_of(module: GraphModule) -> list[Group]:
    """Those whose parameters nothing else reads."""
    once, parameters = _read_once(module), dict(module.named_parameters())
    found = []
    for group in _joined(module):
        read: list[tuple[str, int] | None] = []
        for value, axis in group.values.items():
            read += [_reads(user, value, axis, parameters) for user in value.users if user not in group.carried]
        known = [r for r in read if r is not None]
        names = [name for name, _ in (*group.written, *known)]
        if known and len(known) == len(read) and all(n in once for n in names) and len(set(names)) == len(names):
            values = [(value, axis) for value, axis in group.values.items() if not _fused(value)]
            found.append(Group(tuple(values), tuple(group.written), tuple(known)))
    return found


def _fused(value: Node) -> bool:
    """Whether it is never rounded, as the activation behind it is part of what made it."""
    return len(value.users) == 1 and placement.operator(next(iter(value.users))) in _ACTIVATIONS


class _Joined:
    """Values that have to keep the same channels, with their axes; those of them that hand on what others wrote; and
    the parameters that write them."""

    def __init__(self) -> None:
        self.values: dict[Node, int] = {}
        self.carried: set[Node] = set()
        self.written: list[tuple[str, int]] = []

    def take(self, other: _Joined) -> None:
        self.values |= other.values
        self.carried |= other.carried
        self.written += other.written


def _joined(module: GraphModule) -> list[_Joined]:
    of: dict[Node, _Joined] = {}
    for node in module.graph.nodes:
        group, made = _Joined(), _written(node)
        if made is not None:
            value, axis, group.written = made
            group.values[value] = axis % value.meta["val"].dim()
        else:
            sources = [of.get(source) for source in _sources(node)]
            axes = {g.values[s] if g is not None else None for g, s in zip(sources, _sources(node), strict=True)}
            axis_or_none = next(iter(axes)) if len(axes) == 1 else None
            if axis_or_none is None or not _keeps(node, axis_or_none):
                continue
            for source in {id(g): g for g in sources if g is not None}.values():
                group.take(source)
            group.values[node] = axis_or_none
            group.carried.add(node)
        of |= dict.fromkeys(group.values, group)
    return list({id(group): group for group in of.values()}.values())


def _sources(node: Node) -> list[Any]:
    """What it hands on; nothing where it does something else."""
    op = placement.operator(node)
    return [*node.args[: 2 if op in _SUMS else 1]] if op in _CARRY else []


def _keeps(node: Node, axis: int) -> bool:
    """Whether the channels are on this axis before and behind it, and each stays by itself."""
    op = placement.operator(node)
    shapes = [[str(size) for size in n.meta["val"].shape] for n in (*_sources(node), node)]
    if any(shape[: axis + 1] != shapes[0][: axis + 1] for shape in shapes):
        return False
    if op in _SUMS:
        return all(shape == shapes[0] for shape in shapes)
    if op in ("flatten", "view"):
        return {*shapes[0][axis + 1 :], *shapes[1][axis + 1 :]} <= {"1"}
    if op == "mean":
        dims: Any = node.args[1] if len(node.args) > 1 else None
        return bool(dims) and all(dim % len(shapes[0]) > axis for dim in dims)
    return True


def equalize(module: GraphModule, groups: Collection[Group], sizes: Mapping[Node, Tensor]) -> int:
    """Change the parameters in place, group by group; answers for how many channels."""
    parameters = dict(module.named_parameters())
    channels = 0
    for group in groups:
        size = torch.stack([sizes[value] for value, _ in group.values]).amax(0).double()
        largest = float(size.max())
        if not largest > 0 or not bool(torch.isfinite(size).all()):
            continue
        factors = _factors(size, [(parameters[name], parts) for name, parts in group.read])
        factors = torch.where(size > _TINY * largest, factors.clamp(1 / _MOST, _MOST), torch.ones_like(size))
        with torch.no_grad():
            for name, axis in group.written:
                tensor = parameters[name]
                shape = [-1 if d == axis else 1 for d in range(tensor.dim())]
                tensor.copy_(tensor.double() / factors.reshape(shape))
            for name, parts in group.read:
                tensor = parameters[name]
                tensor.copy_(tensor.double() * _over_inputs(factors, tensor, parts))
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
    last = value.meta["val"].dim() - 1
    if op not in ("conv1d", "conv2d", "conv3d", "linear") or axis != (last if op == "linear" else 1):
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
