"""Attention that exporters spell out becomes ONNX Runtime's fused operator, where that changes no value.

Each fusion is held against what it replaces, on what reaches it in the model itself: the graph runs with both side by
side. One that differs, or that does not run, is left out, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from app.domain.failures import StageFailure
from workers.graph.fuse.attention_causal import is_causal
from workers.graph.fuse.attention_dims import inferred
from workers.graph.fuse.attention_emit import Emitter, Fusion
from workers.graph.fuse.attention_match import find
from workers.graph.fuse.attention_view import View
from workers.graph.onnx_graph import CONTRIB_DOMAIN, reads
from workers.graph.rewriting import drop_unused, replace_nodes

Arrays = Mapping[str, np.ndarray[Any, Any]]
Run = Callable[[ModelProto], Sequence[Arrays]]

# Of the largest magnitude: the same sums in another order differ by less, another scale or mask by more.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Fused:
    """`model`: with `count` attentions fused, `causal` of them by the operator's own causal mask. `left`: why others
    were left as they are, by node; `undone`: those of them whose fusion was tried and changed a value."""

    model: ModelProto
    count: int
    causal: int
    left: Mapping[str, str]
    undone: Mapping[str, str]


def fuse(model: ModelProto, run: Run, before: Sequence[ModelProto] = ()) -> Fused:
    """`model` with its attentions fused; it is not changed. `run` answers a model's outputs on some inputs; `before`:
    the same graph before other fusions, behind whose operators ONNX infers no shapes."""
    dims, types = inferred(model, *before)
    view = View(model, dims, types)
    cores, left = find(view)
    if not cores:
        return Fused(model, 0, 0, left, {})
    emitter = Emitter(view)
    fusions = []
    causal = set()
    for core in sorted(cores, key=lambda c: c.anchor):
        plain = is_causal(view, core)
        fusions.append(emitter.fuse(core, causal=plain))
        if plain or core.causal:
            causal.add(core.label)
    undone: dict[str, str] = {}
    good = _proven(model, fusions, run, undone)
    fused = _with(model, fusions, good) if good else model
    return Fused(fused, len(good), len(causal & good), {**left, **undone}, undone)


def _proven(model: ModelProto, fusions: Sequence[Fusion], run: Run, undone: dict[str, str]) -> set[str]:
    """Labels of the fusions that change nothing; the others and their faults go to `undone`."""
    good = set()
    labels = [f.label for f in fusions]
    waiting = [labels]
    while waiting:
        tried = waiting.pop()
        try:
            answers = run(_twins(model, fusions, set(tried)))
        except (StageFailure, ValueError) as failure:
            if isinstance(failure, StageFailure) and not failure.cacheable:
                raise  # a fact about this worker, not about the model
            if len(tried) == 1:
                undone[tried[0]] = f"the fused operator does not run: {' '.join(str(failure).split())[:200]}"
            else:
                middle = len(tried) // 2
                waiting += [tried[middle:], tried[:middle]]
            continue
        for fusion in (f for f in fusions if f.label in tried):
            fault = _fault(fusion, answers)
            if fault is None:
                good.add(fusion.label)
            else:
                undone[fusion.label] = fault
    return good


def _fault(fusion: Fusion, answers: Sequence[Arrays]) -> str | None:
    """How the fusion's output differs from what it replaces. Where the original is no number, the fusion may be one."""
    if not answers:
        return "it could not be compared: the model does not run on random inputs"
    for answer in answers:
        wanted, made = answer[fusion.out].astype(np.float64), answer[fusion.made].astype(np.float64)
        if wanted.shape != made.shape:
            return f"its shape is {list(made.shape)} in the place of {list(wanted.shape)}"
        finite = np.isfinite(wanted)
        if not finite.any():
            continue
        difference = float(np.abs(np.where(finite, wanted - made, 0.0)).max())
        limit = _TOLERANCE * float(np.abs(wanted[finite]).max()) + 1e-7
        if not difference <= limit:
            return f"its output differs by {difference:.3g}, more than {limit:.3g}"
    return None


def _inserted(model: ModelProto, fusions: Sequence[Fusion]) -> ModelProto:
    """A copy with the nodes of these fusions before what they replace, which still stands. What several share is made
    by the first of all fusions, so the nodes of the others stay too, and are dropped where nothing reads them."""
    made = ModelProto()
    made.CopyFrom(model)
    before: dict[int, list[Any]] = {}
    for fusion in fusions:
        before.setdefault(fusion.anchor, []).extend(fusion.nodes)
    nodes = []
    for index, node in enumerate(model.graph.node):
        nodes += [*before.get(index, ()), node]
    replace_nodes(made.graph, nodes)
    names = {t.name for t in made.graph.initializer}
    for fusion in fusions:
        for name, tensor in fusion.tensors.items():
            if name not in names:
                names.add(name)
                made.graph.initializer.append(tensor)
    if CONTRIB_DOMAIN not in {o.domain for o in made.opset_import}:
        made.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
    return made


def _twins(model: ModelProto, fusions: Sequence[Fusion], labels: set[str]) -> ModelProto:
    """The model with these fusions beside what they would replace, and both of each as its only outputs."""
    twins = _inserted(model, fusions)
    del twins.graph.output[:]
    seen = set()
    for fusion in fusions:
        if fusion.label in labels:
            for name in (fusion.out, fusion.made):
                if name not in seen:
                    seen.add(name)
                    twins.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    _prune(twins)
    return twins


def _with(model: ModelProto, fusions: Sequence[Fusion], good: set[str]) -> ModelProto:
    """The model with these fusions in the place of what they replace."""
    made = _inserted(model, fusions)
    renamed = {f.made: f.out for f in fusions if f.label in good}
    replaced = set(renamed.values())
    nodes = []
    for node in made.graph.node:
        if replaced.intersection(node.output):
            continue
        for position, name in enumerate(node.output):
            node.output[position] = renamed.get(name, name)
        nodes.append(node)
    replace_nodes(made.graph, nodes)
    _prune(made)
    return made


def _prune(model: ModelProto) -> None:
    """Drop the nodes and constants that no output needs."""
    needed = {o.name for o in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed |= set(reads(node))
    replace_nodes(model.graph, reversed(kept))
    drop_unused(model.graph)
    made = {name for node in kept for name in node.output}
    values = [v for v in model.graph.value_info if v.name in made]
    del model.graph.value_info[:]
    model.graph.value_info.extend(values)
