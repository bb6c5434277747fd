"""equalize: the spread of activation channels moved into the weights of MatMul and Gemm, before quantization.

Inputs `model` (float32) and `calibration` (a data set); output `model`, the same function in float32. Composes as
simplify → equalize → quantize. The result is compared with the input on random inputs; where it differs, it is undone.
Source of the method: see `workers.graph.equalize`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import onnx
from pydantic import Field

from app.domain.failures import FailureKind, StageFailure
from workers.artifacts import ONNX
from workers.candidates import StepPart
from workers.graph import equalize as smoothing
from workers.graph import preconditions as shared
from workers.graph.calibrate import statistics as calibration
from workers.graph.calibrate.ranges import batches_of
from workers.graph.equivalence import EquivalenceCheck
from workers.graph.onnx_files import MODEL_FILE, files_of, load_model, read_skeleton, save_model, size_of
from workers.graph.onnxruntime_messages import runtime_failure
from workers.graph.prepare import named, prepare
from workers.kernel import Stage, StageContext, StageOptions, StageResult

LARGEST_IN_MEMORY = 2_000_000_000  # bytes; original and result are held and compared


class EqualizeOptions(StageOptions):
    """`alpha`: how much of the spread moves into the weights, 0…1. `insert_mul`: where the division cannot be folded
    into a constant, one Mul takes it if a few channels dwarf the others. Products named by `exclude_nodes` stay as they
    are. `shapes`: for the random inputs of the comparison."""

    alpha: float = Field(default=0.5, ge=0, le=1)
    insert_mul: bool = True
    exclude_nodes: list[str] = Field(default_factory=list)
    max_samples: int = Field(default=128, ge=1)
    part: Literal["all", "calibration"] = "all"
    shapes: dict[str, dict[str, list[int]]] | None = None


class Equalize(Stage[EqualizeOptions]):
    """See the module. `data`: nodes (names of the smoothed products), smoothed [{tensor, nodes, how: "folded" | "mul",
    outlier_ratio}], alpha, samples, max_abs_diff, fell_back (why nothing was changed, or null)."""

    name = "equalize"
    version = 1
    Options = EqualizeOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "onnx", "onnxruntime")
    gives: ClassVar[Mapping[str, str]] = {"model": ONNX}
    weight: ClassVar[float] = 2.0
    serves_rounding: ClassVar[bool] = True
    reported: ClassVar[tuple[str, ...]] = ("alpha", "smoothed", "max_abs_diff")

    @classmethod
    def part(cls, options: Mapping[str, Any]) -> StepPart:  # noqa: ARG003
        return StepPart("equalization of activations and weights")

    def run(self, ctx: StageContext, options: EqualizeOptions) -> StageResult:
        source = ctx.inputs["model"] / MODEL_FILE
        shared.check_source(read_skeleton(source), options.exclude_nodes)
        if "calibration" not in ctx.inputs:
            raise StageFailure(
                "calibration_data_missing",
                "Equalization needs calibration data.",
                FailureKind.REQUEST,
                remedy="Name a data set under calibration.dataset_id.",
            )
        samples = shared.calibration_samples(ctx.only_file("calibration"), source, options.part, options.max_samples)
        size = size_of(ctx.inputs["model"])
        if size > LARGEST_IN_MEMORY:
            return _unchanged(ctx, options, f"larger than 2 GB ({size} bytes): it is not rewritten in memory")
        prepared = prepare(source, ctx.workspace)
        found = smoothing.sites(onnx.load(prepared, load_external_data=False))
        if not found:
            return _unchanged(ctx, options, "no MatMul or Gemm with constant weights")
        try:
            maxima = calibration.channel_maxima(
                prepared,
                {site.tensor: site.channels for site in found},
                batches_of(samples),
                lambda seen: ctx.reporter.progress(0.1 + 0.5 * min(1.0, seen / len(samples)), f"{seen} samples"),
            )
        except (StageFailure, MemoryError):
            raise
        except Exception as error:  # the runtime raises its own classes, RuntimeError and ValueError
            remedy = "Check that the model runs on this data."
            raise runtime_failure("calibration_failed", error, remedy=remedy) from error
        original = load_model(source)
        model = named(source)
        smoothed = smoothing.equalize(
            model, maxima, options.alpha, options.exclude_nodes, insert_mul=options.insert_mul
        )
        if not smoothed:
            return _unchanged(ctx, options, "no product whose input has channels of unlike size")
        ctx.reporter.progress(0.7, "comparison with the original")
        difference, reason = EquivalenceCheck(original, options.shapes, ctx.workspace).compare(model)
        if reason is not None:
            ctx.reporter.note("Equalization was undone.", reason=reason)
            return _unchanged(ctx, options, reason)
        save_model(model, ctx.output("model"))
        data: dict[str, Any] = {
            "nodes": [name for entry in smoothed for name in entry.site.nodes],
            "smoothed": [entry.to_json() for entry in smoothed],
            "alpha": options.alpha,
            "samples": len(samples),
            "max_abs_diff": difference,
            "fell_back": None,
        }
        return StageResult(outputs=["model"], data=data)


def _unchanged(ctx: StageContext, options: EqualizeOptions, reason: str) -> StageResult:
    out = ctx.output("model")
    for file in files_of(ctx.inputs["model"]):
        shutil.copyfile(file, out / file.name)  # onnx refuses external data with a second hard link
    data = {"nodes": [], "smoothed": [], "alpha": options.alpha, "samples": 0, "max_abs_diff": 0.0, "fell_back": reason}
    return StageResult(outputs=["model"], data=data)
