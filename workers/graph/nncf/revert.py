"""Nodes of a model that NNCF quantized back in floating point, without calibrating anew.

As NNCF's own accuracy-aware quantization does it: a node reads what its quantizer read, before SmoothQuant's scales,
and gets its own weights and bias back, which NNCF has scaled and corrected for what the rounding did. Where the scales
cannot be taken out alone, the weights keep them, and their 8-bit rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from workers.graph.ir.library import library
from workers.graph.nncf.quantize import COMPUTE, MOVES, PASSIVE, QUANTIZERS, is_quantized_value

Array = np.ndarray[Any, Any]
_DEEPEST = 8
_FOLDED = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Unsqueeze")  # between weights and their reader


def revert(quantized: Any, names: Collection[str], original: Any) -> None:
    """Change `quantized` in place: the nodes of these names (as OpenVINO calls them) compute in floating point.

    A quantizer behind operators that only move values goes for all its readers, and they come with the node: weights
    in 8 bits are of no use to them. `original`: the model that was quantized, with the same names.
    """
    _Reverted(quantized, original).put_back(names)
    quantized.validate_nodes_and_infer_types()


def computes(kind: str) -> bool:
    """Whether a node of this type does more than move values: else nothing changes where it is put back."""
    return kind not in (*MOVES, *PASSIVE)


class _Reverted:
    def __init__(self, model: Any, original: Any) -> None:
        self.model = model
        self.known = {node.get_friendly_name(): node for node in original.get_ops()}

    def put_back(self, names: Collection[str]) -> None:
        by_name = {node.get_friendly_name(): node for node in self.model.get_ordered_ops()}
        done = {name for name, node in by_name.items() if self._is_half_quantized(node)}  # as NNCF left them
        named = [(name, node) for name, node in by_name.items() if name in names]
        # A lookup in 8-bit weights does something, too.
        todo = [name for name, node in named if computes(node.get_type_name()) or _has_packed_weights(node)]
        while todo:
            for name in todo:
                self._put_back(by_name[name])
            done |= {*todo}
            todo = [name for name, node in by_name.items() if name not in done and self._is_half_quantized(node)]

    def _is_half_quantized(self, node: Any) -> bool:
        if node.get_type_name() not in COMPUTE:
            return False
        rest = [port for port in node.inputs() if not _of_constants(port)]
        return _has_packed_weights(node) and not any(is_quantized_value(p.get_source_output()) for p in rest)

    def _put_back(self, node: Any) -> None:
        own = self._own_constants(node)
        scaled = [self._unquantized(p, bool(own)) for p in node.inputs() if not _of_constants(p)]
        if own and not any(scaled):
            for port, value in own:
                port.replace_source_output(_constant(value, port.get_element_type()).output(0))
            for reader in [r.get_node() for r in node.output(0).get_target_inputs()]:
                if reader.get_type_name() == "Add":
                    for port, value in self._own_constants(reader):
                        port.replace_source_output(_constant(value, port.get_element_type()).output(0))
            return
        for port in node.inputs():
            _as_float(port)

    def _own_constants(self, node: Any) -> list[tuple[Any, Array]]:
        """The inputs that are constants, each with what it was before the node was quantized; none where that is not
        known of all."""
        original = self.known.get(node.get_friendly_name())
        if original is None or original.get_input_size() != node.get_input_size():
            return []
        found = []
        for port, before in zip(node.inputs(), original.input_values(), strict=True):
            if _of_constants(port):
                if not _is_constant(before.get_node()) or [*before.get_shape()] != [*port.get_shape()]:
                    return []
                found.append((port, _value(before.get_node())))
        return found

    def _unquantized(self, port: Any, own_weights: bool) -> bool:
        """Take the quantizers before this input away, and SmoothQuant's scales where the node gets its own weights;
        whether scales stay before it."""
        value = port.get_source_output()
        while True:
            node = value.get_node()
            if node.get_type_name() not in QUANTIZERS and not (own_weights and self._is_scale(node)):
                break
            value = node.input_value(0)
        port.replace_source_output(value)
        _clear(node)
        for _ in range(_DEEPEST):
            if self._is_scale(node):
                return True
            if node.get_type_name() not in (*MOVES, *QUANTIZERS) or not node.get_input_size():
                return False
            node = node.input_value(0).get_node()
        return False

    def _is_scale(self, node: Any) -> bool:
        name = node.get_friendly_name()
        return node.get_type_name() == "Multiply" and "smooth_quant" in name and name not in self.known


def _clear(node: Any, depth: int = 0) -> None:
    """Take away the quantizers behind operators that only move values, for all their readers."""
    if node.get_type_name() not in MOVES or depth > _DEEPEST:
        return
    data = node.input_values() if node.get_type_name() == "Concat" else node.input_values()[:1]
    for value in data:
        before = value.get_node()
        if before.get_type_name() in QUANTIZERS:
            before.output(0).replace(before.input_value(0))
        else:
            _clear(before, depth + 1)


def _has_packed_weights(node: Any) -> bool:
    sources = [p.get_source_output() for p in node.inputs() if _of_constants(p)]
    return any(s.get_node().get_type_name() != "Constant" and is_quantized_value(s) for s in sources)


def _of_constants(port: Any) -> bool:
    return _is_constant(port.get_source_output().get_node())


def _is_constant(node: Any, depth: int = 0) -> bool:
    """Whether `_value` knows it, without computing it."""
    kind = node.get_type_name()
    if kind == "Constant":
        element = node.get_output_element_type(0)
        return bool(element.is_real() or element.is_integral_number())
    inputs = node.input_values() if kind in _FOLDED and depth <= _DEEPEST else []
    return bool(inputs) and all(_is_constant(value.get_node(), depth + 1) for value in inputs)


def _as_float(port: Any) -> None:
    """8-bit constants as what they stand for: no kernel has to unpack them."""
    if not _of_constants(port) or not port.get_element_type().is_real():
        return
    node = port.get_source_output().get_node()
    if node.get_type_name() != "Constant":
        port.replace_source_output(_constant(_value(node), port.get_element_type()).output(0))


def _value(node: Any) -> Array:
    """What a node gives that depends on constants only (`_is_constant`), as weights behind their scale do."""
    kind = node.get_type_name()
    if kind == "Constant":
        if node.get_output_element_type(0).get_type_name() == "bf16":  # else its values come as their bits
            return np.asarray(node.get_data(dtype=np.float32))
        return np.asarray(node.get_data())
    first, *rest = [_value(value.get_node()) for value in node.input_values()]
    if kind == "Convert":
        return first.astype(np.float32) if node.get_output_element_type(0).is_real() else first
    if kind == "Subtract":
        return np.asarray(first - rest[0])
    if kind == "Multiply":
        return np.asarray(first * rest[0])
    if kind == "Transpose":
        return np.transpose(first, [int(axis) for axis in rest[0]])
    return first.reshape([*node.get_output_shape(0)])


def _constant(array: Array, kind: Any) -> Any:
    return library().op.Constant(np.asarray(array, kind.to_dtype(), order="C"))
