"""simplify: constant folding, dead code and fusions, kept only where the function stays the same. A model in an opset
that no quantizing pass takes is raised to one that they do.

Input `model`, output `model`. Every step is compared with the graph before it on random inputs; a step that crashes,
changes an input or output, or changes a result is undone, and `data["fell_back"]` says which and why.

With `fusions` false the output is standard ONNX for every backend. With `fusions` true a recognised transformer also
gets ONNX Runtime's contrib ops, which only that runtime executes (`data["contrib_ops"]`); attention that ONNX Runtime's
own optimizer does not see is found and fused by us, each held against what it replaces (`data["attention"]`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import onnx
from onnx import ModelProto

from workers.artifacts import ONNX
from workers.candidates import StepPart
from workers.graph import learned_ranges
from workers.graph.equivalence import (
    ABSOLUTE_TOLERANCE,
    RELATIVE_TOLERANCE,
    EquivalenceCheck,
)
from workers.graph.fuse import attention
from workers.graph.fuse import transformers as fusion
from workers.graph.interpreter import optimized
from workers.graph.onnx_files import MODEL_FILE, files_of, load_model, save_model, size_of
from workers.graph.onnx_graph import STANDARD_DOMAINS, all_nodes, opset_of
from workers.graph.preconditions import OLDEST_OPSET
from workers.graph.rewriting import raise_opset, restore_interface
from workers.kernel import Stage, StageContext, StageOptions, StageResult

LARGEST_IN_MEMORY = 2_000_000_000  # bytes; the simplifiers pass whole models through one protobuf (2 GiB at most)
_NAMED, _LISTED = 4, 32  # nodes in the report
LARGEST_FOLDED_CONSTANT = 64 << 20  # bytes; folding must not turn a small file into a huge one


class SimplifyOptions(StageOptions):
    """`shapes`: the job's min/opt/max by input, for the sizes of the random inputs; None = defaults."""

    fusions: bool = False
    shapes: dict[str, dict[str, list[int]]] | None = None


class Simplify(Stage[SimplifyOptions]):
    """See the module. `data`: nodes_before, nodes_after, fusions, at_load, fell_back, max_abs_diff, tolerance, …"""

    name = "simplify"
    version = 6
    Options = SimplifyOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "onnx", "onnxslim", "onnxruntime")
    gives: ClassVar[Mapping[str, str]] = {"model": ONNX}
    reported: ClassVar[tuple[str, ...]] = (
        "nodes_before",
        "nodes_after",
        "fusions",
        "attention",
        "at_load",
        "fell_back",
    )

    @classmethod
    def part(cls, options: Mapping[str, Any]) -> StepPart:
        if options.get("fusions"):
            return StepPart("transformer fusions", {**options, "fusions": False})
        return StepPart("ONNX simplification")

    def run(self, ctx: StageContext, options: SimplifyOptions) -> StageResult:
        source = ctx.inputs["model"]
        size = size_of(source)
        if size > LARGEST_IN_MEMORY:
            return _unchanged(ctx, source, f"larger than 2 GB ({size} bytes): the simplifiers cannot hold it in memory")
        original = load_model(source / MODEL_FILE)
        ctx.reporter.progress(0.05, "reference outputs")
        check = EquivalenceCheck(original, options.shapes, ctx.workspace)
        steps = _Steps(original, check)
        if opset_of(original) < OLDEST_OPSET:
            steps.attempt("newer opset", lambda: [raise_opset(original, OLDEST_OPSET)], newer_opset=True)
            original = check.original = steps.model
        ctx.reporter.progress(0.2, "constant folding and dead code")
        if not steps.attempt("onnxslim", lambda: [_slimmed(original)]):
            steps.attempt("ONNX Runtime's folding", lambda: _folded(original, ctx.workspace))
        architecture, found = None, None
        if options.fusions:
            ctx.reporter.progress(0.6, "transformer fusions")
            architecture = fusion.recognise(steps.model) or fusion.recognise(original)
            slim = steps.model
            if architecture is not None:
                steps.attempt("transformer fusions", lambda: _fused([slim, original], architecture))
            ctx.reporter.progress(0.75, "attention")
            found = _attention(steps, [slim, original])
            if architecture is None and found is not None:
                steps.attempt("transformer fusions", lambda: _fused([steps.model], None))
        save_model(steps.model, ctx.output("model"))
        ctx.reporter.progress(0.9, "what the runtime fuses at load")
        at_load = _fused_at_load(ctx.output("model") / MODEL_FILE, ctx.workspace)
        if steps.fell_back:
            ctx.reporter.note("A simplification was given up.", reason="; ".join(steps.fell_back))
        data = _data(original, steps.model, at_load)
        data |= {
            "fell_back": "; ".join(steps.fell_back) or None,
            "steps": steps.kept,
            "max_abs_diff": steps.max_abs_diff,
            "architecture": architecture.to_json() if architecture else None,
            "attention": found,
            "compared": {"inputs": len(check.feeds), "batch_sizes": check.batch_sizes},
        }
        return StageResult(outputs=["model"], data=data)


