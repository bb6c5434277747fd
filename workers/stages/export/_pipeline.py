"""The way of an ONNX file, from the parsed model to the checked artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnx import ModelProto

from app.domain.shapes import ShapeRange
from workers.graph.onnx_files import read_skeleton
from workers.graph.onnx_graph import model_specs, opset_of, real_inputs, set_values, tensor_spec
from workers.measure.axes import with_axes
from workers.stages.export import _graph_checks as checks
from workers.stages.export._first_inference import Exported, FirstInference
from workers.stages.export._names import forget_placeholders, make_room, name_nodes, rename_apart, write_symbols
from workers.stages.export._opset import raise_opset
from workers.stages.export._source import inline_external, locate, parse
from workers.stages.export._trial import TrialInputs
from workers.stages.export._values import value_bounds
from workers.stages.export._write import externalize, write_model

_OLDEST_IR = 8  # what opset 17 came with


def export_onnx(
    source: Path,
    out: Path,
    workspace: Path,
    *,
    min_opset: int,
    shapes: Mapping[str, ShapeRange] | None,
    progress: Callable[[float, str], None],
    axes: Mapping[str, int | None] | None = None,
    data: Path | None = None,
) -> Exported:
    """Check, normalise and try the model file `source`; write it to `out`. `axes`: of the batch, for the inputs that
    the user names; `data`: the data set whose samples it is tried on. Raises StageFailure."""
    progress(0.1, "reading the model")
    model = parse(source)
    checks.check_interface(model)
    checks.check_ops(model)
    where = locate(model, source.parent)
    if not inline_external(model, where):
        externalize(model, where, out)
    set_values(model, {})
    exported = Exported(out, model, opset_of(model), notes=_normalise(model))
    plain_shapes = {n: r.model_dump() for n, r in shapes.items()} if shapes else None
    trial = TrialInputs(data, plain_shapes)
    _settle_axes(exported, shapes, axes, trial)

    progress(0.3, "checking the graph")
    checks.run_checker(_written_for_check(model, out, workspace))
    if opset_of(model) < min_opset:
        progress(0.4, "raising the opset")
        set_values(model, value_bounds(model))  # without inferred shapes: as far as they are known
        exported.model, more = raise_opset(model, min_opset, workspace, trial, plain_shapes)
        exported.notes += more
        checks.sort_nodes(exported.model.graph)
    name_nodes(exported.model)

    progress(0.6, "inferring shapes")
    problem = _infer(exported, workspace)
    progress(0.8, "first inference")
    FirstInference(exported, trial, plain_shapes, problem, axes, lambda: _infer(exported, workspace)).run()
    exported.checks["onnx_checker"] = "passed"
    return exported


def _settle_axes(
    exported: Exported,
    shapes: Mapping[str, ShapeRange] | None,
    axes: Mapping[str, int | None] | None,
    trial: TrialInputs,
) -> None:
    """Make the symbols say what is known of the axes: from the job's shapes, its batch axes, and the data's shapes."""
    model = exported.model
    wanted = {n: list(zip(*zip(r.min, r.opt, r.max, strict=True), strict=True)) for n, r in (shapes or {}).items()}
    exported.notes += rename_apart(model, wanted, "the job's shapes")
    inputs, _ = model_specs(model)
    stored = trial.stored(inputs)
    exported.notes += rename_apart(model, {s.name: [d[s.name] for d in stored] for s in inputs}, "the data")
    inputs, _ = model_specs(model)
    if axes:
        checks.check_axes(inputs, axes)
        named = with_axes(inputs, axes)
        write_symbols(model, inputs, named)
    exported.inputs, exported.outputs = model_specs(model)
    checks.check_shapes(exported.inputs, shapes)


def _normalise(model: ModelProto) -> list[str]:
    """Repairs that change nothing the model computes; returns notes."""
    notes = []
    graph = model.graph
    if model.ir_version < _OLDEST_IR:  # below 4 every initializer has to be an input, too
        notes.append(f"IR version raised from {model.ir_version} to {_OLDEST_IR}.")
        model.ir_version = _OLDEST_IR
    wanted = real_inputs(graph)
    if dropped := len(graph.input) - len(wanted):
        kept = [i.SerializeToString() for i in wanted]
        del graph.input[:]
        for data in kept:
            graph.input.add().ParseFromString(data)
        notes.append(f"{dropped} initializers were also inputs; they are constants now.")
    for info in graph.input:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value <= 0:
                notes.append(f"Axis {axis} of input {info.name!r} was {dim.dim_value}; it is taken as dynamic.")
    forget_placeholders(model)
    for info in graph.input:
        _name_dims(info)
    notes += name_nodes(model) + make_room(model)
    if checks.sort_nodes(graph):
        notes.append("The nodes were not in topological order; they were sorted.")
    return notes


def _name_dims(info: Any) -> None:
    """Give every unknown dimension the name it is reported by."""
    for dim, name in zip(info.type.tensor_type.shape.dim, tensor_spec(info).shape, strict=True):
        if isinstance(name, str):
            dim.dim_param = name


def _written_for_check(model: ModelProto, out: Path, workspace: Path) -> Path:
    """The model as a file for the checker. Outputs without a shape are legal, but the checker refuses them: they get
    theirs from shape inference."""
    path = write_model(model, out)
    if all(o.type.tensor_type.HasField("shape") for o in model.graph.output):
        return path
    inferred = workspace / "with_output_shapes.onnx"
    checks.infer_shapes(path, inferred)
    found = {o.name: o for o in read_skeleton(inferred).graph.output} if inferred.exists() else {}
    for output in model.graph.output:
        if output.type.tensor_type.HasField("shape"):
            continue
        known = found.get(output.name)
        if known is None or not known.type.tensor_type.HasField("shape"):
            raise checks.dynamic_rank(output.name, "Output")
        output.CopyFrom(known)
    return write_model(model, out)


def _infer(exported: Exported, workspace: Path) -> Exception | None:
    """Write the model with inferred shapes to its folder; returns why strict inference failed, if it did."""
    path = write_model(exported.model, exported.folder)
    inferred = workspace / "inferred.onnx"
    problem = checks.infer_shapes(path, inferred)
    if problem is None:
        exported.model = read_skeleton(inferred)
        write_model(exported.model, exported.folder)
    exported.checks["shape_inference"] = "passed" if problem is None else "partial"
    return problem
