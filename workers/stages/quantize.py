"""quantize: a copy of the model in fewer bits.

Inputs `model`, and for static int8 `calibration` (a data set) or `ranges` (what an earlier calibration found). Outputs
`model`, and for static int8 `ranges`. Recipes: dynamic_int8, static_int8 (Q/DQ). Ranges that the model's training
learned (`workers.graph.learned_ranges`) take the place of what calibration finds.

The result is loaded and run once, and its quantized nodes are counted: a "quantized" model without any, or one that
does not run, is a failure of the candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
from onnx import ModelProto
from pydantic import Field

from app.domain.failures import StageFailure, model_failure
from workers.artifacts import ONNX
from workers.candidates import Rounding, StepPart
from workers.data import Samples, synthetic_feeds
from workers.graph import int8, learned_ranges
from workers.graph import preconditions as shared
from workers.graph import quantizable as quantization
from workers.graph.calibrate import ranges
from workers.graph.calibrate import statistics as calibration
from workers.graph.onnx_files import MODEL_FILE, load_model, read_skeleton, save_model, size_of
from workers.graph.onnx_graph import model_specs
from workers.graph.onnxruntime_messages import clean_message
from workers.graph.prepare import prepare
from workers.graph.rewriting import restore_interface
from workers.kernel import Stage, StageContext, StageOptions, StageResult, runner_of
from workers.measure.axes import fixed_batch

Arrays = dict[str, np.ndarray[Any, Any]]


class QuantizeOptions(StageOptions):
    """`op_types`: None = by architecture. `method`, `percentile`, `max_samples` and `part` say how to calibrate;
    `activations` is uint8 on x86 and int8 (symmetric) for TensorRT; `reduce_range` gives weights seven bits, for CPUs
    without VNNI. `exclude_nodes` stay as they are. `shapes`: min/opt/max by input, for the trial run."""

    recipe: Literal["dynamic_int8", "static_int8"]
    method: calibration.Method = "minmax"
    percentile: float = Field(default=99.99, gt=50, le=100)
    op_types: list[str] | None = Field(default=None, min_length=1)
    activations: Literal["uint8", "int8"] = "uint8"
    per_channel: bool = True
    reduce_range: bool = False
    exclude_nodes: list[str] = Field(default_factory=list)
    max_samples: int = Field(default=512, ge=1)
    part: Literal["all", "calibration"] = "all"
    shapes: dict[str, dict[str, list[int]]] | None = None


class Quantize(Stage[QuantizeOptions]):
    """See the module. `data`: recipe, qdq_by_op, quantized_nodes, op_types, excluded_nodes, calibration, …"""

    name = "quantize"
    version = 3
    Options = QuantizeOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "onnx", "onnxruntime")
    gives: ClassVar[Mapping[str, str]] = {"model": ONNX}
    weight: ClassVar[float] = 2.0
    rounds: ClassVar[bool] = True
    reuses: ClassVar[Mapping[str, str]] = {"ranges": "ranges"}
    reported: ClassVar[tuple[str, ...]] = ("qdq_by_op", "quantized_nodes", "excluded_nodes", "calibration")

    @classmethod
    def rounding(cls, options: Mapping[str, Any]) -> Rounding | None:  # noqa: ARG003
        return Rounding(("percentile", "entropy", "mse"), in_onnx=True)

    @classmethod
    def part(cls, options: Mapping[str, Any]) -> StepPart:
        return StepPart(f"quantization ({str(options['recipe']).replace('_', ' ')})")

    def run(self, ctx: StageContext, options: QuantizeOptions) -> StageResult:
        source = ctx.inputs["model"] / MODEL_FILE
        shared.check_source(read_skeleton(source), options.exclude_nodes)
        samples = None
        if "calibration" in ctx.inputs:
            data_set = ctx.only_file("calibration")
            samples = shared.calibration_samples(data_set, source, options.part, options.max_samples)
        ctx.reporter.progress(0.02, "shape inference")
        prepared = prepare(source, ctx.workspace)
        if options.recipe == "static_int8":
            model, data = _static(ctx, options, prepared, samples)
        else:
            model, data = _dynamic(ctx, options, prepared)
        restore_interface(model, read_skeleton(source))
        learned_ranges.attach(model, None)
        out = ctx.output("model")
        save_model(model, out)
        del model
        ctx.reporter.progress(0.9, "trial run")
        data |= _trial_run(ctx, options, out, samples)
        data |= {
            "recipe": options.recipe,
            "quantized_nodes": sum(data["qdq_by_op"].values()),
            "size_bytes_before": size_of(ctx.inputs["model"]),
            "size_bytes": size_of(out),
        }
        outputs = ["model", "ranges"] if options.recipe == "static_int8" else ["model"]
        return StageResult(outputs=outputs, data=data)


def _dynamic(ctx: StageContext, options: QuantizeOptions, prepared: Path) -> tuple[ModelProto, dict[str, Any]]:
    skeleton = onnx.load(prepared, load_external_data=False)
    op_types = shared.op_types_for(skeleton, options.op_types, options.exclude_nodes, "dynamic_int8")
    ctx.reporter.progress(0.2, "weights to int8")
    model = _made(
        ctx.workspace,
        lambda out: int8.dynamic_int8(
            prepared,
            out,
            op_types=op_types,
            excluded=options.exclude_nodes,
            per_channel=options.per_channel,
            reduce_range=options.reduce_range,
        ),
    )
    data = {"op_types": sorted(op_types), "excluded_nodes": sorted(options.exclude_nodes), "calibration": None}
    return model, data | {"qdq_by_op": _counted(model, op_types, options.exclude_nodes)}


def _static(
    ctx: StageContext, options: QuantizeOptions, prepared: Path, samples: Samples | None
) -> tuple[ModelProto, dict[str, Any]]:
    skeleton = onnx.load(prepared, load_external_data=False)
    op_types = shared.op_types_for(skeleton, options.op_types, options.exclude_nodes, "static_int8")
    trained = learned_ranges.of(skeleton, read_skeleton(ctx.inputs["model"] / MODEL_FILE))
    if "ranges" in ctx.inputs:
        needed = calibration.calibratable(skeleton, op_types, options.exclude_nodes)
        known = ranges.read_ranges(ctx.only_file("ranges"), "static_int8", needed)
    else:
        found = ranges.calibrate(
            prepared,
            ranges.calibrated_tensors("static_int8", skeleton, op_types),
            samples,
            method=options.method,
            percentile=options.percentile,
            symmetric=options.activations == "int8",
            progress=lambda fraction, message: ctx.reporter.progress(0.1 + 0.6 * fraction, message),
        )
        assert samples is not None
        known = ranges.document("static_int8", found, samples, options.method, options.percentile, trained)
    ranges.write_ranges(known, ctx.output("ranges"))
    unusable = set(known["unusable"])
    untouchable = [n.name for n in skeleton.graph.node if unusable & {*n.input, *n.output} and n.op_type in op_types]
    if untouchable:
        ctx.reporter.note("Some nodes stay in float32: their values have no finite range.", nodes=untouchable[:20])
    excluded = sorted({*options.exclude_nodes, *untouchable})
    ctx.reporter.progress(0.75, "Q/DQ nodes")
    model = _made(
        ctx.workspace,
        lambda out: int8.static_int8(
            prepared,
            out,
            ranges=ranges.limits(known),
            op_types=op_types,
            excluded=excluded,
            activations=options.activations,
            per_channel=options.per_channel,
            reduce_range=options.reduce_range,
        ),
    )
    facts = {key: known[key] for key in ("method", "percentile", "samples", "dataset")}
    facts |= {"tensors": len(known["tensors"]), "reused": "ranges" in ctx.inputs}
    facts["learned"] = len(trained.keys() & known["tensors"].keys())
    data = {"op_types": sorted(op_types), "excluded_nodes": excluded, "calibration": facts}
    return model, data | {"qdq_by_op": _counted(model, op_types, excluded)}


def _made(workspace: Path, make: Callable[[Path], None]) -> ModelProto:
    """The model that the quantizer writes; what it raises becomes `quantizer_failed`."""
    folder = workspace / "quantized"
    folder.mkdir()
    try:
        make(folder / MODEL_FILE)
    except (MemoryError, StageFailure):
        raise
    except Exception as error:  # the quantizer raises ValueError, RuntimeError, KeyError, AssertionError, …
        raise model_failure(
            "quantizer_failed",
            f"The quantizer does not take this model: {type(error).__name__}: {clean_message(error)}",
            remedy="Use another precision for this model.",
        ) from error
    return load_model(folder / MODEL_FILE)


def _counted(model: ModelProto, op_types: Collection[str], excluded: Collection[str]) -> dict[str, int]:
    counts = quantization.count_quantized(model, op_types, excluded)
    if not quantization.computes_on_integers(counts):
        raise model_failure(
            "not_quantized",
            "The quantizer left every convolution and matrix product in floating point.",
            remedy="Use another precision for this model.",
        )
    return counts


def _trial_run(ctx: StageContext, options: QuantizeOptions, made: Path, samples: Samples | None) -> dict[str, Any]:
    """Load the artifact and run it once. Where the original does not take the same inputs either, nothing is known."""
    backend = runner_of(ONNX)
    graph = read_skeleton(made / MODEL_FILE)
    inputs = model_specs(graph)[0]
    batch = fixed_batch(inputs) or 1
    if samples is not None:
        feeds = next(samples.batches(batch)).filled(batch)
    else:
        feeds = synthetic_feeds(inputs, batch, options.shapes, seed=0)
    try:
        session = backend.load(made, {})
        outputs = session.run(feeds)
    except StageFailure as failure:
        if not failure.cacheable:
            raise
        if failure.code == "inference_failed" and not _original_runs(ctx, feeds):
            ctx.reporter.note("The trial run tells nothing: the original does not take the generated inputs either.")
            return {"trial_run": None}
        raise model_failure(
            "quantized_model_fails",
            f"The quantized model does not run: {failure.detail}",
            node=failure.node,
            remedy="Use another precision for this model, or exclude the node.",
        ) from failure
    finite = all(bool(np.isfinite(v).all()) for v in outputs.values() if v.dtype.kind == "f")
    return {"trial_run": {"batch": batch, "finite": finite}}


def _original_runs(ctx: StageContext, feeds: Arrays) -> bool:
    try:
        runner_of(ONNX).load(ctx.inputs["model"], {}).run(feeds)
    except StageFailure:
        return False
    return True
