"""Operands of an attention: what they were before they were turned and scaled, and how many heads they have."""

from __future__ import annotations

from dataclasses import dataclass, replace

from onnx import TensorProto

from workers.graph.fuse.attention_dims import same
from workers.graph.fuse.attention_view import View
from workers.graph.rewriting import attribute

_DEPTH = 12  # nodes above an operand
_SWAPPED, _BY_HEADS = (0, 1, 3, 2), (0, 2, 1, 3)


@dataclass(frozen=True)
class Operand:
    """A tensor and the order of its axes in which it is [batch, heads, length, size] (or [batch, length, size])."""

    source: str
    order: tuple[int, ...]

    def turned(self, perm: tuple[int, ...], source: str) -> Operand:
        """The same values, read from what a Transpose by `perm` turned."""
        return Operand(source, tuple(perm[axis] for axis in self.order))


@dataclass(frozen=True)
class Term:
    """What is added to the scaled scores: a tensor of floats, times `factor`. With `keep` a condition, under which a
    score counts (True) or does not (False); then `factor` stands in the place of those that do not."""

    name: str
    factor: float = 1.0
    keep: bool | None = None


@dataclass(frozen=True)
class Core:
    """One attention. `out`: [batch, heads, length, size], made by node number `anchor`; `heads` 0: there is no such
    axis. `empty_rows_are_zero`: of queries that no key is left to. `joined`: operands and `out` are [batch, length,
    heads · size], while the scores, and so the mask, have an axis for the heads."""

    label: str
    anchor: int
    out: str
    query: Operand
    key: Operand
    value: Operand
    heads: int
    scale: float
    terms: tuple[Term, ...]
    causal: bool = False
    empty_rows_are_zero: bool = False
    joined: bool = False


def read(view: View, operand: Operand) -> tuple[Operand, float]:
    """The tensor that an operand was made of by transposing and by factors, and their product."""
    scale = 1.0
    for _ in range(_DEPTH):
        moved = unturned(view, operand)
        node = view.producer(moved.source)
        if node is not None and node.op_type in ("Mul", "Div"):
            for x, c in ((0, 1), (1, 0)) if node.op_type == "Mul" else ((0, 1),):
                number = view.number(node.input[c])
                if number and view.rank(node.input[x]) == len(operand.order):
                    scale *= number if node.op_type == "Mul" else 1 / number
                    moved = replace(moved, source=node.input[x])
                    break
        if moved == operand:
            break
        operand = moved
    return operand, scale


def unturned(view: View, operand: Operand) -> Operand:
    """What an operand was before it was transposed."""
    for _ in range(_DEPTH):
        node = view.producer(operand.source)
        if node is not None and node.op_type == "Identity":
            operand = replace(operand, source=node.input[0])
        elif node is not None and node.op_type == "Transpose":
            rank = len(operand.order)
            perm = tuple(attribute(node, "perm", tuple(reversed(range(rank)))))
            operand = operand.turned(perm, node.input[0])
        else:
            turned = _turned_by_reshapes(view, operand.source)
            if turned is None:
                return operand
            operand = operand.turned(_SWAPPED, turned)
    return operand


def _turned_by_reshapes(view: View, name: str) -> str | None:
    """[b, n, l, s] that was turned into [b, n, s, l] as [b·n, l, s]; None for everything else."""
    apart = view.made_by(name, "Reshape")
    turn = apart and view.made_by(apart.input[0], "Transpose")
    together = turn and view.made_by(turn.input[0], "Reshape")
    if not apart or not turn or not together or list(attribute(turn, "perm", ())) != [0, 2, 1]:
        return None
    before, between, after = view.known(together.input[0]), view.known(turn.input[0]), view.known(name)
    if len(before) != 4 or len(between) != 3 or len(after) != 4:
        return None
    size = before[3]
    if not isinstance(size, int) or not same(size, between[2]) or not same(size, after[2]):
        return None
    # Where not all names of dimensions are known, the check on numbers decides.
    contradicts = any(
        isinstance(a, int) and isinstance(b, int) and a != b
        for a, b in ((before[0], after[0]), (before[1], after[1]), (before[2], after[3]), (before[2], between[1]))
    )
    return None if contradicts else together.input[0]


def heads_of(view: View, *operands: Operand) -> int:
    """The second axis of one of these of four, as a number, or by what it was split off; -1 where that is not told."""
    for operand in operands:
        dims = view.known(operand.source)
        if len(dims) != 4:
            continue
        heads, size = dims[operand.order[1]], dims[operand.order[3]]
        if isinstance(heads, int):
            return heads
        split = view.made_by(operand.source, "Reshape")
        whole = view.known(split.input[0])[-1:] if split is not None else ()
        last_two_were_one = operand.order == _BY_HEADS and len(whole) == 1
        if last_two_were_one and isinstance(size, int) and isinstance(whole[0], int) and whole[0] % size == 0:
            return whole[0] // size
    return -1


def keeps_rows(view: View, before: str, after: str) -> bool:
    """Whether a Reshape joins the first two of four axes, or takes them apart. Where not all dimensions are known, the
    check on numbers decides."""
    a, b = view.known(before), view.known(after)
    if {len(a), len(b)} != {3, 4}:
        return False
    return not any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in zip(a[-2:], b[-2:], strict=True))


def checked(view: View, core: Core) -> Core | str:
    if any(view.types.get(o.source) != TensorProto.FLOAT for o in (core.query, core.key, core.value)):
        return "its operands are not float32, as the fused operator computes on CPUs, where it is checked"
    if core.heads < 0:
        return "the number of heads is not fixed"
    if not core.heads and any(view.rank(term.name) == 4 for term in core.terms):
        return "its mask has an axis for the heads, its operands have none"
    if core.scale <= 0:
        return f"its scores are multiplied by {core.scale:g}"
    return core
