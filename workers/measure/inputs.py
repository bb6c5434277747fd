"""The distinct inputs a benchmark rotates through: the user's samples where there are any, else random ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app.domain.axes import BATCH
from workers.data import Samples, synthetic_feeds
from workers.kernel import TensorSpec
from workers.measure.axes import batch_axes, fixed_batch
from workers.measure.fitting import fitted
from workers.measure.rows import sliced, taken
from workers.measure.shapes import BatchAxes, Shape, at_batch, layouts, timed_shapes
from workers.measure.synthetic import random_feeds

Array = np.ndarray[Any, Any]

DISTINCT = 8  # at least as many inputs in turn, never zeros, never one tensor
_CAP_BYTES = 128 << 20


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
        axes = batch_axes(inputs) if axes is None else axes
        self.inputs, self.axes = inputs, axes
        self._file, self._outputs = file, outputs
        self._ranges, self._seed = ranges, seed
        found = None if file is None else layouts(file, inputs, axes)
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
    axes = batch_axes(inputs)
    words = f"{DISTINCT} distinct inputs for each batch size, rotated, made of "
    if all(axis is None for axis in axes.values()):  # every sample is an input by itself
        whole = [b.feeds for b, _ in zip(samples.batches(1), range(DISTINCT), strict=False)]
        rotated = [whole[i % len(whole)] for i in range(DISTINCT)]
        return dict.fromkeys(batch_sizes, rotated), f"{words}{len(whole)} samples of the data set"
    pool, rows, real = _pool(inputs, samples, max(batch_sizes), shapes, seed)
    words += f"{real} samples of the data set"
    if real < min(DISTINCT, rows):
        words += f" and {DISTINCT - real} random ones (the data set has too few)"
    return {b: _cut(pool, axes, rows, b) for b in batch_sizes}, words


def _synthetic(
    inputs: Sequence[TensorSpec], batch: int, shapes: Mapping[str, Any] | None, seed: int
) -> list[dict[str, Array]]:
    first = synthetic_feeds(inputs, batch, shapes, seed)
    size = sum(a.nbytes for a in first.values())
    if size * DISTINCT <= _CAP_BYTES or fixed_batch(inputs) is not None:
        return [first, *(synthetic_feeds(inputs, batch, shapes, seed + i) for i in range(1, DISTINCT))]
    del first
    return _views(synthetic_feeds(inputs, batch + DISTINCT - 1, shapes, seed), batch_axes(inputs), batch)


def _pool(
    inputs: Sequence[TensorSpec], samples: Samples, largest: int, shapes: Mapping[str, Any] | None, seed: int
) -> tuple[dict[str, Array], int, int]:
    """Samples to cut inputs from, how many, and how many of them are real. Where there are too few, plain numbers are
    drawn beside them; ids are not: which ones the model knows, only the data say."""
    axes = batch_axes(inputs)
    pieces: list[dict[str, Array]] = []
    count = size = 0
    for batch in samples.batches(min(largest, 64)):
        if pieces and any(a is None and not np.array_equal(pieces[0][n], batch.feeds[n]) for n, a in axes.items()):
            continue
        pieces.append(batch.feeds)
        count += len(batch)
        size += sum(a.nbytes for a in batch.feeds.values())
        if count >= DISTINCT * largest or (count >= DISTINCT and size > _CAP_BYTES):
            break
    rows = count
    if count < DISTINCT and all(a.dtype.kind in "fc" for a in pieces[0].values()):
        free = [TensorSpec(s.name, s.dtype, _free(pieces[0][s.name].shape, axes[s.name])) for s in inputs]
        pieces.append(synthetic_feeds(free, DISTINCT - count, shapes, seed))
        rows = DISTINCT
    return (
        {n: pieces[0][n] if a is None else np.concatenate([p[n] for p in pieces], a) for n, a in axes.items()},
        rows,
        count,
    )


def _free(shape: tuple[int, ...], axis: int | None) -> tuple[int | str, ...]:
    return tuple(BATCH if at == axis else size for at, size in enumerate(shape))


def _cut(pool: dict[str, Array], axes: BatchAxes, rows: int, batch: int) -> list[dict[str, Array]]:
    row_bytes = sum(a.nbytes for a in pool.values()) // rows
    if row_bytes * batch * DISTINCT > _CAP_BYTES:
        order = np.arange(batch + DISTINCT - 1)
        return _views({n: taken(a, axes[n], order) for n, a in pool.items()}, axes, batch)
    step = max(1, rows // DISTINCT)
    return [{n: taken(a, axes[n], i * step + np.arange(batch)) for n, a in pool.items()} for i in range(DISTINCT)]


def _views(arrays: dict[str, Array], axes: BatchAxes, batch: int) -> list[dict[str, Array]]:
    """Inputs that overlap in memory, each one sample further: large batches cost one copy, not eight."""
    return [{n: sliced(a, axes[n], i, i + batch) for n, a in arrays.items()} for i in range(DISTINCT)]
