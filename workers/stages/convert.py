"""convert: a copy of the model whose precision is explicit, as TensorRT 11 and other GPU libraries want it.

Inputs `model`, and `calibration` (a data set) for int8 and fp8, where it says how much to clip int4, and which values
float16 cannot hold. Outputs `model`, and for int8 and fp8 `ranges`, what the calibration found: as input `ranges` it
replaces the data. Recipes: fp16, bf16 (arithmetic in 16 bits), int8 and fp8 (Q/DQ by TensorRT's rules), int4
(weight-only, in blocks). Inputs and outputs keep their names and types.

Nodes are counted by op type: a model "converted" in none is a failure. The result runs once on ONNX Runtime's CPU
provider beside the original, and how alike the outputs are is told (bfloat16 by a graph that rounds alike).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
from onnx import ModelProto
from pydantic import Field

from app.domain.failures import FailureKind, StageFailure, model_failure
from workers.backends import _ort_calibrate as calibration
from workers.backends import _ort_fusion as fusion
from workers.backends import (
    _ort_precision,
    _precision_awq,
    _precision_float,
    _precision_graph,
    _precision_int4,
    _precision_qdq,
)
from workers.backends import _ort_quantize as quantization
from workers.backends import _precision_measure as measure
from workers.backends._onnxruntime_messages import runtime_failure
from workers.backends._precision_ranges import RANGES_FILE, RANGES_FORMAT, read_ranges
from workers.data import Samples, synthetic_feeds
from workers.kernel import Stage, StageContext, StageOptions, StageResult, backends
from workers.measure.axes import batch_axes, fixed_batch
from workers.measure.rows import count
from workers.onnx_files import MODEL_FILE, read_skeleton, size_of
from workers.onnx_graph import all_nodes, keep_values

OLDEST_OPSET = 13
_TRIAL_SAMPLES = 8

Arrays = dict[str, np.ndarray[Any, Any]]
Recipe = Literal["fp16", "bf16", "int8", "fp8", "int4"]


class ConvertOptions(StageOptions):
    """`high_precision`: what int8, fp8 and int4 graphs compute in outside of their Q/DQ; fp16 is the fastest on a GPU.
    `op_types`: None = all that gain. `exclude_nodes` stay in float32. `method`, `percentile`, `max_samples`, `part` say
    how to calibrate. `block_size`: of int4, at most. `shapes`: min/opt/max by input, for the trial run."""

    recipe: Recipe
    high_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
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
    version = 5
    Options = ConvertOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "onnx", "onnxruntime", "ml-dtypes")

    def run(self, ctx: StageContext, options: ConvertOptions) -> StageResult:
        source = ctx.inputs["model"] / MODEL_FILE
        original = read_skeleton(source)
        _check_source(original, options)
        ctx.reporter.progress(0.02, "shape inference")
        work = _Work(ctx, options, _opset_raised(ctx, options, quantization.prepare(source, ctx.workspace)))
        model, data = work.converted()
        _restore_interface(model, original)
        out = ctx.output("model")
        quantization.save_model(model, out)
        ctx.reporter.progress(0.9, "trial run")
        data |= {
            "trial_run": _trial_run(ctx, options, model, out, work.samples),
            "recipe": options.recipe,
            "opset": _precision_graph.opset_of(model),
            "quantized_nodes": sum(data["qdq_by_op"].values()),
            "excluded_nodes": sorted(options.exclude_nodes),
            "size_bytes_before": size_of(ctx.inputs["model"]),
            "size_bytes": size_of(out),
        }
        return StageResult(outputs=["model", "ranges"] if options.recipe in ("int8", "fp8") else ["model"], data=data)


def _check_source(model: ModelProto, options: ConvertOptions) -> None:
    if quantization.is_quantized(model):
        detail, remedy = "The model already holds quantized operators.", "Upload the float32 model."
        raise model_failure("already_quantized", detail, remedy=remedy)
    if _ort_precision.has_low_precision_weights(model):
        detail = "The model's weights are already in float16 or bfloat16."
        raise model_failure("not_float32", detail, remedy="Upload the float32 model.")
    opset = _precision_graph.opset_of(model)
    if opset < OLDEST_OPSET:
        detail = f"Explicit precision needs opset {OLDEST_OPSET}; the model has {opset}."
        raise model_failure("opset_too_old", detail, remedy="Export the model with opset 17 or later.")
    unknown = sorted(set(options.exclude_nodes) - {n.name for n in all_nodes(model)})
    if unknown:
        raise StageFailure(
            "unknown_node",
            f"exclude_nodes names {unknown[0]!r}, which is no node of the model.",
            FailureKind.REQUEST,
            node=unknown[0],
            remedy="Use node names of the simplified model.",
        )


def _opset_raised(ctx: StageContext, options: ConvertOptions, prepared: Path) -> Path:
    """The prepared model in the opset that the recipe needs, with the types inferred anew."""
    needed = {"int8": _precision_qdq.OPSET, "fp8": _precision_qdq.OPSET, "int4": _precision_int4.OPSET}
    minimum = needed.get(options.recipe, 0)
    if "bf16" in (options.recipe, options.high_precision):
        minimum = max(minimum, _precision_float.BF16_OPSET)
    model = onnx.load(prepared)
    if _precision_graph.opset_of(model) >= minimum:
        return prepared
    folder = ctx.workspace / "raised"
    folder.mkdir()
    raised = _precision_graph.raise_opset(model, minimum)
    return quantization.prepare(quantization.save_model(raised, folder), folder)


class _Work:
    """One conversion: the prepared model, and the data where there are some."""

    def __init__(self, ctx: StageContext, options: ConvertOptions, prepared: Path) -> None:
        self.ctx = ctx
        self.options = options
        self.prepared = prepared
        self.samples = self._samples() if "calibration" in ctx.inputs else None
        self.keep: set[str] = set(options.exclude_nodes)

    def converted(self) -> tuple[ModelProto, dict[str, Any]]:
        model = onnx.load(self.prepared)
        recipe, high = self.options.recipe, self.options.high_precision
        data: dict[str, Any] = {"calibration": None, "pairs": 0, "kept_fp32": {}, "clamped": 0, "computes_in": high}
        if recipe in ("fp16", "bf16"):
            low: Literal["fp16", "bf16"] = "fp16" if recipe == "fp16" else "bf16"
            self._keep_out_of_range(model, low, data)
            made = _precision_float.to_low(model, low, self.keep)
            if not set(made.by_op) & {*_precision_graph.WEIGHTED_OPS, "LSTM", "GRU", "RNN", "Attention", "Einsum"}:
                raise _nothing(f"no product or convolution has a form in {recipe}")
            return made.model, data | _told(made) | {"qdq_by_op": dict(made.by_op), "computes_in": recipe}
        if high == "fp16":
            self._keep_out_of_range(model, "fp16", data)
        if recipe == "int4":
            placed = self._int4(model, data)
        else:
            placed = self._eight_bits(model, "int8" if recipe == "int8" else "fp8", data)
        if not placed.by_op:
            raise _nothing("no product or convolution with float32 weights of a fitting shape")
        if placed.left:
            self.ctx.reporter.note("Some nodes stay as they are: their values have no finite range.", nodes=placed.left)
        model = placed.model
        data |= {"qdq_by_op": dict(placed.by_op), "pairs": placed.pairs}
        if high != "fp32":
            made = _precision_float.to_low(model, high, self.keep)
            model, data = made.model, data | _told(made)
        return model, data

    def _eight_bits(
        self, model: ModelProto, eight: Literal["int8", "fp8"], data: dict[str, Any]
    ) -> _precision_qdq.Placed:
        options = self.options
        wanted = _precision_qdq.targets(model, eight, options.op_types, options.exclude_nodes)
        if not wanted.nodes:
            raise _nothing(f"no product or convolution that {eight} suits")
        if "ranges" in self.ctx.inputs:
            known = read_ranges(self.ctx.only_file("ranges"), wanted.tensors)
        else:
            known = self._calibrated(wanted.tensors)
        text = json.dumps(known, indent=1, sort_keys=True, allow_nan=False)
        (self.ctx.output("ranges") / RANGES_FILE).write_text(text + "\n")
        data["calibration"] = {
            **{key: known[key] for key in ("method", "percentile", "samples", "dataset")},
            "tensors": len(known["tensors"]),
            "reused": "ranges" in self.ctx.inputs,
        }
        self.ctx.reporter.progress(0.75, "Q/DQ nodes")
        ranges = {name: (low, high) for name, (low, high) in known["tensors"].items()}
        return _precision_qdq.place(model, eight, wanted, ranges, options.high_precision)

    def _int4(self, model: ModelProto, data: dict[str, Any]) -> _precision_qdq.Placed:
        wanted = _precision_int4.targets(model, self.options.block_size, self.options.exclude_nodes)
        importance: Mapping[str, Any] = {}
        if self.samples is not None and wanted:
            self.ctx.reporter.progress(0.1, "importance of channels")
            tensors = sorted({model.graph.node[i].input[0] for i in wanted} & _precision_graph.float_tensors(model))
            try:
                importance = measure.mean_squares(self.prepared, tensors, self._batches)
            except (StageFailure, MemoryError):
                raise
            except Exception as error:  # the runtime raises its own classes, RuntimeError and ValueError
                raise _calibration_failed(error) from error
        self.ctx.reporter.progress(0.3, "scales of channels")
        scaled = _precision_awq.scale_channels(model, wanted, importance)
        data["channels_scaled"] = sum(scaled[name] is not importance[name] for name in importance)
        self.ctx.reporter.progress(0.5, "scales of blocks")
        return _precision_int4.place(model, wanted, scaled, self.options.high_precision)

    def _keep_out_of_range(self, model: ModelProto, low: str, data: dict[str, Any]) -> None:
        """Where there are data: nodes whose values go beyond float16 stay in float32."""
        if low != "fp16" or self.samples is None:
            return
        floats = _precision_graph.float_tensors(model) - set(_precision_graph.float_weights(model))
        found = self._calibrated(sorted(floats), method="minmax")
        limit = _precision_float.USABLE_FP16
        wide = {t for t, (lowest, highest) in found["tensors"].items() if max(-lowest, highest) > limit}
        wide |= set(found["unusable"])
        names = [n.name for n in model.graph.node if wide & {*n.input, *n.output} and n.op_type != "Constant"]
        if names:
            self.ctx.reporter.note("Some nodes stay in float32: their values pass float16's range.", nodes=names[:20])
        self.keep |= set(names)
        data["range_check"] = {"samples": found["samples"], "out_of_range_nodes": len(names)}

    def _calibrated(self, tensors: Collection[str], method: calibration.Method | None = None) -> dict[str, Any]:
        samples, options = self.samples, self.options
        if samples is None:
            raise StageFailure(
                "calibration_data_missing",
                f"{options.recipe} needs calibration data.",
                FailureKind.REQUEST,
                remedy="Name a data set under calibration.dataset_id.",
            )
        try:
            found = measure.ranges(
                self.prepared,
                sorted(tensors),
                self._batches,
                method=method or options.method,
                percentile=options.percentile,
                total=len(samples),
                progress=lambda done, message: self.ctx.reporter.progress(0.1 + 0.6 * min(done, 1.0), message),
            )
        except (StageFailure, MemoryError):
            raise
        except Exception as error:  # as above
            raise _calibration_failed(error) from error
        return {
            "format": RANGES_FORMAT,
            "dataset": samples.digest(),
            "method": options.method,
            "percentile": options.percentile if options.method == "percentile" else None,
            "samples": found.samples,
            "tensors": {name: [low, high] for name, (low, high) in sorted(found.tensors.items())},
            "unusable": sorted(found.unusable),
        }

    def _batches(self, size: int) -> Iterator[Arrays]:
        assert self.samples is not None
        for batch in self.samples.batches(size):
            yield batch.feeds

    def _samples(self) -> Samples:
        graph = read_skeleton(self.ctx.inputs["model"] / MODEL_FILE)
        inputs, outputs = quantization.graph_inputs(graph), quantization.interface(graph.graph.output)
        path, options = self.ctx.only_file("calibration"), self.options
        return Samples(path, inputs, outputs, part=options.part, max_samples=options.max_samples)


def _told(made: _precision_float.Converted) -> dict[str, Any]:
    return {"kept_fp32": dict(made.kept), "clamped": made.clamped, "low_precision_nodes": sum(made.by_op.values())}


def _nothing(reason: str) -> StageFailure:
    return model_failure(
        "nothing_to_convert",
        f"There is nothing to convert: the model has {reason}.",
        remedy="Use another precision for this model.",
    )


def _calibration_failed(error: Exception) -> StageFailure:
    return runtime_failure("calibration_failed", error, remedy="Check that the model runs on this data.")


def _restore_interface(model: ModelProto, original: ModelProto) -> None:
    """Inputs and outputs with the names, types and symbolic shapes that they came with."""
    weights = {i.name for i in original.graph.initializer}
    inputs = [i for i in original.graph.input if i.name not in weights]
    for made, wanted in ((model.graph.input, inputs), (model.graph.output, list(original.graph.output))):
        if {v.name for v in made} == {v.name for v in wanted}:
            del made[:]
            made.extend(wanted)
    keep_values(model, original)


def _trial_run(
    ctx: StageContext, options: ConvertOptions, model: ModelProto, made: Path, samples: Samples | None
) -> dict[str, Any] | None:
    """Run the result and the original once on the CPU: how alike their outputs are. None where the original does not
    take the generated inputs either."""
    backend = backends()["onnxruntime"]()
    inputs = quantization.graph_inputs(read_skeleton(made / MODEL_FILE))
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
        quantization.save_model(_precision_float.emulated(model, low), made)
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
