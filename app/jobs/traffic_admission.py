"""Whether a model, by its header, takes the traffic that a job tells: refused at submission where it does not. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.domain.shapes import ShapeRange
from app.domain.spec import OptimizationSpec
from app.domain.traffic import Traffic
from app.errors import FieldError, invalid_request
from app.jobs.data_admission import MOST_ERRORS, axes_of

_REMEDY = "Give batches and shapes that the model's inputs take, which GET /v1/models/{id} tells, within `shapes`."


def fit_traffic(spec: OptimizationSpec, inputs: Sequence[Mapping[str, Any]]) -> OptimizationSpec:
    """The spec with batches that the model takes: what is only a default is fitted. Raise 422 where batches or shapes
    that the job tells lie outside of what the model or the job's `shapes` take. The engine that will be made may take
    fewer: that is known, and told, at the end of the job."""
    traffic = spec.traffic
    if traffic is None or not inputs:
        return spec
    axes, ranges = axes_of(inputs, spec.inputs), spec.shapes or {}
    taken = [*_taken(inputs, axes, ranges)]
    outside = [*_batches(traffic, taken)]
    if outside and "batch_mix" not in traffic.model_fields_set:
        fitted = traffic.model_copy(update={"batch_mix": {max(low for _, low, _ in taken): 1.0}})
        spec, traffic = spec.model_copy(update={"traffic": fitted}), fitted
        outside = [*_batches(traffic, taken)]
    errors = [*outside, *_shapes(traffic, inputs, axes, ranges)]
    if errors:
        detail = f"The traffic does not fit the model: {errors[0].message}."
        raise invalid_request(detail, errors[:MOST_ERRORS], _REMEDY)
    return spec


def _taken(
    inputs: Sequence[Mapping[str, Any]], axes: Mapping[str, int | None], ranges: Mapping[str, ShapeRange]
) -> Iterator[tuple[str, int, int]]:
    """(input, least, most) batch sizes, of inputs for which they are known."""
    for item in inputs:
        name, shape, axis = item["name"], item["shape"], axes.get(item["name"], 0)
        if shape is None or axis is None or axis >= len(shape):
            continue
        wanted = ranges.get(name)
        if isinstance(shape[axis], int):
            yield name, shape[axis], shape[axis]
        elif wanted is not None and axis < len(wanted.min):
            yield name, wanted.min[axis], wanted.max[axis]


def _batches(traffic: Traffic, taken: Sequence[tuple[str, int, int]]) -> Iterator[FieldError]:
    for batch in sorted(traffic.batch_mix):
        for name, low, high in taken:
            if not low <= batch <= high:
                allowed = f"batches of {low} only" if low == high else f"batches of {low} to {high}"
                yield FieldError(f"/traffic/batch_mix/{batch}", f"input {name!r} takes {allowed}, not of {batch}")


def _shapes(
    traffic: Traffic,
    inputs: Sequence[Mapping[str, Any]],
    axes: Mapping[str, int | None],
    ranges: Mapping[str, ShapeRange],
) -> Iterator[FieldError]:
    known = {i["name"]: i["shape"] for i in inputs}
    for i, part in enumerate(traffic.shape_mix or ()):
        for name in known:
            if name not in part.dims:
                yield FieldError(f"/traffic/shape_mix/{i}/dims", f"the shape of input {name!r} is missing")
        for name, dims in part.dims.items():
            pointer = f"/traffic/shape_mix/{i}/dims/{name}"
            if name not in known:
                yield FieldError(pointer, f"the model has no input {name!r}; it has {sorted(known)}")
                continue
            shape = known[name]
            if shape is not None and len(shape) != len(dims):
                yield FieldError(pointer, f"rank {len(dims)}, the model's input has rank {len(shape)}")
                continue
            for axis, size in enumerate(dims):
                if axis == axes.get(name, 0):
                    continue
                if shape is not None and isinstance(shape[axis], int) and size != shape[axis]:
                    yield FieldError(pointer, f"axis {axis} of the model is fixed at {shape[axis]}, not {size}")
                wanted = ranges.get(name)
                if wanted is not None and axis < len(wanted.min) and not wanted.min[axis] <= size <= wanted.max[axis]:
                    low, high = wanted.min[axis], wanted.max[axis]
                    yield FieldError(pointer, f"axis {axis}: {size} is outside of the wanted shapes ({low} to {high})")
