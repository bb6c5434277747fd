"""Sizes to which requests of a traffic may be filled up, so that those of other sizes share a batch."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

from workers.measure.load.mix import Kind, Mix
from workers.serving.probe import Arrays

_MOST_BUCKETS = 4
Sizes = dict[str, dict[int, tuple[int, ...]]]


def buckets_of(mix: Mix, batched: Collection[str]) -> Sizes:
    """Input → axis → sizes, of every axis beyond the batch that differs among the requests: sizes that occur, at most
    four, each for about as many requests as the others and the last for the largest. Empty where all are of one shape,
    or where what differs is not an input along whose first axis the samples lie (`batched`)."""
    first = mix.kinds[0].dims
    if any(len(kind.dims[name]) != len(shape) for kind in mix.kinds for name, shape in first.items()):
        return {}
    axes = [
        (name, axis)
        for name, shape in first.items()
        for axis in range(0 if name not in batched else 1, len(shape))
        if len({kind.dims[name][axis] for kind in mix.kinds}) > 1
    ]
    if not axes or any(name not in batched for name, _ in axes):
        return {}
    kinds = sorted(mix.kinds, key=lambda kind: [_elements(kind), *(kind.dims[n][a] for n, a in axes)])
    found: Sizes = {}
    for name, axis in axes:
        sizes: list[int] = []
        largest, share = 0, 0.0
        for kind, after in pairwise([*kinds, None]):
            assert kind is not None
            largest, share = max(largest, kind.dims[name][axis]), share + kind.share
            if after is None or share >= (len(sizes) + 1) / _MOST_BUCKETS - 1e-9:
                sizes.append(largest)
        found.setdefault(name, {})[axis] = tuple(sorted(set(sizes)))
    return found


def samples_of(mix: Mix, batched: Collection[str]) -> list[Arrays]:
    """One of each kind of request: the first sample of its first one."""
    return [
        {name: array[:1] if name in batched else array for name, array in kind.feeds[0].items()} for kind in mix.kinds
    ]


def _elements(kind: Kind) -> int:
    return sum(array.size for array in kind.feeds[0].values()) // kind.batch
