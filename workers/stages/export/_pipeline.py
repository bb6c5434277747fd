"""The way of an ONNX file, from the parsed model to the checked artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx import ModelProto

from app.domain.failures import StageFailure
from app.domain.spec import ShapeRange
from workers.kernel import TensorSpec
from workers.onnx_files import read_skeleton
from workers.onnx_graph import model_specs, opset_of, real_inputs, tensor_spec
from workers.stages.export import _graph_checks as checks
from workers.stages.export._names import forget_placeholders, make_room, name_nodes, rename_apart
from workers.stages.export._opset import raise_opset
from workers.stages.export._source import inline_external, locate, parse
from workers.stages.export._trial import Trial, batch_axis, batch_sizes, first_inferences, open_session, with_node
from workers.stages.export._write import externalize, write_model

_OLDEST_IR = 8  # what opset 17 came with


@dataclass
class Exported:
    """What the way of a model leaves: the model as written to `folder`, and what was found out."""

    folder: Path
    model: ModelProto
    opset_before: int
    inputs: list[TensorSpec] = field(default_factory=list)
    outputs: list[TensorSpec] = field(default_factory=list)
    dynamic_batch: bool = False
    notes: list[str] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)


def export_onnx(
    source: Path,
    out: Path,
    workspace: Path,
    *,
    min_opset: int,
    shapes: Mapping[str, ShapeRange] | None,
    progress: Callable[[float, str], None],
) -> Exported:
    """Check, normalise and try the model file `source`; write it to `out`. Raises StageFailure."""
    progress(0.1, "reading the model")
    model = parse(source)
    checks.check_interface(model)
    checks.check_ops(model)
    where = locate(model, source.parent)
    if not inline_external(model, where):
        externalize(model, where, out)
    notes = [*_normalise(model), *rename_apart(model, shapes)]
    exported = Exported(out, model, opset_of(model), notes=notes)
    exported.inputs, exported.outputs = model_specs(model)
    checks.check_shapes(exported.inputs, shapes)
    plain_shapes = {n: r.model_dump() for n, r in shapes.items()} if shapes else None

    progress(0.3, "checking the graph")
    checks.run_checker(_written_for_check(model, out, workspace))
    if opset_of(model) < min_opset:
        progress(0.4, "raising the opset")
        exported.model, more = raise_opset(model, min_opset, workspace, plain_shapes)
        exported.notes += more
        checks.sort_nodes(exported.model.graph)
    name_nodes(exported.model)

    progress(0.6, "inferring shapes")
    problem = _infer(exported, workspace)
    progress(0.8, "first inference")
    _first_inference(exported, plain_shapes, problem, workspace)
    exported.checks["onnx_checker"] = "passed"
    return exported


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


def _first_inference(
    exported: Exported, shapes: Mapping[str, Any] | None, problem: Exception | None, workspace: Path
) -> None:
    """Run at two batch sizes; what runs at one only gets that one. Fills in specs, `dynamic_batch` and checks."""
    try:
        trials = _tried(exported, shapes)
    except StageFailure as error:
        # Strict inference has seen it coming, and names the node.
        raise (checks.graph_failure(problem) if problem is not None else error) from None
    if problem is not None:
        exported.notes.append(f"Strict shape inference failed, the model runs: {' '.join(str(problem).split())[:200]}")
    failed = [t for t in trials if t.failure is not None]
    passed = [t for t in trials if t.failure is None]
    exported.dynamic_batch = batch_axis(exported.inputs)
    exported.checks["first_inference"] = [t.to_json() for t in trials]
    if failed and passed:
        batch, failure = passed[0].batch, failed[0].failure
        assert failure is not None
        exported.notes.append(
            f"The model declares a dynamic batch but fails at batch {failed[0].batch} ({failure.detail[:160]}"
            f"{f', node {failure.node}' if failure.node else ''}); it is fixed at {batch}."
        )
        _fix_batch(exported, batch, workspace)
    elif not exported.dynamic_batch:
        fixed = next((s for s in exported.inputs if s.shape and isinstance(s.shape[0], int)), None)
        if fixed is not None:
            exported.notes.append(f"The batch is fixed at {fixed.shape[0]} (input {fixed.name!r}).")
    odd = sorted({name for t in passed for name in t.not_finite})
    exported.checks["finite_outputs"] = {"passed": not odd, "tensors": odd}
    if odd:
        exported.notes.append(f"NaN or Infinity in {', '.join(odd)} on random inputs.")


def _tried(exported: Exported, shapes: Mapping[str, Any] | None) -> list[Trial]:
    """At least one of the trials passed; raises StageFailure otherwise."""
    exported.inputs, exported.outputs = model_specs(exported.model)
    try:
        session = open_session(exported.folder)
    except StageFailure as error:
        raise with_node(error, exported.model) from None
    trials = first_inferences(session, batch_sizes(exported.inputs, shapes), shapes)
    session.close()
    if any(t.failure is None for t in trials):
        return trials
    failure = trials[0].failure
    assert failure is not None
    free = [f"{s.name}[{axis}]" for s in exported.inputs for axis, d in enumerate(s.shape[1:], 1) if isinstance(d, str)]
    if free and not shapes and failure.code == "inference_failed":
        failure.remedy = f"Give `shapes` for the dynamic dimensions {', '.join(free[:6])}; the tried ones may not fit."
    raise failure


def _fix_batch(exported: Exported, batch: int, workspace: Path) -> None:
    """Write the model with the batch axis of all inputs set to `batch`."""
    graph = exported.model.graph
    symbols = {s.shape[0] for s in exported.inputs if s.shape}
    for info in [*graph.input, *graph.output]:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_value = batch
    del graph.value_info[:]
    _infer(exported, workspace)
    exported.inputs, exported.outputs = model_specs(exported.model)
    exported.dynamic_batch = False
