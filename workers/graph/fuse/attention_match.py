"""Attention as exporters spell it: softmax(queries · keysᵀ, scaled and masked) · values, found by its Softmax.

The scale may stand on the queries, the keys or the products, and in part on each; a mask may be a sum or a Where, of
constants or computed; keys may be turned by one Transpose, by two, or between two Reshapes. What is not understood is
left to stand as an operand: the product of two tensors is the same, however they were made. ONNX's own operator
`Attention` (opset 23) is read likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from onnx import NodeProto, TensorProto

from workers.graph.fuse.attention_dims import same
from workers.graph.fuse.attention_view import View
from workers.graph.onnx_graph import node_label
from workers.graph.rewriting import attribute

_MASKED = -9_000.0  # what stands below it weighs nothing beside a score
_DEPTH = 12  # nodes between a product and its Softmax
_SWAPPED, _BY_HEADS = (0, 1, 3, 2), (0, 2, 1, 3)
_UNDERSTOOD = frozenset(("Add", "Sub", "Mul", "Div", "Where", "Cast", "Identity", "Dropout"))


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
    axis. `empty_rows_are_zero`: of queries that no key is left to."""

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


@dataclass(frozen=True)
class Scores:
    """A product, and what is done to it before the Softmax."""

    product: NodeProto
    factor: float
    terms: tuple[Term, ...]


def find(view: View) -> tuple[list[Core], dict[str, str]]:
    """The attentions that can be one operator, and why others cannot, by node."""
    found: list[Core] = []
    left: dict[str, str] = {}
    for node in view.nodes:
        if node.domain not in ("", "ai.onnx"):
            continue
        made: Core | str | None = None
        if node.op_type == "Softmax":
            made = _around(view, node)
        elif node.op_type == "Attention":
            made = _standard(view, node)
        if isinstance(made, Core):
            found.append(made)
        elif made:
            left[node_label(node)] = made
    return found, left


def _around(view: View, softmax: NodeProto) -> Core | str | None:
    """What is around a Softmax: attention, why it is not quite one, or None where it has nothing to do with it."""
    scores = next(_scores(view, softmax.input[0], 1.0, (), 0), None)
    after = _after(view, softmax)
    if scores is None or after is None:
        return _why_not(view, softmax)
    if isinstance(after, str):
        return after
    product, zero = after
    rank = view.rank(scores.product.input[0])
    if rank not in (3, 4) or any(view.rank(name) != rank for name in (scores.product.input[1], product.input[1])):
        return "its operands are not known to be tensors of three or four axes"
    axis = attribute(softmax, "axis", -1 if view.opset >= 13 else 1)
    if axis not in (-1, (view.rank(softmax.input[0]) or rank) - 1):
        return f"its Softmax goes along axis {axis}"
    plain = tuple(range(rank))
    keys = (*plain[:-2], rank - 1, rank - 2)
    query, q_scale = _operand(view, Operand(scores.product.input[0], plain))
    key, k_scale = _operand(view, Operand(scores.product.input[1], keys))
    value = _still(view, Operand(product.input[1], plain))
    scale = q_scale * k_scale * scores.factor
    core = Core(
        node_label(softmax),
        view.index[product.output[0]],
        product.output[0],
        query,
        key,
        value,
        0 if rank == 3 else _heads(view, query, value, key),
        scale,
        scores.terms,
        empty_rows_are_zero=zero,
    )
    return _checked(view, core if rank == 4 else _with_heads(view, core))


def _with_heads(view: View, core: Core) -> Core:
    """An attention of three axes, [batch · heads, …], with the axes that were joined; itself where they were not."""
    if any(view.rank(term.name) == 3 for term in core.terms):
        return core
    join = view.only_reader(core.out)
    if join is None or join.op_type != "Reshape" or not _keeps_rows(view, core.out, join.output[0]):
        return core
    operands = []
    scale = core.scale
    for operand in (core.query, core.key, core.value):
        joined = view.made_by(operand.source, "Reshape")
        if joined is None or operand.order != (0, 1, 2) or not _keeps_rows(view, joined.input[0], operand.source):
            return core
        apart, factor = _operand(view, Operand(joined.input[0], (0, 1, 2, 3)))
        operands.append(apart)
        scale *= factor
        if operand is core.value and factor != 1:
            return core
    query, key, value = operands
    out = join.output[0]
    heads = _heads(view, query, value, key)
    return replace(core, anchor=view.index[out], out=out, query=query, key=key, value=value, heads=heads, scale=scale)


