"""convert: a copy of the model whose precision is explicit, as TensorRT 11 and other GPU libraries want it.

Inputs `model`, and `calibration` (a data set) for int8 and fp8, where it says how much to clip int4, and which values
float16 cannot hold. Outputs `model`, and for int8 and fp8 `ranges`, what the calibration found: as input `ranges` it
replaces the data. Recipes: fp16, bf16 (arithmetic in 16 bits), int8 and fp8 (Q/DQ by TensorRT's rules), int4
(weight-only, in blocks). Inputs and outputs keep their names and types.

Nodes are counted by op type: a model "converted" in none is a failure. The result runs once on ONNX Runtime's CPU
provider beside the original, and how alike the outputs are is told (bfloat16 by a graph that rounds alike).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
from onnx import ModelProto
from pydantic import Field

from app.domain.failures import StageFailure, model_failure
from workers.artifacts import ONNX
from workers.candidates import Rounding
from workers.data import Samples, synthetic_feeds
from workers.graph import learned_ranges, rewriting
from workers.graph import preconditions as shared
from workers.graph.calibrate import ranges
from workers.graph.calibrate import statistics as calibration
from workers.graph.fuse import transformers as fusion
from workers.graph.onnx_files import MODEL_FILE, read_skeleton, save_model, size_of
from workers.graph.onnx_graph import model_specs, opset_of
from workers.graph.onnxruntime_messages import runtime_failure
from workers.graph.precision import awq, explicit, floats, int4, measure
from workers.graph.prepare import prepare
from workers.graph.qdq import placement
from workers.kernel import Stage, StageContext, StageOptions, StageResult, runner_of
from workers.measure.axes import batch_axes, fixed_batch
from workers.measure.rows import count

_TRIAL_SAMPLES = 8

Arrays = dict[str, np.ndarray[Any, Any]]


class ConvertOptions(StageOptions):
    """`high_precision`: what int8, fp8 and int4 graphs compute in outside of their Q/DQ; fp16 is the fastest on a GPU.
    `op_types`: None = all that gain. `exclude_nodes` stay in float32. `method`, `percentile`, `max_samples`, `part` say
    how to calibrate. `block_size`: of int4, at most. `shapes`: min/opt/max by input, for the trial run."""

    recipe: explicit.Recipe
    high_precision: explicit.High = "fp32"
    op_types: list[str] | None = Field(default=None, min_length=1)
    exclude_nodes: list[str] = Field(default_factory=list)
    method: Literal["minmax", "entropy", "percentile", "mse"] = "minmax"
    percentile: float = Field(default=99.99, gt=50, le=100)
    block_size: Literal[32, 64, 128] = 128
    max_samples: int = Field(default=512, ge=1)
    part: Literal["all", "calibration"] = "all"
    shapes: dict[str, dict[str, list[int]]] | None = None


class Convert(Stage[ConvertOptions]):
    """See the module. `data`: recipe, computes_in, qdq_by_op (nodes in the new precision by type), quantized_nodes,
    pairs, kept_fp32 (by op type), clamped, excluded_nodes, opset, calibration, range_check (where data told which nodes
    leave float16's range), channels_scaled (int4: tensors), trial_run, size_bytes…

    Raises StageFailure: `already_quantized`, `not_float32`, `opset_too_old`, `opset_conversion_failed`, `unknown_node`,
    `nothing_to_convert`, `calibration_data_missing`, `calibration_failed`, `ranges_invalid`, `converted_model_fails`.
    """

    name = "convert"
    version = 6
    Options = ConvertOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "onnx", "onnxruntime", "ml-dtypes")
    gives: ClassVar[Mapping[str, str]] = {"model": ONNX}
    rounds: ClassVar[bool] = True
    reuses: ClassVar[Mapping[str, str]] = {"ranges": "ranges"}
    reported: ClassVar[tuple[str, ...]] = (
        *("recipe", "computes_in", "qdq_by_op", "kept_fp32", "clamped"),
        *("calibration", "range_check", "channels_scaled", "trial_run"),
    )

    @classmethod
    def rounding(cls, options: Mapping[str, Any]) -> Rounding | None:
        return (
            Rounding(("percentile", "entropy", "mse"), in_onnx=True)
            if options.get("recipe") in ("int8", "fp8")
            else None
        )

    def run(self, ctx: StageContext, options: ConvertOptions) -> StageResult:
        source = ctx.inputs["model"] / MODEL_FILE
        original = read_skeleton(source)
        shared.check_source(original, options.exclude_nodes)
        ctx.reporter.progress(0.02, "shape inference")
        prepared = prepare(source, ctx.workspace)
        least = explicit.least_opset(options.recipe, options.high_precision)
        prepared = shared.in_opset(prepared, least, ctx.workspace)
        work = _Work(ctx, options, prepared)
        model, data = work.converted()
        rewriting.restore_interface(model, original)
        learned_ranges.attach(model, None)
        out = ctx.output("model")
        save_model(model, out)
        ctx.reporter.progress(0.9, "trial run")
        data |= {
            "trial_run": _trial_run(ctx, options, model, out, work.samples),
            "recipe": options.recipe,
            "opset": opset_of(model),
            "quantized_nodes": sum(data["qdq_by_op"].values()),
            "excluded_nodes": sorted(options.exclude_nodes),
            "size_bytes_before": size_of(ctx.inputs["model"]),
            "size_bytes": size_of(out),
        }
        return StageResult(outputs=["model", "ranges"] if options.recipe in ("int8", "fp8") else ["model"], data=data)


class _Work:
    """One conversion: the prepared model, and the data where there are some."""

    def __init__(self, ctx: StageContext, options: ConvertOptions, prepared: Path) -> None:
        self.ctx = ctx
        self.options = options
        self.prepared = prepared
        self.samples = None
        if "calibration" in ctx.inputs:
            data_set, source = ctx.only_file("calibration"), ctx.inputs["model"] / MODEL_FILE
            self.samples = shared.calibration_samples(data_set, source, options.part, options.max_samples)
        self.keep: set[str] = set(options.exclude_nodes)

    def converted(self) -> tuple[ModelProto, dict[str, Any]]:
        model = onnx.load(self.prepared)
        recipe, high = self.options.recipe, self.options.high_precision
        data: dict[str, Any] = {"calibration": None, "pairs": 0, "kept_fp32": {}, "clamped": 0, "computes_in": high}
        if recipe in ("fp16", "bf16"):
            low: Literal["fp16", "bf16"] = "fp16" if recipe == "fp16" else "bf16"
            self._keep_out_of_range(model, low, data)
            made = explicit.to_halves(model, low, self.keep)
            return made.model, data | _told(made) | {"qdq_by_op": dict(made.by_op), "computes_in": recipe}
        if high == "fp16":
            self._keep_out_of_range(model, "fp16", data)
        if recipe == "int4":
            placed = explicit.placed(self._int4(model, data))
        else:
            placed = explicit.placed(self._eight_bits(model, "int8" if recipe == "int8" else "fp8", data))
        if placed.left:
            self.ctx.reporter.note("Some nodes stay as they are: their values have no finite range.", nodes=placed.left)
        model = placed.model
        data |= {"qdq_by_op": dict(placed.by_op), "pairs": placed.pairs}
        if high != "fp32":
            made = floats.to_low(model, high, self.keep)
            model, data = made.model, data | _told(made)
        return model, data

    def _eight_bits(self, model: ModelProto, eight: Literal["int8", "fp8"], data: dict[str, Any]) -> placement.Placed:
        options = self.options
        wanted = explicit.eight_bit_targets(model, eight, options.op_types, options.exclude_nodes)
        if "ranges" in self.ctx.inputs:
            known = ranges.read_ranges(self.ctx.only_file("ranges"), eight, wanted.tensors)
        else:
            found = self._calibrated(ranges.calibrated_tensors(eight, model, options.op_types), options.method)
            assert self.samples is not None
            learned = learned_ranges.of(model, read_skeleton(self.ctx.inputs["model"] / MODEL_FILE))
            known = ranges.document(eight, found, self.samples, options.method, options.percentile, learned)
        ranges.write_ranges(known, self.ctx.output("ranges"))
        data["calibration"] = {
            **{key: known[key] for key in ("method", "percentile", "samples", "dataset")},
            "tensors": len(known["tensors"]),
            "reused": "ranges" in self.ctx.inputs,
        }
        self.ctx.reporter.progress(0.75, "Q/DQ nodes")
        return placement.place(model, eight, wanted, ranges.limits(known), options.high_precision)

    def _int4(self, model: ModelProto, data: dict[str, Any]) -> placement.Placed:
        wanted = int4.targets(model, self.options.block_size, self.options.exclude_nodes)
        importance: Mapping[str, Any] = {}
        if self.samples is not None and wanted:
            self.ctx.reporter.progress(0.1, "importance of channels")
            tensors = sorted({model.graph.node[i].input[0] for i in wanted} & rewriting.float_tensors(model))
            try:
                importance = measure.mean_squares(self.prepared, tensors, ranges.batches_of(self.samples))
            except (StageFailure, MemoryError):
                raise
            except Exception as error:  # the runtime raises its own classes, RuntimeError and ValueError
                remedy = "Check that the model runs on this data."
                raise runtime_failure("calibration_failed", error, remedy=remedy) from error
        self.ctx.reporter.progress(0.3, "scales of channels")
        scaled = awq.scale_channels(model, wanted, importance)
        data["channels_scaled"] = sum(scaled[name] is not importance[name] for name in importance)
        self.ctx.reporter.progress(0.5, "scales of blocks")
        return int4.place(model, wanted, scaled, self.options.high_precision)

    def _keep_out_of_range(self, model: ModelProto, low: str, data: dict[str, Any]) -> None:
        """Where there are data: nodes whose values go beyond float16 stay in float32."""
        if low != "fp16" or self.samples is None:
            return
        activations = rewriting.float_tensors(model) - set(rewriting.float_weights(model))
        found = self._calibrated(sorted(activations), "minmax")
        limit = floats.USABLE_FP16
        wide = {t for t, (lowest, highest) in found.tensors.items() if max(-lowest, highest) > limit}
        wide |= set(found.unusable)
        names = [n.name for n in model.graph.node if wide & {*n.input, *n.output} and n.op_type != "Constant"]
        if names:
            self.ctx.reporter.note("Some nodes stay in float32: their values pass float16's range.", nodes=names[:20])
        self.keep |= set(names)
        data["range_check"] = {"samples": found.samples, "out_of_range_nodes": len(names)}

    def _calibrated(self, tensors: Sequence[str], method: calibration.Method) -> calibration.Ranges:
        return ranges.calibrate(
            self.prepared,
            tensors,
            self.samples,
            method=method,
            percentile=self.options.percentile,
            symmetric=True,
            progress=lambda done, message: self.ctx.reporter.progress(0.1 + 0.6 * min(done, 1.0), message),
        )


def _told(made: floats.Converted) -> dict[str, Any]:
    return {"kept_fp32": dict(made.kept), "clamped": made.clamped, "low_precision_nodes": sum(made.by_op.values())}


def _trial_run(
    ctx: StageContext, options: ConvertOptions, model: ModelProto, made: Path, samples: Samples | None
) -> dict[str, Any] | None:
    """Run the result and the original once on the CPU: how alike their outputs are. None where the original does not
    take the generated inputs either."""
    backend = runner_of(ONNX)
    inputs = model_specs(read_skeleton(made / MODEL_FILE))[0]
    fixed = fixed_batch(inputs)
    if samples is not None:
        found = next(samples.batches(fixed or _TRIAL_SAMPLES))
        feeds = found.filled(fixed or len(found))
    else:
        feeds = synthetic_feeds(inputs, fixed or 1, options.shapes, seed=0)
    used = (options.recipe, options.high_precision)
    low: Literal["fp16", "bf16"] = "bf16" if "bf16" in used else "fp16"
    emulate = low in used and (low == "bf16" or fusion.uses_contrib_ops(model))
    if emulate:
        made = ctx.workspace / "emulated"
        made.mkdir()
        save_model(floats.emulated(model, low), made)
    try:
        wanted = backend.load(ctx.inputs["model"], {}).run(feeds)
    except StageFailure as failure:
        if not failure.cacheable:
            raise
        ctx.reporter.note("The trial run tells nothing: the original does not take the generated inputs.")
        return None
    try:
        # As written: optimized, Q/DQ would become the CPU's integer kernels, and fp8 weights that are folded into
        # float16 come out wrong (ONNX Runtime 1.32).
        outputs = backend.load(made, {"graph_optimization_level": "disable"}).run(feeds)
    except StageFailure as failure:
        if not failure.cacheable:
            raise
        raise model_failure(
            "converted_model_fails",
            f"The converted model does not run: {failure.detail}",
            node=failure.node,
            remedy="Use another precision for this model, or exclude the node.",
        ) from failure
    return {"batch": count(feeds, batch_axes(inputs)), "emulated": emulate, **measure.likeness(wanted, outputs)}
