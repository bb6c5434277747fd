"""The shapes that a job's engines are timed and judged at, beside the batch: those of the data, else of the job, else
by custom. Pure but for reading a data set's headers.

A shape is a size for every axis of every input, with one sample on the batch axes. Axes that are neither fixed nor the
batch's are *free*; free axes of one symbolic name have one size.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.data import Layout
from workers.kernel import TensorSpec
from workers.measure.axes import batch_axes, computed
from workers.measure.npz import open_shards
from workers.measure.rows import in_rows
from workers.measure.synthetic import synthetic_shapes

Dims = dict[str, tuple[int, ...]]  # input → shape, with one sample
BatchAxes = Mapping[str, int | None]

TYPICAL, SHORT, LONG = "typical", "short", "long"
SHORTER, LONGER = "shorter", "longer"  # than any that the data have
LONGEST_FACTORS = (4, 2)  # of the typical length: what a long one is, as far as the original takes it
SHORTEST = (1, 2, 4, 8)
_MOST_FREE = 3  # independent free axes that are tried each on its own
_PICTURE_GRID = 32  # what convolutional networks halve five times
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class Shape:
    """`in_use`: whether the data or the job have it, or nothing is known of what is in use. `layout`: of the data's
    samples that have it, None where it has to be made of others."""

    label: str
    dims: Dims
    in_use: bool = True
    layout: Layout | None = None


@dataclass(frozen=True)
class Shapes:
    """`others`: each a list of alternatives, of which the first one counts that the original takes. `why`: in words,
    where they come from."""

    typical: Shape
    others: tuple[tuple[Shape, ...], ...]
    why: str


def _batch_axis(spec: TensorSpec, axes: BatchAxes) -> int | None:
    """The axis of the samples; None where that is fixed or missing."""
    axis = axes.get(spec.name, 0)
    free = axis is not None and axis < len(spec.shape) and isinstance(spec.shape[axis], str)
    return axis if free else None


def at_batch(
    inputs: Sequence[TensorSpec], dims: Mapping[str, Sequence[int]], batch: int, axes: BatchAxes | None
) -> Dims:
    """`dims` with `batch` samples."""
    axes = batch_axes(inputs) if axes is None else axes
    symbols = _batch_symbols(inputs, axes)
    found: Dims = {}
    for spec in inputs:
        shape = list(dims[spec.name])
        for axis, dim in enumerate(spec.shape):
            if axis == _batch_axis(spec, axes) or dim in symbols:
                shape[axis] = batch
        found[spec.name] = tuple(shape)
    return found


def free_axes(inputs: Sequence[TensorSpec], axes: BatchAxes | None = None) -> dict[str, list[tuple[str, int]]]:
    """The free axes as (input, axis), by their name: those of one symbolic name together; those without a name of their
    own ('?', say) each alone. What is computed of others (`past + 1`) is not free."""
    axes = batch_axes(inputs) if axes is None else axes
    symbols, named = _batch_symbols(inputs, axes), _names(inputs)
    found: dict[str, list[tuple[str, int]]] = {}
    for spec in inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, int) or axis == _batch_axis(spec, axes) or dim in symbols:
                continue
            if _IDENTIFIER.fullmatch(dim):
                found.setdefault(dim, []).append((spec.name, axis))
            elif computed(dim, dict.fromkeys(named, 1)) is None:
                found[f"{spec.name}[{axis}]"] = [(spec.name, axis)]
    return found


def with_sizes(
    inputs: Sequence[TensorSpec], base: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], axes: BatchAxes | None
) -> Dims:
    """`base` with these sizes of free axes, by name; axes that are computed of them follow."""
    free = free_axes(inputs, axes)
    shapes = {name: list(shape) for name, shape in base.items()}
    before = {name: base[places[0][0]][places[0][1]] for name, places in free.items()}
    for name, size in sizes.items():
        for tensor, axis in free[name]:
            shapes[tensor][axis] = size
    after = {**before, **sizes}
    for spec in inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str) and not _IDENTIFIER.fullmatch(dim):
                value = computed(dim, after)
                if value is not None and computed(dim, before) == base[spec.name][axis]:
                    shapes[spec.name][axis] = value
    return {name: tuple(shape) for name, shape in shapes.items()}


def layouts(path: Path, inputs: Sequence[TensorSpec], axes: BatchAxes | None = None) -> Counter[Layout]:
    """How many samples of a data set have which layout, from its headers alone. Raises StageFailure (DATA) where they
    cannot be read; arrays that are missing are left to who reads the samples."""
    names = {spec.name for spec in inputs}
    found: Counter[Layout] = Counter()
    with open_shards(path) as shards:
        for shard in shards:
            rows = in_rows(shard.members(), inputs, axes or batch_axes(inputs), shard.label)
            members = {n: m.shape for n, m in rows.items() if n in names}
            if members:
                count = min(shape[0] for shape in members.values())
                found[tuple((n, shape[1:]) for n, shape in sorted(members.items()))] += count
    return found


def timed_shapes(
    inputs: Sequence[TensorSpec],
    data: Mapping[Layout, int] | None,
    ranges: Mapping[str, Any] | None,
    axes: BatchAxes | None = None,
) -> Shapes:
    """The shapes to time at. `data`: see `layouts`; None without data. `ranges`: the job's `shapes`.

    From the data where their samples differ: the most frequent, the smallest and the largest. Else the job's min, opt
    and max. Else, by custom, a short and a long one beside the typical; they are not in use where the data know one.
    """
    free = free_axes(inputs, axes)
    found = [
        (layout, n) for layout, n in (data or {}).items() if n and {k for k, _ in layout} == {s.name for s in inputs}
    ]
    if found:
        made = [(of_layout(inputs, layout, axes), layout, n) for layout, n in found]
        made.sort(key=lambda m: _volume(free, m[0]))
        most = max(n for _, _, n in made)
        frequent = [m for m in made if m[2] == most]
        dims, layout, _ = frequent[len(frequent) // 2]
        typical = Shape(TYPICAL, dims, layout=layout)
        if len(made) > 1:
            outer = [Shape(label, d, layout=lay) for label, (d, lay, _) in ((SHORT, made[0]), (LONG, made[-1]))]
            own = tuple((end,) for end in outer if end.dims != typical.dims)
            return Shapes(typical, own, f"the data's own: {len(made)} shapes, the most frequent as typical")
        why = "the data's only one as typical"
    else:
        dims = at_batch(inputs, synthetic_shapes(inputs, 1, ranges), 1, axes)
        typical, why = Shape(TYPICAL, dims), "by custom, as neither data nor job say which are in use"
    if not free:
        return Shapes(typical, (), "the model's only one")
    if ranges:
        others = [
            (Shape(label, d),)
            for label in ("min", "max")
            if (d := _of_range(inputs, dims, ranges, label, axes)) != typical.dims
        ]
        if others or not found:
            return Shapes(typical, tuple(others), "the job's own" + (", the data's as typical" if found else ""))
        return Shapes(typical, (), "the only one of the data and the job")
    ends = [tuple(custom(inputs, typical.dims, label, axes, in_use=not found)) for label in (SHORT, LONG)]
    beside = f"{why}; a short and a long one by custom" if found else why
    return Shapes(typical, tuple(o for o in ends if o), beside)


def judged_shapes(
    inputs: Sequence[TensorSpec],
    data: Mapping[Layout, int] | None,
    ranges: Mapping[str, Any] | None,
    axes: BatchAxes | None = None,
) -> Shapes:
    """The shapes to judge answers at: those to time at; what lies beyond the data's own (not in use); each free axis at
    its ends alone where there are several; and none at all of it, as in a cache that is still empty."""
    found = timed_shapes(inputs, data, ranges, axes)
    free, typical = free_axes(inputs, axes), found.typical.dims
    others = list(found.others)
    if not free:
        return found
    own = [typical, *(shape.dims for way in others for shape in way if shape.layout is not None)]
    if len(own) > 1:
        volume = [_volume(free, dims) for dims in own]
        ends = ((SHORTER, own[volume.index(min(volume))]), (LONGER, own[volume.index(max(volume))]))
        others += [tuple(custom(inputs, dims, label, axes, in_use=False)) for label, dims in ends]
    if 1 < len(free) <= _MOST_FREE:
        for name, (tensor, axis) in ((n, places[0]) for n, places in free.items()):
            for way in found.others:
                alone = [
                    Shape(
                        f"{s.label} {name}", with_sizes(inputs, typical, {name: s.dims[tensor][axis]}, axes), s.in_use
                    )
                    for s in way
                ]
                others.append(tuple(s for s in alone if s.dims != typical))
    empty = [n for n, places in free.items() if not _is_picture_axis(inputs, places[0])] if not ranges else []
    others += [(Shape(f"empty {n}", with_sizes(inputs, typical, {n: 0}, axes), False),) for n in empty[:_MOST_FREE]]
    seen: list[Dims] = [typical]
    kept = []
    for way in others:
        new = tuple(shape for shape in way if shape.dims not in seen)
        seen += [shape.dims for shape in new]
        kept += [new] if new else []
    return Shapes(found.typical, tuple(kept), found.why)


def axis_sizes(
    inputs: Sequence[TensorSpec], dims: Mapping[str, Sequence[int]], axes: BatchAxes | None = None
) -> dict[str, int]:
    """The sizes of the free axes, by name."""
    return {name: dims[places[0][0]][places[0][1]] for name, places in free_axes(inputs, axes).items()}


def custom(
    inputs: Sequence[TensorSpec],
    base: Mapping[str, tuple[int, ...]],
    label: str,
    axes: BatchAxes | None,
    *,
    in_use: bool,
) -> Iterator[Shape]:
    """Alternatives of a short or a long shape beside `base`, the farthest first."""
    free = free_axes(inputs, axes)
    ends: dict[str, list[int]] = {}
    for name, places in free.items():
        tensor, axis = places[0]
        spec = next(s for s in inputs if s.name == tensor)
        if not _is_channel(spec, axis):
            ends[name] = _ends(base[tensor][axis], label, picture=_is_picture(spec, axis))
    for step in range(max((len(e) for e in ends.values()), default=0)):
        sizes = {name: e[min(step, len(e) - 1)] for name, e in ends.items() if e}
        yield Shape(label, with_sizes(inputs, base, sizes, axes), in_use)


def _ends(size: int, label: str, *, picture: bool) -> list[int]:
    if label in (SHORT, SHORTER):
        wanted: Sequence[int] = (_on_grid(size / 4), _on_grid(size / 2)) if picture else SHORTEST
        return [s for s in dict.fromkeys(wanted) if 0 < s < size]
    longer = (_on_grid(size * 1.5),) if picture else tuple(f * size for f in LONGEST_FACTORS)
    return [s for s in dict.fromkeys(longer) if s > size]


def _on_grid(size: float) -> int:
    return round(size / _PICTURE_GRID) * _PICTURE_GRID if size >= _PICTURE_GRID else max(1, int(size))


def _is_picture(spec: TensorSpec, axis: int) -> bool:
    return len(spec.shape) == 4 and axis >= 1 and spec.dtype.startswith(("float", "uint8", "bfloat"))


def _is_picture_axis(inputs: Sequence[TensorSpec], place: tuple[str, int]) -> bool:
    return any(spec.name == place[0] and _is_picture(spec, place[1]) for spec in inputs)


def _is_channel(spec: TensorSpec, axis: int) -> bool:
    """A picture's channels: no model takes another number of them, whatever it declares."""
    return _is_picture(spec, axis) and axis == 1 and isinstance(spec.shape[2], str) and isinstance(spec.shape[3], str)


