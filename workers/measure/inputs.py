"""The distinct inputs a benchmark rotates through: the user's samples where there are any, else random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workers.data import Samples, synthetic_feeds
from workers.kernel import TensorSpec

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


def rotating_feeds(
    inputs: Sequence[TensorSpec],
    batch_sizes: Sequence[int],
    samples: Samples | None,
    shapes: Mapping[str, Any] | None,
    seed: int,
) -> tuple[dict[int, list[dict[str, Array]]], str]:
    """`DISTINCT` inputs for each batch size, and in words where they come from."""
    if samples is None:
        feeds = {b: _synthetic(inputs, b, shapes, seed) for b in batch_sizes}
        return feeds, f"{DISTINCT} distinct random inputs, rotated (no data set was given)"
    pool, real = _pool(inputs, samples, max(batch_sizes), shapes, seed)
    words = f"{DISTINCT} distinct inputs for each batch size, rotated, made of {real} samples of the data set"
    if real < DISTINCT:
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
    """Rows to cut inputs from (those with the first sample's shape), and how many of them are real."""
    pieces: list[dict[str, Array]] = []
    count = size = 0
    for batch in samples.batches(min(largest, 64)):
        if pieces and any(a.shape[1:] != pieces[0][n].shape[1:] for n, a in batch.feeds.items()):
            continue
        pieces.append(batch.feeds)
        count += len(batch)
        size += sum(a.nbytes for a in batch.feeds.values())
        if count >= DISTINCT * largest or (count >= DISTINCT and size > _CAP_BYTES):
            break
    if count < DISTINCT:
        free = [TensorSpec(s.name, s.dtype, ("batch", *pieces[0][s.name].shape[1:])) for s in inputs]
        pieces.append(synthetic_feeds(free, DISTINCT - count, shapes, seed))
    return {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}, count


def _cut(pool: dict[str, Array], batch: int) -> list[dict[str, Array]]:
    rows = len(next(iter(pool.values())))
    row_bytes = sum(a.nbytes for a in pool.values()) // rows
    if row_bytes * batch * DISTINCT > _CAP_BYTES:
        order = np.arange(batch + DISTINCT - 1) % rows
        return _views({n: a[order] for n, a in pool.items()}, batch)
    step = rows // DISTINCT
    return [{n: a[(i * step + np.arange(batch)) % rows] for n, a in pool.items()} for i in range(DISTINCT)]


def _views(arrays: dict[str, Array], batch: int) -> list[dict[str, Array]]:
    """Inputs that overlap in memory, each one sample further: large batches cost one copy, not eight."""
    whole = batch + DISTINCT - 1
    return [
        {n: a[i : i + batch] if a.ndim and len(a) == whole else a for n, a in arrays.items()} for i in range(DISTINCT)
    ]
