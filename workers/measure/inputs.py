"""The distinct inputs a benchmark rotates through: the user's samples where there are any, else random ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workers.data import Samples, synthetic_feeds
from workers.kernel import TensorSpec
from workers.measure.fitting import fitted
from workers.measure.shapes import BatchAxes, Shape, at_batch, layouts, timed_shapes
from workers.measure.synthetic import random_feeds

Array = np.ndarray[Any, Any]

DISTINCT = 8  # at least as many inputs in turn, never zeros, never one tensor
_CAP_BYTES = 128 << 20


def fixed_batch(inputs: Sequence[TensorSpec]) -> int | None:
    """The one batch size that the model takes, or None where its first axis is free (for at least one input)."""
    first = [spec.shape[0] for spec in inputs if spec.shape]
    if not first or any(not isinstance(dim, int) or dim <= 0 for dim in first):
        return None
    assert isinstance(first[0], int)
    return first[0]


class InputSource:
    """Makes the inputs of a benchmark. `file`: the data set, or None. `ranges`: the job's `shapes`."""

    def __init__(
        self,
        file: Path | None,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        ranges: Mapping[str, Any] | None,
        seed: int,
        axes: BatchAxes | None = None,
    ) -> None:
        self.inputs, self.axes = inputs, axes
        self._file, self._outputs = file, outputs
        self._ranges, self._seed = ranges, seed
        found = None if file is None else layouts(file, inputs)
        self.shapes = timed_shapes(inputs, found, ranges, axes)

    def typical(self, batch_sizes: Sequence[int]) -> tuple[dict[int, list[dict[str, Array]]], str]:
        """`DISTINCT` inputs for each batch size at the typical shape, and in words where they come from."""
        samples = self._samples(self.shapes.typical, DISTINCT * max(batch_sizes))
        return rotating_feeds(self.inputs, batch_sizes, samples, self._ranges, self._seed)

    def growth(self, shape: Shape) -> float:
        """How much more there is in an input of this shape than in one of the typical."""
        sizes = [sum(math.prod(d) for d in dims.values()) for dims in (shape.dims, self.shapes.typical.dims)]
        return sizes[0] / max(sizes[1], 1)

    def at(self, shape: Shape, batch: int) -> list[dict[str, Array]]:
        """`DISTINCT` inputs at this shape: of the data's samples that have it, else of others cut or repeated along
        their axes, else random ones."""
        dims = at_batch(self.inputs, shape.dims, batch, self.axes)
        if self._file is None:
            return [random_feeds(self.inputs, dims, self._seed + i) for i in range(DISTINCT)]
        samples = self._samples(shape if shape.layout else self.shapes.typical, DISTINCT * batch)
        feeds = rotating_feeds(self.inputs, [batch], samples, self._ranges, self._seed)[0][batch]
        return [fitted(self.inputs, arrays, dims, offset=i) for i, arrays in enumerate(feeds)]

    def _samples(self, shape: Shape, most: int) -> Samples | None:
        if self._file is None:
            return None
        return Samples(self._file, self.inputs, self._outputs, max_samples=most, layout=shape.layout)


def rotating_feeds(
    inputs: Sequence[TensorSpec],
    batch_sizes: Sequence[int],
    samples: Samples | None,
    shapes: Mapping[str, Any] | None,
    seed: int,
) -> tuple[dict[int, list[dict[str, Array]]], str]:
    """`DISTINCT` inputs for each batch size, and in words where they come from. `samples`: all of one shape."""
    if samples is None:
        feeds = {b: _synthetic(inputs, b, shapes, seed) for b in batch_sizes}
        return feeds, f"{DISTINCT} distinct random inputs, rotated (no data set was given)"
    pool, real = _pool(inputs, samples, max(batch_sizes), shapes, seed)
    words = f"{DISTINCT} distinct inputs for each batch size, rotated, made of {real} samples of the data set"
    if real < DISTINCT and len(next(iter(pool.values()))) > real:
        words += f" and {DISTINCT - real} random ones (the data set has too few)"
    return {b: _cut(pool, b) for b in batch_sizes}, words


def _synthetic(
    inputs: Sequence[TensorSpec], batch: int, shapes: Mapping[str, Any] | None, seed: int
) -> list[dict[str, Array]]:
    first = synthetic_feeds(inputs, batch, shapes, seed)
    size = sum(a.nbytes for a in first.values())
    if size * DISTINCT <= _CAP_BYTES or fixed_batch(inputs) is not None:
        return [first, *(synthetic_feeds(inputs, batch, shapes, seed + i) for i in range(1, DISTINCT))]
    del first
    return _views(synthetic_feeds(inputs, batch + DISTINCT - 1, shapes, seed), batch)


def _pool(
    inputs: Sequence[TensorSpec], samples: Samples, largest: int, shapes: Mapping[str, Any] | None, seed: int
) -> tuple[dict[str, Array], int]:
    """Rows to cut inputs from, and how many of them are real. Where there are too few, plain numbers are drawn beside
    them; ids are not: which ones the model knows, only the data say."""
    pieces: list[dict[str, Array]] = []
    count = size = 0
    for batch in samples.batches(min(largest, 64)):
        pieces.append(batch.feeds)
        count += len(batch)
        size += sum(a.nbytes for a in batch.feeds.values())
        if count >= DISTINCT * largest or (count >= DISTINCT and size > _CAP_BYTES):
            break
    if count < DISTINCT and all(a.dtype.kind in "fc" for a in pieces[0].values()):
        free = [TensorSpec(s.name, s.dtype, ("batch", *pieces[0][s.name].shape[1:])) for s in inputs]
        pieces.append(synthetic_feeds(free, DISTINCT - count, shapes, seed))
    return {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}, count


def _cut(pool: dict[str, Array], batch: int) -> list[dict[str, Array]]:
    rows = len(next(iter(pool.values())))
    row_bytes = sum(a.nbytes for a in pool.values()) // rows
    if row_bytes * batch * DISTINCT > _CAP_BYTES:
        order = np.arange(batch + DISTINCT - 1) % rows
        return _views({n: a[order] for n, a in pool.items()}, batch)
    step = max(1, rows // DISTINCT)
    return [{n: a[(i * step + np.arange(batch)) % rows] for n, a in pool.items()} for i in range(DISTINCT)]


def _views(arrays: dict[str, Array], batch: int) -> list[dict[str, Array]]:
    """Inputs that overlap in memory, each one sample further: large batches cost one copy, not eight."""
    whole = batch + DISTINCT - 1
    return [
        {n: a[i : i + batch] if a.ndim and len(a) == whole else a for n, a in arrays.items()} for i in range(DISTINCT)
    ]