def of_layout(inputs: Sequence[TensorSpec], layout: Layout, axes: BatchAxes | None) -> Dims:
    found: Dims = {}
    for spec in inputs:
        sample, axis = dict(layout)[spec.name], (axes or {}).get(spec.name, 0)
        at = 0 if axis is None else axis
        found[spec.name] = (*sample[:at], 1, *sample[at:]) if len(sample) < len(spec.shape) else sample
    return found


def _of_range(
    inputs: Sequence[TensorSpec], base: Dims, ranges: Mapping[str, Any], label: str, axes: BatchAxes | None
) -> Dims:
    free = free_axes(inputs, axes)
    sizes = {}
    for name, places in free.items():
        given = next((int(ranges[t][label][a]) for t, a in places if t in ranges and a < len(ranges[t][label])), None)
        if given is not None:
            sizes[name] = given
    return with_sizes(inputs, base, sizes, axes)


def _volume(free: Mapping[str, Sequence[tuple[str, int]]], dims: Mapping[str, tuple[int, ...]]) -> float:
    return math.prod(max(dims[places[0][0]][places[0][1]], 0.5) for places in free.values())


def _batch_symbols(inputs: Sequence[TensorSpec], axes: BatchAxes) -> set[str]:
    found = {spec.shape[axis] for spec in inputs if (axis := _batch_axis(spec, axes)) is not None}
    return {dim for dim in found if isinstance(dim, str) and _IDENTIFIER.fullmatch(dim)}


def _names(inputs: Sequence[TensorSpec]) -> set[str]:
    return {d for s in inputs for d in s.shape if isinstance(d, str) and _IDENTIFIER.fullmatch(d)}
