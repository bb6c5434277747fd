"""`com.microsoft.MultiHeadAttention` in the place of a found attention.

What its kernels take (ONNX Runtime 1.32): queries [b, s, n·h], keys [b, l, n·h], values [b, l, n·v], a scale, a bias of
[1 or b, 1 or n, s, l] that is added to the scores, `unidirectional`. CUDA's flash kernels need that there is no bias,
its memory-efficient ones take the bias; a mask of keys (`key_padding_mask`) sends a call to neither, so every mask that
is not plainly causal becomes a bias. It is finite: a row of minus infinities has no Softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from workers.graph.fuse.attention_dims import Dims, same
from workers.graph.fuse.attention_operands import Core, Operand, Term
from workers.graph.fuse.attention_view import MOVES, View
from workers.graph.onnx_graph import CONTRIB_DOMAIN
from workers.graph.rewriting import attribute

_LOWEST = float(np.finfo(np.float32).min)
_BY_HEADS = (0, 2, 1, 3)


@dataclass
class Fusion:
    """Nodes that make tensor `made`, equal to `out` of the graph, which node number `anchor` makes."""

    label: str
    anchor: int
    out: str
    made: str
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: dict[str, TensorProto] = field(default_factory=dict)


class Emitter:
    """Makes the fusions of one graph, in the order of its nodes; a bias that several share is made once, by the
    first."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.biases: dict[Any, tuple[str, str]] = {}
        self.nodes: list[NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}
        self.taken = {*view.index, *view.initializers, *(i.name for i in view.model.graph.input)}

    def fuse(self, core: Core, *, causal: bool) -> Fusion:
        self.nodes, self.tensors = [], {}
        terms = () if causal else core.terms
        rows = [self._rows(operand, core.heads) for operand in (core.query, core.key, core.value)]
        empty = core.empty_rows_are_zero and not all(self._leaves_numbers(t) for t in terms)
        bias, left = self._bias(core, terms, rows, empty=empty) if terms else ("", "")
        made = self._node(
            "MultiHeadAttention",
            [*rows, "", "", bias] if bias else rows,
            f"{core.out}_attention",
            domain=CONTRIB_DOMAIN,
            num_heads=max(core.heads, 1),
            scale=float(core.scale),
            unidirectional=int(causal or core.causal),
        )
        if left:
            made = self._without_empty_rows(made, left, max(core.heads, 1))
        anchor, out, made = self._in_place(core, made)
        return Fusion(core.label, anchor, out, made, self.nodes, self.tensors)

    def _rows(self, operand: Operand, heads: int) -> str:
        """[batch, length, heads · size]."""
        source, order = operand.source, operand.order
        if len(order) == 4:
            order = (order[0], order[2], order[1], order[3])
        if order != tuple(range(len(order))):
            source = self._node("Transpose", [source], f"{source}_rows", perm=list(order))
            return source if len(order) == 3 else self._joined(source)
        if len(order) == 3:
            return source
        split = self.view.made_by(source, "Reshape")
        if split is not None and self._splits_last_axis(split.input[0], source, heads):
            return str(split.input[0])
        return self._joined(source)

    def _splits_last_axis(self, whole: str, split: str, heads: int) -> bool:
        a, b = self.view.known(whole), self.view.known(split)
        if len(a) != 3 or len(b) != 4 or not same(a[0], b[0]) or not same(a[1], b[1]):
            return False
        if b[2] != heads and isinstance(b[2], int):
            return False
        return isinstance(a[2], int) and isinstance(b[3], int) and a[2] == heads * b[3]

    def _joined(self, source: str) -> str:
        return self._node("Reshape", [source, self._ints(0, 0, -1)], f"{source}_joined")

    def _in_place(self, core: Core, made: str) -> tuple[int, str, str]:
        """Where the graph goes on, with what of the fused operator's output: as far on as the heads are joined
        again."""
        view = self.view
        if not core.heads or core.joined:
            return core.anchor, core.out, made
        turn = view.only_reader(core.out)
        if turn is None or turn.op_type != "Transpose" or tuple(attribute(turn, "perm", ())) != _BY_HEADS:
            apart = self._node("Reshape", [made, self._ints(0, 0, core.heads, -1)], f"{core.out}_heads")
            return core.anchor, core.out, self._node("Transpose", [apart], f"{core.out}_turned", perm=list(_BY_HEADS))
        turned = turn.output[0]
        join = view.only_reader(turned)
        if join is not None and join.op_type == "Reshape" and join.input[0] == turned:
            whole = join.output[0]
            if self._splits_last_axis(whole, turned, core.heads):
                return view.index[whole], whole, made
        apart = self._node("Reshape", [made, self._ints(0, 0, core.heads, -1)], f"{core.out}_heads")
        return view.index[turned], turned, apart

    # Masks

    def _bias(self, core: Core, terms: Sequence[Term], rows: Sequence[str], *, empty: bool) -> tuple[str, str]:
        """The sum of the terms, [1 or b, 1 or n, s, l], finite; and, where `empty` rows matter, whether a key is left
        to a query, [1 or b, s, 1 or n, 1]."""
        lengths = self._dims(core.query)[-2], self._dims(core.key)[-2]
        by_head = len(core.query.order) == 4 or core.joined
        key = (tuple(terms), lengths, by_head, empty)
        if key in self.biases:
            return self.biases[key]
        parts = [self._term(t, infinite=empty or len(terms) > 1) for t in terms]
        total = parts[0][0]
        for name, _ in parts[1:]:
            total = self._node("Add", [total, name], f"{name}_bias")
        dims = self._sum(terms)
        if not by_head and len(dims) == 3:
            total = self._unsqueezed(total)
            dims = (dims[0], 1, *dims[1:])
        if len(dims) != 4 or not same(dims[2], lengths[0]) or not same(dims[3], lengths[1]):
            total = self._node("Expand", [total, self._full(lengths, rows)], f"{total}_full")
        left = self._left(total) if empty else ""
        if not all(finite for _, finite in parts) or len(parts) > 1:
            total = self._finite(total)
        self.biases[key] = total, left
        return total, left

    def _finite(self, total: str) -> str:
        """The lowest number in the place of minus infinity, and half of it for all others that low: a row in which some
        keys are masked by a number and others by infinity, as of a padded query in a causal model, keeps the first."""
        bounded = self._node("Max", [total, self._scalar(_LOWEST / 2)], f"{total}_bounded")
        endless = self._node("Equal", [total, self._scalar(float("-inf"))], f"{total}_endless")
        return self._node("Where", [endless, self._scalar(_LOWEST), bounded], f"{total}_finite")

    def _term(self, term: Term, *, infinite: bool) -> tuple[str, bool]:
        """A term as a tensor of floats, and whether it is finite. `infinite`: what masks by minus infinity is to be
        told from what masks by a number."""
        if term.keep is not None:
            masked = term.factor if infinite and np.isinf(term.factor) else _LOWEST
            values = [self._scalar(0.0), self._scalar(masked)]
            chosen = values if term.keep else values[::-1]
            return self._node("Where", [term.name, *chosen], f"{term.name}_bias"), bool(np.isfinite(masked))
        name = term.name
        if self.view.types.get(name) != TensorProto.FLOAT:
            name = self._node("Cast", [name], f"{name}_cast", to=TensorProto.FLOAT)
        if term.factor != 1.0:
            name = self._node("Mul", [name, self._scalar(term.factor)], f"{name}_scaled")
        return name, name == term.name and self._is_finite(name)

    def _leaves_numbers(self, term: Term) -> bool:
        """Whether a row that it masks as a whole is one of equal weights, as it is of finite values, and not of NaN."""
        return bool(np.isfinite(term.factor)) if term.keep is not None else self._is_finite(term.name)

    def _is_finite(self, name: str) -> bool:
        """Whether it is plainly a selection of finite constants."""
        for _ in range(8):
            node = self.view.producer(name)
            if node is None:
                break
            if node.op_type == "Where":
                numbers = [self.view.number(i) for i in node.input[1:]]
                return all(n is not None and np.isfinite(n) for n in numbers)
            if node.op_type not in MOVES:
                return False
            name = node.input[0]
        value = self.view.constant(name) if name in self.view.initializers else None
        return value is not None and bool(np.isfinite(value).all())

    def _dims(self, operand: Operand) -> Dims:
        dims = self.view.known(operand.source)
        return tuple(dims[axis] for axis in operand.order)

    def _sum(self, terms: Sequence[Term]) -> Dims:
        """The dimensions of the sum of the terms; none where they cannot be told."""
        found: list[int | str] = []
        for term in terms:
            dims = self.view.dims.get(term.name)
            if dims is None:
                return ()
            length = max(len(found), len(dims))
            a, b = [1] * (length - len(found)) + found, [1] * (length - len(dims)) + list(dims)
            found = [y if x == 1 else x if y == 1 or same(x, y) else y if isinstance(y, int) else x
                     for x, y in zip(a, b, strict=True)]  # fmt: skip
        return tuple(found)

    def _full(self, lengths: Sequence[int | str], rows: Sequence[str]) -> str:
        """The shape [1, 1, queries, keys]."""
        if all(isinstance(d, int) for d in lengths):
            return self._ints(1, 1, *(int(d) for d in lengths))
        sizes = []
        for name in rows[:2]:
            shape = self._node("Shape", [name], f"{name}_shape")
            sizes.append(self._node("Slice", [shape, self._ints(1), self._ints(2)], f"{name}_length"))
        return self._node("Concat", [self._ints(1, 1), *sizes], f"{rows[0]}_full", axis=0)

    def _left(self, bias: str) -> str:
        """Whether a row of the bias has a key that is not masked by minus infinity."""
        counts = self._node("Greater", [bias, self._scalar(float("-inf"))], f"{bias}_counts")
        numbers = self._node("Cast", [counts], f"{bias}_numbers", to=TensorProto.FLOAT)
        if self.view.opset >= 13:
            total = self._node("ReduceSum", [numbers, self._ints(-1)], f"{bias}_keys", keepdims=1)
        else:
            total = self._node("ReduceSum", [numbers], f"{bias}_keys", axes=[-1], keepdims=1)
        left = self._node("Greater", [total, self._scalar(0.0)], f"{bias}_left")
        return self._node("Transpose", [left], f"{bias}_left_by_row", perm=list(_BY_HEADS))

    def _without_empty_rows(self, made: str, left: str, heads: int) -> str:
        """Zeros for the queries that no key is left to."""
        apart = self._node("Reshape", [made, self._ints(0, 0, heads, -1)], f"{made}_apart")
        kept = self._node("Where", [left, apart, self._scalar(0.0)], f"{made}_kept")
        return self._joined(kept)

    def _unsqueezed(self, name: str) -> str:
        """With an axis for the heads."""
        if self.view.opset >= 13:
            return self._node("Unsqueeze", [name, self._ints(1)], f"{name}_by_head")
        return self._node("Unsqueeze", [name], f"{name}_by_head", axes=[1])

    # Nodes

    def _node(self, op: str, inputs: Sequence[str], wanted: str, **attributes: Any) -> str:
        name, count = wanted, 1
        while name in self.taken:
            count += 1
            name = f"{wanted}_{count}"
        self.taken.add(name)
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def _constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        self.tensors[name] = numpy_helper.from_array(value, name)
        return name

    def _ints(self, *values: int) -> str:
        return self._constant("attention_ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def _scalar(self, value: float) -> str:
        return self._constant(f"attention_float_{value!r}", np.array(value, np.float32))