def _keeps_rows(view: View, before: str, after: str) -> bool:
    """Whether a Reshape joins the first two of four axes, or takes them apart. Where not all dimensions are known, the
    check on numbers decides."""
    a, b = view.known(before), view.known(after)
    if {len(a), len(b)} != {3, 4}:
        return False
    return not any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in zip(a[-2:], b[-2:], strict=True))


def _checked(view: View, core: Core) -> Core | str:
    if any(view.types.get(o.source) != TensorProto.FLOAT for o in (core.query, core.key, core.value)):
        return "its operands are not float32, as the fused operator computes on CPUs, where it is checked"
    if core.heads < 0:
        return "the number of heads is not fixed"
    if not core.heads and any(view.rank(term.name) == 4 for term in core.terms):
        return "its mask has an axis for the heads, its operands have none"
    if core.scale <= 0:
        return f"its scores are multiplied by {core.scale:g}"
    return core


def _heads(view: View, *operands: Operand) -> int:
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


def _scores(view: View, name: str, factor: float, terms: tuple[Term, ...], depth: int) -> Iterator[Scores]:
    """The products of two activations above a Softmax's input, nearest path first. The Softmax's input is `factor`
    times the tensor `name`, plus the terms."""
    node = view.producer(name)
    if node is None or depth > _DEPTH:
        return
    op, inputs = node.op_type, node.input
    if op == "MatMul":
        if _are_activations(view, node):
            yield Scores(node, factor, terms)
    elif op in ("Mul", "Div"):
        for x, c in ((0, 1), (1, 0)) if op == "Mul" else ((0, 1),):
            number = view.number(inputs[c])
            if number:
                yield from _scores(view, inputs[x], factor * (number if op == "Mul" else 1 / number), terms, depth + 1)
    elif op == "Add":
        for x, c in ((0, 1), (1, 0)):
            yield from _scores(view, inputs[x], factor, (*terms, Term(inputs[c], factor)), depth + 1)
    elif op == "Sub":
        yield from _scores(view, inputs[0], factor, (*terms, Term(inputs[1], -factor)), depth + 1)
    elif op == "Where":
        for x, c in ((1, 2), (2, 1)):
            number = view.number(inputs[c])
            if number is not None and number * factor <= _MASKED:
                yield from _scores(view, inputs[x], factor, (*terms, Term(inputs[0], number, x == 1)), depth + 1)
    elif (
        (op == "Reshape" and _keeps_rows(view, inputs[0], name))
        or op in ("Identity", "Dropout")
        or (op == "Cast" and attribute(node, "to", 0) == TensorProto.FLOAT)
    ):
        yield from _scores(view, inputs[0], factor, terms, depth + 1)


def _are_activations(view: View, product: NodeProto) -> bool:
    return all(view.rank(name) in (3, 4) and name not in view.initializers for name in product.input)


def _after(view: View, softmax: NodeProto) -> tuple[NodeProto, bool] | str | None:
    """The product with the values behind a Softmax, and whether rows of NaN are made zero before it."""
    name, zero = softmax.output[0], False
    for _ in range(6):
        readers = view.readers.get(name, [])
        if name in view.outside:
            return "its weights are an output, or read by a nested graph" if _leads_to_product(view, name) else None
        if len(readers) == 2 and {r.op_type for r in readers} == {"IsNaN", "Where"}:
            where = next(r for r in readers if r.op_type == "Where")
            check = next(r for r in readers if r.op_type == "IsNaN")
            if list(where.input) == [check.output[0], where.input[1], name] and view.number(where.input[1]) == 0:
                name, zero = where.output[0], True
                continue
        if len(readers) != 1:
            return "its weights are read elsewhere too" if _leads_to_product(view, name) else None
        (reader,) = readers
        if reader.op_type == "MatMul" and reader.input[0] == name and reader.input[1] != name:
            return (reader, zero) if reader.input[1] not in view.initializers else None
        passes = reader.op_type in ("Cast", "Identity", "Dropout") or (
            reader.op_type == "Reshape" and _keeps_rows(view, name, reader.output[0])
        )
        if not passes or reader.input[0] != name:
            return f"its weights pass {reader.op_type}" if _leads_to_product(view, reader.output[0]) else None
        name = reader.output[0]
    return None


