"""Ranges of activations that a training learned: from the program that was trained to the ONNX graph that ships.

What training rounds has to be rounded in the engine by the same scale. So the ranges go with the graph, as an entry of
its metadata, until a quantizing step takes them in place of what calibration found. The exporter names values anew:
which tensor is which value of the program shows where both run on one input (`resolved`). Attention is one node in the
program: its inner products are found by their form, in the graph's order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from workers.artifacts import PROGRAM_FILE
from workers.graph.interpreter import open_session
from workers.graph.quantizable import follows_its_input

LEARNED_FILE = "learned_ranges.json"
_KEY = "anneal.learned_ranges"
_FORMAT = 1
_SAME = 1e-4  # of the largest number, by which a value may differ between the program and its ONNX graph
# What may stand between the products of an attention, beside its Softmax: scales, masks, casts.
_BETWEEN = frozenset({"Add", "Mul", "Div", "Where", "Cast", "Identity"})

Array = np.ndarray[Any, Any]
Limits = tuple[float, float]


def document(points: Collection[Mapping[str, Any]], attentions: Collection[Mapping[str, Limits]]) -> dict[str, Any]:
    """`points`: {value (node of the program), low, high}; `attentions`: {query, key, weights, value: (low, high)}, in
    the program's order."""
    return {"format": _FORMAT, "points": [*map(dict, points)], "attentions": [*map(dict, attentions)]}


def values_of(text: str) -> list[str]:
    """The values that have a range."""
    return [str(point["value"]) for point in json.loads(text)["points"]]


def resolved(text: str, values: Mapping[str, Array], model: Path, feeds: Mapping[str, Array]) -> str:
    """With `tensors` for each point: those of the model file that hold what the program's node held (`values`) on
    `feeds`. What is the same all over tells nothing, and gets none."""
    known = json.loads(text)
    asked = {p["value"]: v for p in known["points"] if np.ptp(v := values[p["value"]]) > 0} if values else {}
    found: dict[str, list[str]] = {name: [] for name in asked}
    for name, array in _every_float(model, feeds).items():
        for value, wanted in asked.items():
            if array.shape == wanted.shape and np.allclose(
                array, wanted, rtol=_SAME, atol=_SAME * np.abs(wanted).max()
            ):
                found[value].append(name)
    for point in known["points"]:
        point["tensors"] = found.get(point["value"], [])
    return json.dumps(known, allow_nan=False)


def _every_float(model: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every float32 tensor of the graph, its inputs too."""
    asked = onnx.load(model, load_external_data=False)
    floats = [v.name for v in asked.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    written = {o for n in asked.graph.node for o in n.output}
    have = {o.name for o in asked.graph.output}
    asked.graph.output.extend(onnx.ValueInfoProto(name=n) for n in floats if n in written and n not in have)
    path = model.with_name(f"every-{model.name}")  # external data is found beside it
    onnx.save(asked, path)
    try:
        session = open_session(path)
        names = [o.name for o in session.get_outputs() if o.type == "tensor(float)"]
        found = dict(zip(names, session.run(names, dict(feeds)), strict=True))
    finally:
        path.unlink()
    return {**{n: a for n, a in feeds.items() if a.dtype == np.float32}, **found}


def write(known: Mapping[str, Any], folder: Path) -> None:
    (folder / LEARNED_FILE).write_text(json.dumps(known, allow_nan=False) + "\n")


def read(folder: Path) -> str | None:
    """The content of the file beside a trained program; None where there is none."""
    path = folder / LEARNED_FILE
    return path.read_text() if path.is_file() and (folder / PROGRAM_FILE).is_file() else None


def attach(model: ModelProto, text: str | None) -> bool:
    """Let the graph carry them; None: nothing, and what it carried goes. Whether that changed the graph."""
    if text == attached(model):
        return False
    kept = [(p.key, p.value) for p in model.metadata_props if p.key != _KEY]
    del model.metadata_props[:]
    for key, value in [*kept, *([(_KEY, text)] if text is not None else [])]:
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    return True


def attached(model: ModelProto) -> str | None:
    return next((p.value for p in model.metadata_props if p.key == _KEY), None)


def of(model: ModelProto, source: ModelProto) -> dict[str, Limits]:
    """By tensor of `model`, those that `source`, which it was made of, carries. What cannot be found again is left out,
    and what an upload pretends to carry is read as numbers only."""
    text = attached(source)
    try:
        known = json.loads(text) if text is not None else {}
        points = [(p["tensors"], (float(p["low"]), float(p["high"]))) for p in known.get("points", ())]
        inner = [{n: (float(a), float(b)) for n, (a, b) in e.items()} for e in known.get("attentions", ())]
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    graph = _Graph(model)
    found: dict[str, Limits] = {}
    for tensors, limits in points:
        if _is_range(limits):
            found |= {str(name): limits for name in tensors if name in graph.tensors}
    attentions = list(graph.attentions())
    if len(attentions) == len(inner):
        for tensors, ranges in zip(attentions, inner, strict=True):
            found |= {tensors[n]: limits for n, limits in ranges.items() if n in tensors and _is_range(limits)}
    graph.follow(found)
    return found


def _is_range(limits: Limits) -> bool:
    return all(map(math.isfinite, limits)) and limits[0] <= 0.0 <= limits[1] and limits[0] < limits[1]


class _Graph:
    def __init__(self, model: ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.writers: dict[str, NodeProto] = {o: n for n in self.nodes for o in n.output if o}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.tensors = {*self.writers, *(i.name for i in model.graph.input)}

    def follow(self, found: dict[str, Limits]) -> None:
        """What only moves or picks values is rounded by the same scale behind it as before it."""
        for node in self.nodes:
            moved = follows_its_input(node.op_type) and node.op_type not in ("Relu", "Clip", "Resize", "Pad")
            if moved and node.input and node.input[0] in found:
                for name in node.output[:1] if node.op_type == "MaxPool" else node.output:
                    found.setdefault(name, found[node.input[0]])

    def attentions(self) -> Iterator[dict[str, str]]:
        """{query, key, weights, value: tensor} of every Softmax between two products of activations."""
        for node in self.nodes:
            if node.op_type != "Softmax":
                continue
            scores, weighted = self._before(node.input[0]), self._after(node.output[0])
            if scores is not None and weighted is not None:
                product, weights = weighted
                names = dict(zip(("query", "key"), scores.input, strict=True))
                yield {**names, "weights": weights, "value": product.input[1]}

    def _before(self, name: str) -> NodeProto | None:
        """The product whose result this is, masked or scaled."""
        for _ in range(6):
            node = self.writers.get(name)
            if node is None or node.op_type == "MatMul":
                return node
            if node.op_type not in _BETWEEN:
                return None
            inner = [n for n in node.input if self._leads_to_product(n)]
            if len(inner) != 1:
                return None
            (name,) = inner
        return None

    def _leads_to_product(self, name: str) -> bool:
        for _ in range(6):
            node = self.writers.get(name)
            if node is None or node.op_type not in _BETWEEN:
                return node is not None and node.op_type == "MatMul"
            name = next((n for n in node.input if n in self.writers), "")
        return False

    def _after(self, name: str) -> tuple[NodeProto, str] | None:
        """The product that reads it first, and by which name."""
        for _ in range(4):
            readers = self.readers.get(name, [])
            product = next((n for n in readers if n.op_type == "MatMul" and n.input[0] == name), None)
            if product is not None:
                return product, name
            onward = [n for n in readers if n.op_type in ("Where", "Cast", "Identity")]
            if len(onward) != 1:
                return None
            name = onward[0].output[0]
        return None