def _data(before: ModelProto, after: ModelProto, at_load: Mapping[str, int] | None) -> dict[str, Any]:
    fusions = fusion.count_fused(before, after)
    fusions["conv+relu"] = (at_load or {}).get("conv+relu", 0)
    return {
        "nodes_before": len(before.graph.node),
        "nodes_after": len(after.graph.node),
        "fusions": fusions,
        "at_load": None if at_load is None else dict(at_load),
        "contrib_ops": fusion.uses_contrib_ops(after),
        "tolerance": {"relative_to_max_abs": RELATIVE_TOLERANCE, "absolute": ABSOLUTE_TOLERANCE},
    }


def _unchanged(ctx: StageContext, source: Path, reason: str) -> StageResult:
    out = ctx.output("model")
    for file in files_of(source):
        shutil.copyfile(file, out / file.name)  # onnx refuses external data with a second hard link
    ctx.reporter.note("The model is not simplified.", reason=reason)
    model = onnx.load(source / MODEL_FILE, load_external_data=False)
    data = _data(model, model, None)
    data |= {"fell_back": reason, "steps": [], "max_abs_diff": 0.0, "architecture": None}
    data |= {"attention": None, "compared": None}
    return StageResult(outputs=["model"], data=data)


def _slimmed(original: ModelProto) -> ModelProto:
    import onnxslim

    slim = onnxslim.slim(_copy(original), size_threshold=LARGEST_FOLDED_CONSTANT)
    if not isinstance(slim, ModelProto):
        raise TypeError("onnxslim returned no model")
    slim.ir_version = original.ir_version
    slim.producer_name, slim.producer_version = original.producer_name, original.producer_version
    return slim


def _attention(steps: _Steps, before: Sequence[ModelProto]) -> dict[str, Any] | None:
    """Fuse what attention is left in the graph so far; what was found, for the report."""
    if not steps.check.feeds:
        return None
    fused = attention.fuse(steps.model, steps.check.outputs, before)
    if not fused.count and not fused.left:
        return None
    steps.fell_back += [f"attention at {node}: {reason}" for node, reason in list(fused.undone.items())[:_NAMED]]
    if len(fused.undone) > _NAMED:
        steps.fell_back.append(f"attention at {len(fused.undone) - _NAMED} more nodes")
    kept = bool(fused.count) and steps.attempt("attention", lambda: [fused.model])
    count, causal = (fused.count, fused.causal) if kept else (0, 0)
    return {"fused": count, "causal": causal, "left": dict(list(fused.left.items())[:_LISTED])}


def _folded(original: ModelProto, workspace: Path) -> list[ModelProto]:
    """What is left where onnxslim gives up: constants and batch norms folded by ONNX Runtime, in branches and loop
    bodies too, as its `quant_pre_process` does it. None where its own operators came in: other backends lack them."""
    folder = workspace / "folded"
    folder.mkdir()
    made = onnx.load(optimized(save_model(original, folder), folder / "optimized.onnx"))
    domains = {node.domain for node in all_nodes(made)}
    if not domains <= {node.domain for node in all_nodes(original)} | STANDARD_DOMAINS:
        return []
    del made.opset_import[:]
    made.opset_import.extend(original.opset_import)
    made.ir_version = original.ir_version
    made.producer_name, made.producer_version = original.producer_name, original.producer_version
    return [made]


def _fused(sources: Sequence[ModelProto], architecture: fusion.Transformer | None) -> list[ModelProto]:
    """Fused graphs, best first. The slimmed graph is smaller, but merged nodes may hide a pattern (a mask's Unsqueezes)
    that still stands in the original, so both are tried and the one with more attention fused goes first."""
    candidates = []
    for source in sources:
        fused = fusion.fuse(_copy(source), architecture)
        if fusion.uses_contrib_ops(fused):
            candidates.append((-fusion.count_fused(source, fused)["attention"], len(fused.graph.node), fused))
    if not candidates:
        return []
    return [c[2] for c in sorted(candidates, key=lambda c: c[:2])]


def _fused_at_load(model: Path, workspace: Path) -> dict[str, int] | None:
    try:
        return fusion.fused_at_load(model, workspace)
    except Exception:
        return None  # only a figure for the report; whether the model loads is another stage's finding


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


@dataclass
class _Steps:
    """The graph so far, and what became of each attempted step."""

    model: ModelProto
    check: EquivalenceCheck
    kept: list[str] = field(default_factory=list)
    fell_back: list[str] = field(default_factory=list)
    max_abs_diff: float = 0.0

    def attempt(self, step: str, make: Callable[[], Sequence[ModelProto]], *, newer_opset: bool = False) -> bool:
        """Take the first of the graphs from `make` that is equivalent to the original; keep the graph before otherwise.
        No graph at all means that there was nothing to do. Whether one was taken. `newer_opset`: whether they may
        import another one."""
        try:
            candidates = make()
        except MemoryError:
            raise  # a fact about this worker, not about the model: it must not be cached as a fall-back
        except Exception as error:
            self.fell_back.append(f"{step}: {type(error).__name__}: {str(error)[:300]}")
            return False
        reasons = []
        for candidate in candidates:
            restore_interface(candidate, self.check.original)
            learned_ranges.attach(candidate, learned_ranges.attached(self.check.original))
            difference, reason = self.check.compare(candidate, newer_opset=newer_opset)
            if reason is None:
                self.model = candidate
                self.max_abs_diff = difference
                self.kept.append(step)
                return True
            reasons.append(reason)
        if reasons:
            self.fell_back.append(f"{step}: {reasons[0]}")
        return False
