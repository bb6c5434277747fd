"""sensitivity: how much quantizing each node hurts the model's outputs.

Inputs `model` (float32), `calibration` (a data set; for dynamic int8 random inputs do without one) and `ranges` (of an
earlier static quantization or conversion; made anew without). No output but `data`.

A node's error is that of the model's final outputs when this node alone is quantized and everything else computes in
float32. Groups of neighbouring nodes are measured first; then the worst group is split into its nodes, and the next
one, until every group that matters is split or the time is out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
from pydantic import Field

from workers.data import Samples, synthetic_feeds
from workers.graph import preconditions as shared
from workers.graph import quantizable as quantization
from workers.graph.calibrate import ranges
from workers.graph.calibrate import statistics as calibration
from workers.graph.interpreter import open_session
from workers.graph.onnx_files import MODEL_FILE, read_skeleton
from workers.graph.onnx_graph import model_specs
from workers.graph.onnxruntime_messages import runtime_failure
from workers.graph.prepare import prepare
from workers.graph.qdq import placement as qdq
from workers.graph.qdq import switch
from workers.graph.work import node_work
from workers.kernel import Stage, StageContext, StageOptions, StageResult
from workers.measure.accuracy import Kind, OutputComparison, normalized_error, output_kind
from workers.measure.axes import batch_axes, fixed_batch
from workers.measure.losses import rounded
from workers.measure.rows import count

BATCH = 8
BATCH_BYTES = 16 << 20
NEGLIGIBLE = 0.1  # a group whose joint error is below this share of the worst node's stays whole
WORST = 1e30  # stands for NaN and Infinity
METHOD = "final outputs with one group, then one node, quantized at a time (simulated Q/DQ, one session)"

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]


class SensitivityOptions(StageOptions):
    """What `quantize` (dynamic_int8, static_int8) or `convert` (int8, fp8) takes, and `max_groups`: how many groups of
    neighbouring nodes are measured before single nodes. `max_samples` are run for every group and node. `shapes`: for
    random inputs, where there is no data. `metric`: what the error is; by the kinds of the outputs, or what the job
    judges by."""

    recipe: Literal["dynamic_int8", "static_int8", "int8", "fp8"] = "static_int8"
    method: calibration.Method = "minmax"
    percentile: float = Field(default=99.99, gt=50, le=100)
    op_types: list[str] | None = Field(default=None, min_length=1)
    activations: Literal["uint8", "int8"] = "uint8"
    per_channel: bool = True
    reduce_range: bool = False
    exclude_nodes: list[str] = Field(default_factory=list)
    max_samples: int = Field(default=16, ge=1)
    max_groups: int = Field(default=16, ge=1)
    part: Literal["all", "calibration"] = "all"
    shapes: dict[str, dict[str, list[int]]] | None = None
    metric: Literal["auto", "normalized_error"] = "auto"


class Sensitivity(Stage[SensitivityOptions]):
    """See the module.

    data: nodes [{name, op_type, error, work, group, measured: "node" | "group" | "none"}], worst first (`error` of a
    node that was measured with its group is the group's; null where there was no time; `work`: of one sample, see
    `workers.graph.work`; null where its shapes are not known); groups [{id, nodes, error}];
    all_error (everything quantized); samples; complete (the time did not cut it short); runs; method; metric ("kl" |
    "cosine_loss" | "normalized_error" | "disagreement": what `error` is; of several outputs the worst).
    """

    name = "sensitivity"
    version = 4
    Options = SensitivityOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "onnx", "onnxruntime")
    weight: ClassVar[float] = 3.0

    def run(self, ctx: StageContext, options: SensitivityOptions) -> StageResult:
        source = ctx.inputs["model"] / MODEL_FILE
        shared.check_source(read_skeleton(source), options.exclude_nodes)
        samples = None
        if "calibration" in ctx.inputs:
            data_set = ctx.only_file("calibration")
            samples = shared.calibration_samples(data_set, source, options.part, options.max_samples)
        ctx.reporter.progress(0.02, "shape inference")
        prepared = prepare(source, ctx.workspace)
        skeleton = onnx.load(prepared, load_external_data=False)
        if options.recipe in ("int8", "fp8"):
            prepared = shared.in_opset(prepared, qdq.OPSET, ctx.workspace)
            skeleton = onnx.load(prepared, load_external_data=False)
            nodes, simulation = _by_convert(ctx, options, prepared, skeleton, samples)
        else:
            nodes, simulation = _by_quantize(ctx, options, prepared, skeleton, samples)
        if not nodes:
            raise shared.nothing_to_quantize("no node whose values have a finite range")
        path = prepared.with_name("switchable.onnx")
        switch.write(prepared, path, nodes, simulation)
        engine = _Engine(path, skeleton, samples, options)
        search = _Search(ctx, engine, nodes, options, node_work(prepared, engine.one_sample()))
        data = search.run()
        return StageResult(data=data, reusable=bool(data["complete"]))


def _by_quantize(
    ctx: StageContext,
    options: SensitivityOptions,
    prepared: Path,
    skeleton: onnx.ModelProto,
    samples: Samples | None,
) -> tuple[list[switch.Switchable], switch.Simulation]:
    recipe: Literal["dynamic_int8", "static_int8"] = (
        "dynamic_int8" if options.recipe == "dynamic_int8" else "static_int8"
    )
    op_types = shared.op_types_for(skeleton, options.op_types, options.exclude_nodes, recipe)
    found, unusable = switch.Ranges(), set[str]()
    if recipe == "static_int8":
        needed = calibration.calibratable(skeleton, op_types, options.exclude_nodes)
        found, unusable = _ranges(ctx, options, "static_int8", prepared, needed, samples)
    # Arithmetic of shapes among the op types (a Concat of sizes, say) is never rounded.
    other = {v.name for v in skeleton.graph.value_info if v.type.tensor_type.elem_type != onnx.TensorProto.FLOAT}
    without = [n.name for n in skeleton.graph.node if unusable & {*n.input, *n.output} or other & {*n.output}]
    nodes = switch.switchable(skeleton, op_types, [*options.exclude_nodes, *without], recipe)
    return nodes, switch.Simulation(
        recipe,
        found,
        options.activations == "int8",
        options.per_channel,
        options.reduce_range,
        quantization.rounds_outputs(op_types),
    )


def _by_convert(
    ctx: StageContext,
    options: SensitivityOptions,
    prepared: Path,
    skeleton: onnx.ModelProto,
    samples: Samples | None,
) -> tuple[list[switch.Switchable], switch.Simulation]:
    """Pairs where `convert` places them, symmetric, weights by channel. What the rest computes in is not simulated."""
    eight: qdq.Eight = "int8" if options.recipe == "int8" else "fp8"
    wanted = qdq.targets(skeleton, eight, options.op_types, options.exclude_nodes)
    if not wanted.nodes:
        raise shared.nothing_to_quantize(f"no product or convolution that {eight} suits")
    found, _ = _ranges(ctx, options, eight, prepared, wanted.tensors, samples)
    return switch.converted(skeleton, wanted, found), switch.Simulation(eight, found, True, True, False, False)


def _ranges(
    ctx: StageContext,
    options: SensitivityOptions,
    recipe: ranges.Recipe,
    prepared: Path,
    needed: Sequence[str],
    samples: Samples | None,
) -> tuple[switch.Ranges, set[str]]:
    """Of the `needed` tensors: (lowest and highest value by tensor, those without a finite range)."""
    if "ranges" in ctx.inputs:
        known = ranges.read_ranges(ctx.only_file("ranges"), recipe, needed)
        return ranges.limits(known), set(known["unusable"])
    found = ranges.calibrate(
        prepared,
        needed,
        samples,
        method=options.method,
        percentile=options.percentile,
        symmetric=recipe != "static_int8" or options.activations == "int8",
        progress=lambda fraction, message: ctx.reporter.progress(0.02 + 0.18 * fraction, message),
    )
    return dict(found.tensors), set(found.unusable)


class _Engine:
    """The switchable model: its outputs with some of the nodes quantized."""

    def __init__(
        self, path: Path, model: onnx.ModelProto, samples: Samples | None, options: SensitivityOptions
    ) -> None:
        try:
            self._session = open_session(path)
        except Exception as error:  # the runtime raises its own classes, RuntimeError and ValueError
            raise runtime_failure(
                "sensitivity_failed", error, remedy="Check that ONNX Runtime runs the model."
            ) from error
        self.names = [o.name for o in model.graph.output]
        self._inputs = model_specs(model)[0]
        self._samples, self._options = samples, options
        self._axes, self._fixed = batch_axes(self._inputs), fixed_batch(self._inputs)
        self.runs = 0

    def outputs(self, feeds: Arrays, rows: int, switches: Array) -> Arrays:
        try:
            values = self._session.run(self.names, {**feeds, switch.SWITCHES: switches})
        except Exception as error:  # as above
            raise runtime_failure(
                "sensitivity_failed", error, remedy="Check that the model runs on this data."
            ) from error
        self.runs += 1
        padded = count(feeds, self._axes)
        return {
            name: value[:rows] if rows < padded and value.ndim and value.shape[0] == padded else value
            for name, value in zip(self.names, values, strict=True)
        }

    def one_sample(self) -> Arrays:
        """The inputs with one sample, or the fixed batch."""
        size = self._fixed or 1
        if self._samples is None:
            return synthetic_feeds(self._inputs, size, self._options.shapes, 0)
        return next(self._samples.batches(size)).filled(size)

    def batches(self) -> Iterator[tuple[Arrays, int]]:
        """Inputs with their number of real samples."""
        if self._samples is None:
            each = self._fixed or min(BATCH, self._options.max_samples)
            for seed in range(-(-self._options.max_samples // each)):
                yield synthetic_feeds(self._inputs, each, self._options.shapes, seed), each
            return
        one = next(self._samples.batches(1)).feeds
        size = max(1, sum(a.nbytes for a in one.values()))
        batch = self._fixed or int(min(BATCH, max(1, BATCH_BYTES // size)))
        for found in self._samples.batches(batch):
            yield found.filled(self._fixed or len(found)), len(found)


@dataclass
class _Group:
    """Nodes that are quantized together, by index, and what was seen of it."""

    id: int
    members: list[int]
    seen: dict[str, OutputComparison] = field(default_factory=dict)

    def add(self, expected: Arrays, actual: Arrays, kinds: dict[str, Kind], rows: int) -> None:
        for name, kind in kinds.items():
            self.seen.setdefault(name, OutputComparison(name, kind)).add(expected[name], actual[name], rows)

    def error(self, metric: str) -> float | None:
        """The worst output's figure; None where nothing was run."""
        values = [_figure(c, metric) for c in self.seen.values()]
        found = [v for v in values if v is not None]
        return max(found) if found else None


