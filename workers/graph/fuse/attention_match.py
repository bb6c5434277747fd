"""Attention as exporters spell it: softmax(queries · keysᵀ, scaled and masked) · values, found by its Softmax.

The scale may stand on the queries, the keys or the products, and in part on each; a mask may be a sum or a Where, of
constants or computed; keys may be turned by one Transpose, by two, or between two Reshapes. What is not understood is
left to stand as an operand: the product of two tensors is the same, however they were made. ONNX's own operator
`Attention` (opset 23) is read likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from onnx import NodeProto, TensorProto

from workers.graph.fuse.attention_operands import Core, Operand, Term, checked, heads_of, keeps_rows, read, unturned
from workers.graph.fuse.attention_standard import standard
from workers.graph.fuse.attention_view import View
from workers.graph.onnx_graph import node_label
from workers.graph.rewriting import attribute

_MASKED = -9_000.0  # what stands below it weighs nothing beside a score
_DEPTH = 12  # nodes between a product and its Softmax
_UNDERSTOOD = frozenset(("Add", "Sub", "Mul", "Div", "Where", "Cast", "Identity", "Dropout"))


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
            made = standard(view, node)
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
    query, q_scale = read(view, Operand(scores.product.input[0], plain))
    key, k_scale = read(view, Operand(scores.product.input[1], keys))
    value = unturned(view, Operand(product.input[1], plain))
    scale = q_scale * k_scale * scores.factor
    core = Core(
        node_label(softmax),
        view.index[product.output[0]],
        product.output[0],
        query,
        key,
        value,
        0 if rank == 3 else heads_of(view, query, value, key),
        scale,
        scores.terms,
        empty_rows_are_zero=zero,
    )
    return checked(view, core if rank == 4 else _with_heads(view, core))


def _with_heads(view: View, core: Core) -> Core:
    """An attention of three axes, [batch · heads, …], with the axes that were joined; itself where they were not."""
    if any(view.rank(term.name) == 3 for term in core.terms):
        return core
    join = view.only_reader(core.out)
    if join is None or join.op_type != "Reshape" or not keeps_rows(view, core.out, join.output[0]):
        return core
    operands = []
    scale = core.scale
    for operand in (core.query, core.key, core.value):
        joined = view.made_by(operand.source, "Reshape")
        if joined is None or operand.order != (0, 1, 2) or not keeps_rows(view, joined.input[0], operand.source):
            return core
        apart, factor = read(view, Operand(joined.input[0], (0, 1, 2, 3)))
        operands.append(apart)
        scale *= factor
        if operand is core.value and factor != 1:
            return core
    query, key, value = operands
    out = join.output[0]
    heads = heads_of(view, query, value, key)
    return replace(core, anchor=view.index[out], out=out, query=query, key=key, value=value, heads=heads, scale=scale)


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
        (op == "Reshape" and keeps_rows(view, inputs[0], name))
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
            reader.op_type == "Reshape" and keeps_rows(view, name, reader.output[0])
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
        names = [i for n in above if n.op_type != "Shape" for i in n.input[:2] if i not in view.initializers]
    return None
