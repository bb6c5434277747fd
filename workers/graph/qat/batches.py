"""Samples in an order by chance, the same every time, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from workers.data import LABELS, Batch, Samples
from workers.measure.arrays import is_one_hot
from workers.measure.rows import joined, taken

Array = np.ndarray[Any, Any]

_HELD_BYTES = 64 << 20  # that are shuffled among each other


def shuffled(samples: Samples, size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """One pass: batches of `size` of one layout each, drawn from as many neighbours in the file as 64 MiB hold. A rest
    that fills no batch is left out, unless it is all there is."""
    chance = np.random.default_rng([seed, epoch])
    held: list[Batch] = []
    given = False
    for batch in samples.batches(size):
        if held and (sum(map(_bytes, held)) > _HELD_BYTES or _layout(held[0]) != _layout(batch)):
            for made in _drawn(held, size, chance, whole=given):
                given = True
                yield made
            held = []
        held.append(batch)
    for made in _drawn(held, size, chance, whole=given):
        given = True
        yield made


def labels_of(batch: Batch) -> Array | None:
    """Class numbers where the labels are written out as ones among zeros, too."""
    labels = batch.references.get(LABELS)
    return labels.argmax(axis=1) if labels is not None and is_one_hot(labels) else labels


def _drawn(held: Sequence[Batch], size: int, chance: np.random.Generator, *, whole: bool) -> Iterator[Batch]:
    if not held:
        return
    axes = held[0].axes
    if all(axis is None for axis in axes.values()):  # a sample each
        for i in chance.permutation(len(held)):
            yield held[i]
        return
    feeds = {n: joined([b.feeds[n] for b in held], axis) for n, axis in axes.items()}
    references = {n: np.concatenate([b.references[n] for b in held]) for n in held[0].references}
    digests = [d for b in held for d in b.digests]
    order = chance.permutation(len(digests))
    last = len(order) // size * size if whole or len(order) >= size else len(order)
    for start in range(0, last, size):
        rows = order[start : start + size]
        yield Batch(
            {n: taken(a, axes[n], rows) for n, a in feeds.items()},
            {n: a[rows] for n, a in references.items()},
            [digests[i] for i in rows],
            axes,
        )


def _bytes(batch: Batch) -> int:
    return sum(a.nbytes for a in (*batch.feeds.values(), *batch.references.values()))


def _layout(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Shapes of a sample; what is whole in every sample has to be the same, too."""
    found = []
    for name, axis in sorted(batch.axes.items()):
        shape = batch.feeds[name].shape
        found.append(shape if axis is None else shape[:axis] + shape[axis + 1 :])
    return (*found, *(a.shape[1:] for _, a in sorted(batch.references.items())))