def _figure(seen: OutputComparison, metric: str) -> float | None:
    if (seen.kind is Kind.EXACT) != (metric == "disagreement"):
        return None
    if metric == "disagreement":
        value = 1.0 - float(seen.column("agreement").mean())
    elif metric == "kl":
        value = float(seen.column("kl").mean())
    elif metric == "cosine_loss":
        value = 1.0 - float(seen.column("cosine").mean())
    else:
        value = normalized_error(seen.column("squared_error").sum(), seen.column("squared_norm").sum())
    return rounded(max(0.0, value)) if np.isfinite(value) else WORST


class _Search:
    def __init__(
        self,
        ctx: StageContext,
        engine: _Engine,
        nodes: Sequence[switch.Switchable],
        options: SensitivityOptions,
        work: Mapping[str, float],
    ) -> None:
        self.ctx, self.engine, self.nodes, self.work = ctx, engine, nodes, work
        self.wanted = options.metric
        count = min(options.max_groups, len(nodes))
        edges = [round(i * len(nodes) / count) for i in range(count + 1)]
        self.groups = [_Group(i, [*range(a, b)]) for i, (a, b) in enumerate(pairwise(edges))]
        self.everything = _Group(-1, [*range(len(nodes))])
        self.singles: dict[int, _Group] = {}
        self.kinds: dict[str, Kind] = {}
        self.samples = 0
        self.complete = True

    def run(self) -> dict[str, Any]:
        self.samples = self._measure([self.everything, *self.groups])
        metric = self._metric()
        left = sorted(self.groups, key=lambda g: (-(g.error(metric) or 0.0), g.id))
        for done, group in enumerate(left):
            if not self.complete:
                break
            worst = max((s.error(metric) or 0.0 for s in self.singles.values()), default=0.0)
            if len(group.members) == 1:
                self.singles[group.members[0]] = group
            elif (group.error(metric) or 0.0) >= NEGLIGIBLE * worst:
                found = [_Group(group.id, [index]) for index in group.members]
                self._measure(found)
                self.singles |= {s.members[0]: s for s in found}
            self.ctx.reporter.progress(0.4 + 0.6 * (done + 1) / len(left), "single nodes")
        return self._data(metric)

    def _measure(self, groups: Sequence[_Group]) -> int:
        """Run each group on every batch; the number of samples. Stops where the time is out."""
        total = 0
        for feeds, rows in self.engine.batches():
            expected = self.engine.outputs(feeds, rows, np.zeros(len(self.nodes), bool))
            if not self.kinds:
                self.kinds = {name: output_kind(name, value) for name, value in expected.items()}
            for group in groups:
                if self.ctx.seconds_left() <= 0:
                    self.complete = False
                    return total
                switches = np.zeros(len(self.nodes), bool)
                switches[group.members] = True
                group.add(expected, self.engine.outputs(feeds, rows, switches), self.kinds, rows)
            total += rows
        return total

    def _metric(self) -> str:
        kinds = {kind for kind in self.kinds.values() if kind is not Kind.EXACT}
        if not kinds:
            return "disagreement"
        if self.wanted != "auto":
            return self.wanted
        by_kind = {Kind.LOGITS: "kl", Kind.EMBEDDING: "cosine_loss"}
        return by_kind.get(min(kinds), "normalized_error") if len(kinds) == 1 else "normalized_error"

    def _data(self, metric: str) -> dict[str, Any]:
        entries = []
        for group in self.groups:
            joint = group.error(metric)
            for index in group.members:
                single = self.singles.get(index)
                own = single.error(metric) if single is not None else None
                how = "node" if own is not None else "none" if joint is None else "group"
                node = self.nodes[index]
                entries.append(
                    {
                        "name": node.name,
                        "op_type": node.op_type,
                        "error": joint if own is None else own,
                        "work": self.work.get(node.name),
                        "group": group.id,
                        "measured": how,
                    }
                )
        entries.sort(key=lambda e: -1.0 if e["error"] is None else float(e["error"]), reverse=True)
        groups = [
            {"id": g.id, "nodes": [self.nodes[i].name for i in g.members], "error": g.error(metric)}
            for g in self.groups
        ]
        return {
            "nodes": entries,
            "groups": groups,
            "all_error": self.everything.error(metric),
            "samples": self.samples,
            "complete": self.complete,
            "runs": self.engine.runs,
            "method": METHOD,
            "metric": metric,
        }
