"""Stage export: from the uploaded file to a checked ONNX model that has run once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from app.domain.shapes import ShapeRange
from workers.artifacts import EXPORTED_PROGRAM, ONNX, PROGRAM_FILE
from workers.graph import learned_ranges
from workers.graph.interface import Interface
from workers.graph.labels import labels_of
from workers.graph.onnx_arithmetic import describe_arithmetic
from workers.graph.onnx_files import MODEL_FILE, size_of
from workers.graph.onnx_graph import describe_structure, opset_of
from workers.kernel import Stage, StageContext, StageOptions, StageResult, TensorSpec
from workers.stages.export._first_inference import Exported
from workers.stages.export._pipeline import export_onnx
from workers.stages.export._source import unpack
from workers.stages.export._trial import TrialInputs
from workers.stages.export._write import write_model


class ExportOptions(StageOptions):
    """`format`: of the uploaded file. `shapes`: the user's ranges by input, and `batch_axes`: of the inputs that the
    user names (None: no batch), both checked against the model. The others bound what an archive may unpack to."""

    format: Literal["onnx", "archive", "pt2"] = "onnx"
    min_opset: int = Field(default=17, ge=7, le=64)
    shapes: dict[str, ShapeRange] | None = None
    batch_axes: dict[str, int | None] | None = None
    max_unpacked_bytes: int = Field(default=32 << 30, ge=1)
    max_members: int = Field(default=10_000, ge=1)
    max_ratio: float = Field(default=200.0, ge=1)


class Export(Stage[ExportOptions]):
    """Inputs `source` (one file, or what the stage `chain` made) and, where the job has a data set, `data` (one file,
    on whose samples the model is tried) → outputs `model` (`model.onnx`; large weights in `model.onnx.data`) and, of a
    `.pt2` upload, `program`: the exported program itself, cleaned of what could run code, with `interface.json`. Of a
    program that was trained, the ranges that it learned go with the ONNX graph (`workers.graph.learned_ranges`)."""

    name: ClassVar[str] = "export"
    version: ClassVar[int] = 6
    Options = ExportOptions
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "numpy", "torch", "onnxscript")
    reads: ClassVar[str] = "source"
    takes: ClassVar[tuple[str, ...]] = (EXPORTED_PROGRAM,)  # as a step, behind one that trained it
    gives: ClassVar[Mapping[str, str]] = {"model": ONNX, "program": EXPORTED_PROGRAM}
    weight: ClassVar[float] = 2.0

    def run(self, ctx: StageContext, options: ExportOptions) -> StageResult:
        """Raises StageFailure: `invalid_model`, `invalid_graph`, `unsupported_op`, `unsupported_opset`,
        `unsupported_input_type`, `unsupported_output_type`, `no_inputs`, `no_outputs`, `dynamic_rank`,
        `external_data_missing`, `external_data_outside`, `archive_*`, `load_failed`, `inference_failed`,
        `shape_mismatch`, `batch_axis_mismatch` and `missing_extra` (kind REQUEST), `export_failed`, `export_mismatch`,
        `unsafe_program`, and `dataset_*` (kind DATA)."""
        learned = learned_ranges.read(ctx.inputs["source"])
        source = ctx.inputs["source"] / PROGRAM_FILE if learned is not None else _unpacked(ctx)
        data = ctx.only_file("data") if "data" in ctx.inputs else None
        reporter = ctx.reporter
        reporter.progress(0.0, "reading the upload")
        program = None
        if options.format == "archive":
            source = unpack(
                source,
                ctx.workspace / "unpacked",
                max_bytes=options.max_unpacked_bytes,
                max_members=options.max_members,
                max_ratio=options.max_ratio,
            )
        elif options.format == "pt2":
            from workers.stages.export._pt2 import Program

            program = Program.load(source, ctx.workspace)
            program.keep(source, ctx.output("program") / PROGRAM_FILE)
            source = program.to_onnx(ctx.workspace / "from_pt2", max(18, options.min_opset))
        exported = export_onnx(
            source,
            ctx.output("model"),
            ctx.workspace,
            min_opset=options.min_opset,
            shapes=options.shapes,
            progress=reporter.progress,
            axes=options.batch_axes,
            data=data,
        )
        if program is not None and learned is not None:
            learned = program.resolved(learned, exported, TrialInputs(data, None))
        if learned_ranges.attach(exported.model, learned):
            write_model(exported.model, exported.folder)
        if program is not None:
            reporter.progress(0.9, "comparing with the source program")
            shapes = {n: r.model_dump() for n, r in options.shapes.items()} if options.shapes else None
            exported.checks["source_comparison"] = program.check(exported, TrialInputs(data, shapes), shapes)
            exported.notes += program.notes
            Interface(tuple(exported.inputs), tuple(exported.outputs)).write(ctx.output("program"))
        for note in exported.notes:
            reporter.note(note)
        reporter.progress(1.0, "exported")
        return StageResult(("model", "program") if program else ("model",), _data(exported))


def _unpacked(ctx: StageContext) -> Path:
    """The uploaded file; or the model that a stage made of several, whose files are not an input's: they are moved."""
    made = ctx.inputs["source"]
    if not (made / MODEL_FILE).exists():
        return ctx.only_file("source")
    return Path(shutil.copytree(made, ctx.workspace / "made")) / MODEL_FILE


def _data(exported: Exported) -> dict[str, Any]:
    structure = describe_structure(exported.model)
    return {
        "inputs": [_spec(s) for s in exported.inputs],
        "outputs": [_spec(s) for s in exported.outputs],
        "opset": opset_of(exported.model),
        "opset_before": exported.opset_before,
        "parameters": structure["parameters"],
        "size_bytes": size_of(exported.folder),
        "dynamic_batch": exported.dynamic_batch,
        "notes": exported.notes,
        "checks": exported.checks,
        "labels": labels_of(exported.model),
        "structure": {**structure, "arithmetic": describe_arithmetic(exported.model)},
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    told = {} if spec.values is None else {"values": list(spec.values)}
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), **told}


__all__ = ["Export", "ExportOptions", "describe_structure"]
