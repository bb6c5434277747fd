"""Nodes of a model that NNCF quantized back in floating point, without calibrating anew.

As NNCF's own accuracy-aware quantization does it: a node reads what its quantizer read, before SmoothQuant's scales, and
gets its own weights and bias back, which NNCF has scaled and corrected for what the rounding did. Where the scales cannot
be taken out alone, the weights keep them, and their 8-bit rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from workers.backends._nncf_quantize import PASSIVE, QUANTIZERS
from workers.backends._openvino_library import library

Array = np.ndarray[Any, Any]
_MOVES = (*PASSIVE, "MaxPool", "Concat", "Split", "VariadicSplit", "Pad")
_DEEPEST = 8


def revert(quantized: Any, names: Collection[str], original: Any) -> None:
    """Change `quantized` in place: the nodes of these names (as OpenVINO calls them) compute in floating point.

    A quantizer behind operators that only move values goes for all its readers. `original`: the model that was
    quantized, with the same names.
    """
    known = {node.get_friendly_name(): node for node in original.get_ops()}
    for node in quantized.get_ordered_ops():
        if node.get_friendly_name() not in names or node.get_type_name() in PASSIVE:
            continue
        constants = {port.get_index() for port in node.inputs() if _of_constants(port)}
        scaled = [_unquantized(port) for port in node.inputs() if port.get_index() not in constants]
        own = not any(scaled) and _own_constants(node, known.get(node.get_friendly_name()))
        for port in node.inputs():
            if port.get_index() in constants and not own:
                _as_float(port)
        for reader in [r.get_node() for r in node.output(0).get_target_inputs()]:
            if own and reader.get_type_name() == "Add":
                _own_constants(reader, known.get(reader.get_friendly_name()))
    quantized.validate_nodes_and_infer_types()


def _unquantized(port: Any) -> bool:
    """Take the quantizer before this input away; whether scales of SmoothQuant stay before it."""
    node = port.get_source_output().get_node()
    if node.get_type_name() in QUANTIZERS:
        value = node.input_value(0)
        if _is_scale(value.get_node()):
            value = value.get_node().input_value(0)
        port.replace_source_output(value)
    else:
        for _ in range(_DEEPEST):
            if node.get_type_name() not in _MOVES or not node.get_input_size():
                break
            node = node.input_value(0).get_node()
            if node.get_type_name() in QUANTIZERS:
                node.output(0).replace(node.input_value(0))
                break
    node = port.get_source_output().get_node()
    for _ in range(_DEEPEST):
        if _is_scale(node):
            return True
        if node.get_type_name() not in (*_MOVES, *QUANTIZERS) or not node.get_input_size():
            return False
        node = node.input_value(0).get_node()
    return False


def _is_scale(node: Any) -> bool:
    return node.get_type_name() == "Multiply" and "smooth_quant" in node.get_friendly_name()


def _own_constants(node: Any, original: Any) -> bool:
    """Give the node what it had before it was quantized, where it reads constants; whether that was possible."""
    if original is None or original.get_input_size() != node.get_input_size():
        return False
    found = []
    for port, before in zip(node.inputs(), original.input_values(), strict=True):
        if _of_constants(port):
            own = _value(before.get_node())
            if own is None or [*own.shape] != [*port.get_shape()]:
                return False
            found.append((port, own))
    for port, own in found:
        port.replace_source_output(_constant(own, port.get_element_type()).output(0))
    return True


def _of_constants(port: Any) -> bool:
    return _value(port.get_source_output().get_node()) is not None


def _as_float(port: Any) -> None:
    """8-bit constants as what they stand for: no kernel has to unpack them."""
    node = port.get_source_output().get_node()
    value = _value(node)
    if value is not None and node.get_type_name() != "Constant" and value.dtype.kind == "f":
        port.replace_source_output(_constant(value, port.get_element_type()).output(0))


def _value(node: Any, depth: int = 0) -> Array | None:
    """What a node gives that depends on constants only, as weights behind their scale do; None for all others."""
    kind = node.get_type_name()
    if kind == "Constant":
        array = np.asarray(node.get_data())
        return array if array.dtype.kind in "fiu" else None
    if depth > _DEEPEST or kind not in ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Unsqueeze"):
        return None
    inputs = [_value(value.get_node(), depth + 1) for value in node.input_values()]
    if any(value is None for value in inputs):
        return None
    first, *rest = [np.asarray(value) for value in inputs]
    if kind == "Convert":
        return np.asarray(first, np.float32) if node.get_output_element_type(0).is_real() else first
    if kind == "Subtract":
        return np.asarray(first - rest[0])
    if kind == "Multiply":
        return np.asarray(first * rest[0])
    if kind == "Transpose":
        return np.transpose(first, [int(axis) for axis in rest[0]])
    return first.reshape([*node.get_output_shape(0)])


def _constant(array: Array, kind: Any) -> Any:
    return library().op.Constant(np.ascontiguousarray(array, kind.to_dtype()))
