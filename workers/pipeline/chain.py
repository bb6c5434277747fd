"""A chain of models as a job's stages make one of it: each is exported by itself, then they are joined; what comes out
is exported, optimized and measured as one model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from app.db.orm import SourceModel
from app.domain.artifact_key import ArtifactRef, FileRef, digest_of
from app.domain.axes import batch_axes
from app.domain.chain import NotJoined, join
from app.domain.failures import StageFailure
from app.domain.spec import OptimizationSpec
from workers.artifacts import CHAINED, ONNX
from workers.candidates import Candidate, Skipped
from workers.kernel import stages
from workers.members import linker_of
from workers.pipeline.source import source_ref
from workers.pipeline.stage_calls import Outcome

Run = Callable[[str, Mapping[str, ArtifactRef], Mapping[str, Any]], Outcome]
_MOST_BATCH = 8  # that a model is tried with by itself


def chained(
    run: Run,
    models: Sequence[SourceModel],
    spec: OptimizationSpec,
    options: Mapping[str, Any],
    data: ArtifactRef | None,
) -> Outcome:
    """The call of the stage `chain`. `options`: of the stage export, as of the whole; `data`: on which the whole is
    tried, and the first model by itself. Raises `StageFailure`, with the model where it is about one."""
    connect = [link.connect for link in spec.links]
    exports: list[Outcome] = []
    for place, model in enumerate(models):
        inputs = {"source": source_ref(model)}
        if place == 0 and data is not None:
            inputs["data"] = data
        own = _own(options, model, _given(exports, model, connect[:place]))
        exports.append(_exported(run, inputs, own, models, place))
    opset = max(int(export.data["opset"]) for export in exports)
    for place, export in enumerate([*exports]):
        if export.data["opset"] < opset:
            exports[place] = _exported(run, export.inputs, {**export.options, "min_opset": opset}, models, place)
    parts = {"model" if place == 0 else f"model_{place}": e.of_kind(ONNX) for place, e in enumerate(exports)}
    return run("chain", parts, {"connect": connect})


def _exported(
    run: Run,
    inputs: Mapping[str, ArtifactRef],
    options: Mapping[str, Any],
    models: Sequence[SourceModel],
    place: int,
) -> Outcome:
    try:
        return run("export", inputs, options)
    except StageFailure as failure:
        told = f"Model {place + 1} of the chain ({models[place].name}): {failure.detail}"
        raise replace(failure, detail=told) from failure


def _own(options: Mapping[str, Any], model: SourceModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """`options` as far as they are about this model. `given`: the shapes of what the model before gives it."""
    names = {tensor["name"] for tensor in model.inputs}
    shapes = {n: s for n, s in (options["shapes"] or {}).items() if n in names} | dict(given)
    axes = {n: axis for n, axis in (options["batch_axes"] or {}).items() if n in names}
    return {**options, "format": model.format, "shapes": shapes or None, "batch_axes": axes or None}


def _given(
    exports: Sequence[Outcome], model: SourceModel, connect: Sequence[Mapping[str, str] | None]
) -> dict[str, Any]:
    """The shapes that inputs of `model` have for sure, where it leaves open what the one before says: else it would be
    tried at sizes that it never sees. Nothing where a header is not known, or does not fit, which is told later."""
    if not exports or not model.inputs:
        return {}
    parts = [(e.data["inputs"], e.data["outputs"]) for e in exports]
    try:
        joined = join([*parts, (model.inputs, model.outputs)], connect)
    except NotJoined:
        return {}
    sizes, axes = joined.sizes[-1], batch_axes({t["name"]: t["shape"] or () for t in model.inputs})
    found = {}
    for tensor in model.inputs:
        name, shape = tensor["name"], tensor["shape"]
        if name not in joined.joints[-1] or not shape or all(isinstance(dim, int) for dim in shape):
            continue
        told = [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in shape]
        free = [axis for axis, size in enumerate(told) if not isinstance(size, int)]
        if free in ([], [axes[name]]):
            low = [1 if axis in free else size for axis, size in enumerate(told)]
            high = [_MOST_BATCH if axis in free else size for axis, size in enumerate(told)]
            found[name] = {"min": low, "opt": low, "max": high}
    return found


# An engine of each model


def apart(candidate: Candidate, device: str) -> Candidate | Skipped:
    """The candidate with an engine of each model of the chain; why not, where its graph is none that can be cut."""
    last = candidate.steps[-1] if candidate.steps else None
    kind = ONNX if last is None else stages()[last.stage].kinds(last.options).get("model")
    if kind != ONNX:
        return Skipped(candidate.name, "its graph is of a format that is not cut into the models of the chain")
    return candidate.linked(linker_of(device).name)


def engine_of_each(
    run: Run,
    chain: Outcome,
    export: Outcome,
    plan: Candidate,
    model: ArtifactRef,
    shapes: Mapping[str, Any] | None,
) -> Outcome:
    """An engine of each model, of the graph `model` that was optimized as one; as one build. `plan`: of each. `shapes`:
    of the whole's inputs."""
    parts = run("unchain", {"model": model}, {"borders": chain.data["borders"]})
    builds, known, borders = [], shapes or {}, [[], *chain.data["borders"]]
    for place, (told, border) in enumerate(zip(chain.data["models"], borders, strict=True), 1):
        own = {name: ranges for name, ranges in known.items() if name in told["taken"]}
        own |= _between(border, export.data["inputs"], known)
        options = {"backend": plan.backend, "options": {**plan.build_options, **({"shapes": own} if own else {})}}
        builds.append(run("build", {"model": parts.outputs[f"part_{place}"]}, options))
    return _joined(export, builds, plan.backend)


def _between(
    border: Sequence[Mapping[str, Any]], inputs: Sequence[Mapping[str, Any]], shapes: Mapping[str, Any]
) -> dict[str, Any]:
    """The ranges of what one model gives to the next, as far as the ranges of the whole's inputs tell, by symbols."""
    named = ("min", "opt", "max")
    sizes = {
        dim: [int(shapes[tensor["name"]][name][axis]) for name in named]
        for tensor in inputs
        if tensor["name"] in shapes
        for axis, dim in enumerate(tensor["shape"])
        if isinstance(dim, str)
    }
    found = {}
    for tensor in border:
        dims = [[dim] * len(named) if isinstance(dim, int) else sizes.get(dim) for dim in tensor["shape"]]
        if dims and None not in dims:
            found[tensor["name"]] = {name: [dim[i] for dim in dims if dim] for i, name in enumerate(named)}
    return found


def _joined(export: Outcome, builds: Sequence[Outcome], backend: str) -> Outcome:
    engines, files = [], list[FileRef]()
    for place, build in enumerate(builds, 1):
        folder = f"part_{place}"
        engines.append({"folder": folder, "backend": backend, "runtime": build.data["runtime"]})
        files += [replace(f, name=f"{folder}/{f.name}") for f in build.outputs["engine"].files]
    runtime = {
        "engines": engines,
        "inputs": export.data["inputs"],
        "outputs": [spec["name"] for spec in export.data["outputs"]],
    }
    last = builds[-1]
    return replace(
        last,
        key=digest_of([build.key for build in builds]),
        outputs={"engine": ArtifactRef(tuple(files), CHAINED)},
        data={
            **{name: value for name, value in last.data.items() if name in ("made", "versions", "notes_of_stage")},
            "runtime": runtime,
            "engine_format": CHAINED,
            "size_bytes": sum(int(build.data["size_bytes"]) for build in builds),
        },
        seconds=sum(build.seconds for build in builds),
        cached=all(build.cached for build in builds),
    )
