"""Samples as rows and in the model's own layout, where the batch may stand on any axis or on none; and the first ones
of a data set, enough to run a model once without reading it all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workers.kernel import TensorSpec
from workers.measure.arrays import check_input
from workers.measure.npz import Member, guarded, open_shards
from workers.measure.synthetic import numpy_dtype

Array = np.ndarray[Any, Any]
Axes = Mapping[str, int | None]

_MOST_LAYOUTS = 4
_MOST_SHARDS = 64


def stored_shapes(path: Path, inputs: Sequence[TensorSpec]) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of the inputs' arrays in the first shards, as they are stored."""
    names = {spec.name for spec in inputs}
    with open_shards(path) as shards:
        found = [
            {n: m.stored for n, m in shard.members().items() if n in names}
            for shard, _ in zip(shards, range(_MOST_SHARDS), strict=False)
        ]
    return [shapes for shapes in found if set(shapes) == names]


def first_samples(path: Path, inputs: Sequence[TensorSpec], axes: Axes, rows: int) -> list[dict[str, Array]]:
    """Up to `rows` samples of each of the first few layouts (shapes of a sample) that the shards have.

    Raises StageFailure (DATA) where an array does not fit the model or cannot be read; shards that lack an input are
    left to who reads them all.
    """
    found: dict[tuple[Any, ...], dict[str, Array]] = {}
    with open_shards(path) as shards:
        for shard, _ in zip(shards, range(_MOST_SHARDS), strict=False):
            stored = shard.members()
            if any(spec.name not in stored for spec in inputs):
                continue
            members = in_rows(stored, inputs, axes, shard.label)
            for spec in inputs:
                check_input(shard.label, spec, numpy_dtype(spec), members[spec.name], axes.get(spec.name, 0))
            layout = tuple(members[s.name].shape[1:] for s in inputs)
            count = min(rows, *(members[s.name].shape[0] for s in inputs))
            if layout in found or count == 0:
                continue
            with guarded(shard.label):
                found[layout] = {spec.name: _read(members[spec.name], count) for spec in inputs}
            if len(found) == _MOST_LAYOUTS:
                break
    return list(found.values())


def in_rows(members: Mapping[str, Member], inputs: Sequence[TensorSpec], axes: Axes, label: str) -> dict[str, Member]:
    """The arrays of a shard with their samples first. One that is whole in every sample is repeated as often as there
    are samples; where all inputs are, the shard is one sample."""
    known = [s for s in inputs if s.name in members]
    batched = [(s.name, axis) for s in known if (axis := axes.get(s.name, 0)) is not None]
    rows = min((members[n].stored[a] for n, a in batched if a < len(members[n].stored)), default=1)
    names = {spec.name for spec in known}
    return {n: m.along(axes.get(n, 0), rows, label) if n in names else m for n, m in members.items()}


def in_layout(rows: Array, axis: int | None) -> Array:
    """An array with its samples first, as the model takes it."""
    if axis is None:
        whole: Array = rows[0, ...]  # of a single number too, an array
        return whole
    return rows if axis == 0 else np.ascontiguousarray(np.moveaxis(rows, 0, axis))


def taken(array: Array, axis: int | None, rows: Array) -> Array:
    """These samples of an array in the model's layout; the whole of it where it has none."""
    return array if axis is None else np.take(array, rows % array.shape[axis], axis=axis)


def count(arrays: Mapping[str, Array], axes: Axes) -> int:
    """How many samples there are; 1 where no array has a batch axis."""
    return next((arrays[n].shape[axis] for n, axis in axes.items() if axis is not None), 1)


def joined(arrays: Sequence[Array], axis: int | None) -> Array:
    """The samples of several arrays; of arrays that are whole in every sample, the first."""
    return arrays[0] if axis is None else np.concatenate(arrays, axis)


def sliced(array: Array, axis: int | None, start: int, stop: int) -> Array:
    """A view of samples `start` to `stop` in the model's layout; the whole of it where it has none."""
    if axis is None:
        return array
    view: Array = array[(*[slice(None)] * axis, slice(start, stop))]
    return view


def _read(member: Member, count: int) -> Array:
    with member.reader() as reader:
        return in_layout(reader.read_rows(count), member.axis)
