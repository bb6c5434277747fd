"""What a known fault of OpenVINO's CPU plug-in would spoil, so that a build can keep clear of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from onnx import ModelProto, NodeProto

from workers.graph.onnx_graph import real_inputs

_SOFTMAX = ("Softmax", "LogSoftmax")
_ATTENTION = "ScaledDotProductAttention"
_TOLD_HOW = ("FakeQuantize", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
_UNPACKING = ("Convert", "Reshape", "Subtract", "Multiply", "FakeQuantize")
_RECURRENT = ("LSTM", "GRU", "RNN")
_FARTHEST = 16  # nodes between a product and its Softmax; masks, scales and reshapes are a handful


def first_call_decides(model: Any) -> bool:
    """Whether the plug-in's fused attention would answer by the length that it met first.

    Its kernels for dynamic shapes ("snippets") are made at the first inference. Attention without a mask (a product,
    a Softmax over an axis of unknown size, a product) whose keys have length 1 then is made for that length: every
    later call of length 16 or more answers numbers that mean nothing, NaN in bfloat16. Seen in OpenVINO 2026.4.1, with
    and without its smart reshape. A mask, or any other tensor that is added to the products, tells the lengths apart.
    The remedy is the plug-in's switch `SNIPPETS_MODE`: one inference of another length at load would do, too, but who
    knows which inputs give the keys of a network behind strides and pooling more than one element.
    """
    return any(_at_risk(node) for node in model.get_ops())


def ignores_lengths(model: ModelProto) -> NodeProto | None:
    """A recurrent node whose `sequence_lens` a caller gives: the plug-in computes as if every sequence had its full
    length. Seen in OpenVINO 2026.4.1 for LSTM, GRU and RNN in every direction. Lengths that follow from a shape are the
    full ones."""
    makers = {name: node for node in model.graph.node for name in node.output}
    given = {info.name for info in real_inputs(model.graph)}
    recurrent = (n for n in model.graph.node if n.op_type in _RECURRENT and len(n.input) > 4)
    return next((n for n in recurrent if _reaches(n.input[4], makers, given)), None)


def _reaches(name: str, makers: Mapping[str, NodeProto], given: Collection[str]) -> bool:
    """Whether values of a tensor come from one of `given`, and not from its shape alone."""
    waiting, seen = [name], {name}
    while waiting:
        name = waiting.pop()
        if name in given:
            return True
        node = makers.get(name)
        if node is not None and node.op_type not in ("Shape", "Size"):
            waiting += [n for n in node.input if n and n not in seen]
            seen.update(node.input)
    return False


def _at_risk(node: Any) -> bool:
    kind = node.get_type_name()
    if kind == _ATTENTION:  # queries, keys, values, and often a mask: where there is none to give, a scalar
        keys, given = node.get_input_partial_shape(1), node.input_values()
        masked = len(given) > 3 and not (_is_constant(given[3].get_node()) and _is_scalar(given[3].get_partial_shape()))
        return not masked and (keys.rank.is_dynamic or _may_be_one(keys[-2]))
    if kind not in _SOFTMAX:
        return False
    shape = node.get_input_partial_shape(0)
    if shape.rank.is_static and not _may_be_one(shape[int(node.get_attributes()["axis"])]):
        return False
    return _comes_from_product(node.input_value(0).get_node())


def _may_be_one(size: Any) -> bool:
    """Of a size that is not fixed: one that is has kernels of its own."""
    return bool(size.is_dynamic) and size.get_min_length() <= 1


def _comes_from_product(node: Any) -> bool:
    """Whether nothing but operations on one tensor and scalars lies between `node` and a product of two activations."""
    for _ in range(_FARTHEST):
        if node.get_type_name() == "MatMul":
            return not any(_is_constant(value.get_node()) for value in node.input_values())
        tensors = _tensors(node)
        if len(tensors) != 1:
            return False  # the sum with a mask, an input, …
        node = tensors[0].get_node()
    return True


def _tensors(node: Any) -> list[Any]:
    """The node's inputs, without scales and what tells it how to move or round."""
    values = node.input_values()
    if node.get_type_name() in _TOLD_HOW:
        return list(values[:1])
    return [v for v in values if not (_is_constant(v.get_node()) and _is_scalar(v.get_partial_shape()))]


def _is_scalar(shape: Any) -> bool:
    return bool(shape.is_static) and all(dim.get_length() == 1 for dim in shape)


def _is_constant(node: Any) -> bool:
    """Also a weight that is stored in few bits, and unpacked by what follows it."""
    kind = node.get_type_name()
    if kind in _UNPACKING:
        return all(_is_constant(value.get_node()) for value in node.input_values())
    return bool(kind == "Constant")