def _leads_to_product(view: View, name: str) -> bool:
    return any(
        r.op_type == "MatMul" and r.input[0] == name and r.input[1] not in view.initializers
        for r in view.readers.get(name, [])
    )


def _why_not(view: View, softmax: NodeProto) -> str | None:
    """Why a Softmax between two products is none of ours; None where it is not between two."""
    if not _leads_to_product(view, softmax.output[0]):
        return None
    names = [softmax.input[0]]
    seen: dict[str, None] = {}
    for _ in range(_DEPTH):
        above = [n for n in map(view.producer, names) if n is not None]
        if any(n.op_type == "MatMul" and _are_activations(view, n) for n in above):
            strange = ", ".join(op for op in seen if op not in _UNDERSTOOD)
            return f"between its products and its Softmax stands {strange or 'a mask or factor of another kind'}"
        seen |= {n.op_type: None for n in above}
        names = [i for n in above if n.op_type not in ("Shape", "MatMul") for i in n.input[:2]]
    return None


def _operand(view: View, operand: Operand) -> tuple[Operand, float]:
    """The tensor that an operand was made of by transposing and by factors, and their product."""
    scale = 1.0
    for _ in range(_DEPTH):
        moved = _still(view, operand)
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


def _still(view: View, operand: Operand) -> Operand:
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


def _standard(view: View, node: NodeProto) -> Core | str:
    """ONNX's own operator, of four axes."""
    names = [*node.input, *[""] * (6 - len(node.input))]
    query, key, value, mask = names[:4]
    extra: dict[str, Any] = {
        "a softcap": attribute(node, "softcap", 0.0),
        "a past": any(names[4:]),
        "outputs beside the first": any(node.output[1:]),
        "a Softmax in a precision of its own": attribute(node, "softmax_precision", 0) not in (0, TensorProto.FLOAT),
    }
    unfit = next((what for what, there in extra.items() if there), None)
    if unfit:
        return f"it has {unfit}"
    dims = [view.known(name) for name in (query, key, value)]
    if any(len(d) != 4 for d in dims):
        return "its operands are not known to be tensors of four axes"
    size = dims[0][3]
    scale = attribute(node, "scale", None) or (size**-0.5 if isinstance(size, int) else 0.0)
    if any(not same(d[1], dims[0][1]) for d in dims):
        return "its queries, keys and values are not of the same number of heads"
    causal = bool(attribute(node, "is_causal", 0))
    if causal and not same(dims[0][2], dims[1][2]):
        return "it is causal over keys that are not known to be as many as the queries"
    plain = (0, 1, 2, 3)
    operands = [_operand(view, Operand(name, plain)) for name in (query, key)]
    values = _still(view, Operand(value, plain))
    terms: tuple[Term, ...] = ()
    if mask:
        booleans = view.types.get(mask) == TensorProto.BOOL
        terms = (Term(mask, float("-inf"), keep=True) if booleans else Term(mask),)
    core = Core(
        node_label(node),
        view.index[node.output[0]],
        node.output[0],
        operands[0][0],
        operands[1][0],
        values,
        _heads(view, operands[0][0], values),
        scale * operands[0][1] * operands[1][1],
        terms,
        causal,
        empty_rows_are_zero=True,
    )
    if causal and terms:
        return "it is causal and has a mask"
    return _checked(view, core)
