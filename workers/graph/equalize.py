"""Moves the spread of activations into weights, channel by channel, so that eight bits carry both.

Source: G. Xiao et al., "SmoothQuant", ICML 2023. Where a tensor X feeds products X·W with constant W, X is divided by
s and the rows of W multiplied by it: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), the maxima over all products that
read X (so Q, K and V share one s). The division disappears in constants above X where only these products read X;
elsewhere it is one Mul, inserted where a few channels dwarf the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from workers.graph.onnx_graph import nodes_of, reads
from workers.graph.qdq.surgery import drop_unread

Array = np.ndarray[Any, Any]

OUTLIER_RATIO = 4.0  # largest over median channel maximum from which an inserted Mul pays
_LARGEST_SCALE = 1e4
_DEEPEST = 12  # nodes between a tensor and the constants that the division is folded into


@dataclass(frozen=True)
class Site:
    """A tensor with `channels` on its last axis, and the names of the products with constant weights that read it."""

    tensor: str
    channels: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Smoothed:
    """What was done at a site. `outlier_ratio`: of the channel maxima, largest over median, before."""

    site: Site
    how: Literal["folded", "mul"]
    outlier_ratio: float

    def to_json(self) -> dict[str, Any]:
        ratio = float(f"{self.outlier_ratio:.4g}")
        return {
            "tensor": self.site.tensor,
            "nodes": [*self.site.nodes],
            "how": self.how,
            "outlier_ratio": ratio,
        }


def sites(model: ModelProto) -> list[Site]:
    """In the graph's order. Needs constants as initializers and names on all nodes."""
    weights = {i.name: i for i in model.graph.initializer if i.data_type == TensorProto.FLOAT}
    found: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        if _product(node, weights) and node.input[0] not in weights:
            found.setdefault(node.input[0], []).append(node)
    result = []
    for tensor, nodes in found.items():
        depths = {weights[n.input[1]].dims[_row_axis(n)] for n in nodes}
        if len(depths) == 1:
            result.append(Site(tensor, int(depths.pop()), tuple(n.name for n in nodes)))
    return result


def equalize(
    model: ModelProto, maxima: Mapping[str, Array], alpha: float, excluded: Sequence[str], *, insert_mul: bool
) -> list[Smoothed]:
    """Smooth the sites of `model` in place. `maxima`: largest magnitude by channel, by tensor. A site of which a node
    is excluded stays. `insert_mul` False: only where the division costs nothing."""
    done = []
    for site in sites(model):
        channel = maxima.get(site.tensor)
        if channel is None or not np.isfinite(channel).all() or set(site.nodes) & {*excluded}:
            continue
        graph = _Graph(model)
        scale = graph.scale(site, channel, alpha)
        typical = float(np.median(channel))
        ratio = float(channel.max(initial=0.0)) / typical if typical > 0 else float("inf")
        ratio = min(ratio, 1e9)
        if graph.divide(site, scale):
            done.append(Smoothed(site, "folded", ratio))
        elif insert_mul and ratio >= OUTLIER_RATIO:
            graph.scale_rows(site, scale)
            graph.insert_mul(site, 1 / scale)
            done.append(Smoothed(site, "mul", ratio))
    drop_unread(model)
    return done


def divide(model: ModelProto, site: Site, scale: Array) -> bool:
    """Divide the site's tensor by `scale` [channels] and multiply the rows of its products' weights, in place, where
    the division disappears in constants above; False, and nothing done, where it does not."""
    done = _Graph(model).divide(site, scale)
    drop_unread(model)
    return done


@dataclass(frozen=True)
class _Edit:
    """Another constant for one input of a node."""

    node: NodeProto
    position: int
    value: Array


