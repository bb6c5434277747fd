"""ONNX's own operator `Attention` (opset 23)."""

from __future__ import annotations

from typing import Any

from onnx import NodeProto, TensorProto

from workers.graph.fuse.attention_dims import same
from workers.graph.fuse.attention_operands import Core, Operand, Term, checked, heads_of, read, unturned
from workers.graph.fuse.attention_view import View
from workers.graph.onnx_graph import node_label
from workers.graph.rewriting import attribute


def standard(view: View, node: NodeProto) -> Core | str:
    """What the node computes, of four axes, or of three in which heads and sizes are one; or why it is left."""
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
    if any(len(d) != len(dims[0]) for d in dims) or len(dims[0]) not in (3, 4):
        return "its operands are not known to be tensors of three or four axes"
    joined = len(dims[0]) == 3
    if joined:
        heads, of_keys = (attribute(node, name, 0) for name in ("q_num_heads", "kv_num_heads"))
        width = dims[0][2]
        size = width // heads if isinstance(width, int) and heads > 0 else None
        equal = heads == of_keys
    else:
        heads, size = 0, dims[0][3]
        equal = all(same(d[1], dims[0][1]) for d in dims)
    if not equal:
        return "its queries, keys and values are not of the same number of heads"
    scale = attribute(node, "scale", None) or (size**-0.5 if isinstance(size, int) else 0.0)
    causal = bool(attribute(node, "is_causal", 0))
    if causal and not same(dims[0][-2], dims[1][-2]):
        return "it is causal over keys that are not known to be as many as the queries"
    plain = tuple(range(len(dims[0])))
    operands = [read(view, Operand(name, plain)) for name in (query, key)]
    values = unturned(view, Operand(value, plain))
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
        heads or heads_of(view, operands[0][0], values),
        scale * operands[0][1] * operands[1][1],
        terms,
        causal,
        empty_rows_are_zero=True,
        joined=joined,
    )
    if causal and terms:
        return "it is causal and has a mask"
    return checked(view, core)