class _Graph:
    """The graph as it is before one site is smoothed."""

    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.weights = {i.name: i for i in self.graph.initializer if i.data_type == TensorProto.FLOAT}
        self.nodes = {node.name: node for node in self.graph.node}
        self.producers = {name: node for node in self.graph.node for name in node.output if name}
        self.readers: dict[str, list[str]] = {}
        for node in self.graph.node:
            for name in reads(node):
                self.readers.setdefault(name, []).append(node.name)
        self.outputs = {o.name for o in self.graph.output}

    def scale(self, site: Site, channel: Array, alpha: float) -> Array:
        """s, with a geometric mean of one: only how channels compare matters."""
        rows = np.zeros(site.channels)
        for name in site.nodes:
            weight, axis = self._weight(name)
            rows = np.maximum(rows, np.abs(weight).max(axis=1 - axis))
        alive = (channel > 0) & (rows > 0)
        logs = np.zeros(site.channels)
        logs[alive] = alpha * np.log(channel[alive]) - (1 - alpha) * np.log(rows[alive])
        if alive.any():
            logs[alive] -= logs[alive].mean()
        return np.clip(np.exp(logs), 1 / _LARGEST_SCALE, _LARGEST_SCALE)

    def divide(self, site: Site, scale: Array) -> bool:
        """See the function."""
        edits = self.folded(site.tensor, 1 / scale, set(site.nodes))
        if edits is None:
            return False
        self.scale_rows(site, scale)
        for edit in edits:
            self.replace(edit.node, edit.position, edit.value)
        return True

    def scale_rows(self, site: Site, scale: Array) -> None:
        for name in site.nodes:
            weight, axis = self._weight(name)
            self.replace(self.nodes[name], 1, weight * (scale[:, None] if axis == 0 else scale[None, :]))

    def insert_mul(self, site: Site, factor: Array) -> None:
        at = min(index for index, node in enumerate(self.graph.node) if node.name in site.nodes)
        scaled = self._fresh(f"{site.tensor}_equalized")
        constant = self._add(f"{site.tensor}_factor", factor)
        node = helper.make_node("Mul", [site.tensor, constant], [scaled], name=self._fresh_node(f"{scaled}/Mul"))
        self.graph.node.insert(at, node)
        for name in site.nodes:
            self.nodes[name].input[0] = scaled

    def replace(self, node: NodeProto, position: int, value: Array) -> None:
        """A new constant: the old one may have other readers."""
        node.input[position] = self._add(node.input[position], value)

    def folded(
        self, tensor: str, factor: Array, readers: set[str], depth: int = 0, *, exact: bool = False
    ) -> list[_Edit] | None:
        """Constants with which `tensor` comes out multiplied by `factor` [channels]; None where others read it too, or
        nothing above takes the factor. `exact`: the last axis may be another one, as behind a Reshape: only constants
        that have all channels prove that it is the same."""
        node = self.producers.get(tensor)
        if node is None or depth > _DEEPEST or tensor in self.outputs or not {*self.readers[tensor]} <= readers:
            return None
        if node.op_type == "LayerNormalization":
            return self._into_norm(node, tensor, factor)
        if node.op_type in ("MatMul", "Gemm"):
            return self._into_product(node, factor)
        if node.op_type in ("Relu", "LeakyRelu"):
            return self.folded(node.input[0], factor, {node.name}, depth + 1, exact=exact)
        if node.op_type == "Reshape":
            return self.folded(node.input[0], factor, {node.name}, depth + 1, exact=True)
        if node.op_type in ("Add", "Sub"):
            parts = [self._into(node, position, factor, depth, exact) for position in (0, 1)]
            return None if parts[0] is None or parts[1] is None else [*parts[0], *parts[1]]
        if node.op_type == "Mul":
            constants_first = sorted((0, 1), key=lambda p: node.input[p] not in self.weights)
            found = (self._into(node, position, factor, depth, exact) for position in constants_first)
            return next((edits for edits in found if edits is not None), None)
        if node.op_type == "Div":
            divisor = self._vector(node, 1, factor.size, exact)
            if divisor is not None:
                return [_Edit(node, 1, divisor / factor)]
            return self._into(node, 0, factor, depth, exact)
        return None

    def _into(self, node: NodeProto, position: int, factor: Array, depth: int, exact: bool) -> list[_Edit] | None:
        """As `folded`, of one input that only this node reads; a constant is taken as it is."""
        name = node.input[position]
        if name in self.weights:
            value = self._vector(node, position, factor.size, exact)
            return None if value is None else [_Edit(node, position, value * factor)]
        if [*node.input].count(name) > 1:
            return None  # x·x or x + x: the factor would count twice
        return self.folded(name, factor, {node.name}, depth + 1, exact=exact)

    def _into_norm(self, node: NodeProto, tensor: str, factor: Array) -> list[_Edit] | None:
        axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
        if axis != -1 or tensor != node.output[0]:
            return None
        edits = []
        for position in range(1, len(node.input)):
            value = self._vector(node, position, factor.size, exact=True)
            if value is None:
                return None
            edits.append(_Edit(node, position, value * factor))
        return edits or None

    def _into_product(self, node: NodeProto, factor: Array) -> list[_Edit] | None:
        if not _product(node, self.weights):
            return None
        weight, axis = self._weight(node.name)
        if weight.shape[1 - axis] != factor.size:
            return None
        edits = [_Edit(node, 1, weight * (factor[None, :] if axis == 0 else factor[:, None]))]
        if len(node.input) > 2 and node.input[2]:
            bias = self._vector(node, 2, factor.size)
            if bias is None:
                return None
            edits.append(_Edit(node, 2, bias * factor))
        return edits

    def _weight(self, node: str) -> tuple[Array, int]:
        found = self.nodes[node]
        return numpy_helper.to_array(self.weights[found.input[1]]).astype(np.float64), _row_axis(found)

    def _vector(self, node: NodeProto, position: int, channels: int, exact: bool = False) -> Array | None:
        """A constant input that is one number, or (only that if `exact`) one for each channel on the last axis."""
        tensor = self.weights.get(node.input[position])
        if tensor is None or any(d != 1 for d in tensor.dims[:-1]):
            return None
        if [*tensor.dims[-1:]] not in ([[channels]] if exact else [[], [1], [channels]]):
            return None
        return numpy_helper.to_array(tensor).astype(np.float64)

    def _add(self, name: str, value: Array) -> str:
        fresh = self._fresh(f"{name.split('_equalized', maxsplit=1)[0]}_equalized")
        tensor = numpy_helper.from_array(np.asarray(value, np.float32, order="C"), fresh)
        self.graph.initializer.append(tensor)
        self.weights[fresh] = tensor
        return fresh

    def _fresh(self, name: str) -> str:
        taken = {*self.weights, *self.producers, *self.readers, *(i.name for i in self.graph.input)}
        taken |= {name for node in nodes_of(self.graph.node) for name in node.output}
        taken |= {i.name for i in self.graph.initializer}
        return _unlike(name, taken)

    def _fresh_node(self, name: str) -> str:
        return _unlike(name, {*self.nodes})


def _unlike(name: str, taken: set[str]) -> str:
    found, count = name, 1
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    return found


def _product(node: NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2 or node.input[1] not in weights:
        return False
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return len(weights[node.input[1]].dims) == 2 and not transposed


def _row_axis(node: NodeProto) -> int:
    """The axis of a product's weight that runs over the channels of its input."""
    return 1 if any(a.name == "transB" and a.i for a in node.attribute) else 0
