"""The parts of a data set: what calibrates, what the search looks at, what gives the verdict. They go by the digests of
the samples: equal ones never stand on two sides, whatever their order in the file."""

from __future__ import annotations

from typing import Any

import numpy as np

from workers.measure.shares import Part, selecting

Array = np.ndarray[Any, Any]


def part_of(digest: str) -> Part:
    """Which side of the calibration/validation split a sample stands on. It depends on the sample's content alone:
    'calibration' where the first 32 bits of the digest are an even number."""
    return "calibration" if int(digest[:8], 16) % 2 == 0 else "validation"


def members(digests: Array, part: Part, *, shared: bool, eligible: Array) -> Array:
    """Which samples are of this part: [n] booleans from their digests, [n, 32] bytes.

    calibration, validation: the two sides of a data set that serves for both (`part_of`). Where all samples of a small
    one fall on the same side, half of the distinct ones change it. select, confirm: of the samples that judge, all of
    the data set or (`shared`) its validation side; the third of the distinct ones with the smallest digests selects. A
    single sample does both. `eligible`: the others are left out before that is counted.
    """
    if part == "all":
        return eligible
    if part in ("calibration", "validation") or shared:
        calibrates = _calibrates(digests)
        eligible = eligible & (calibrates if part == "calibration" else ~calibrates)
    if part in ("calibration", "validation") or not eligible.any():
        return eligible
    rank, distinct = _ranks(digests[eligible])
    selects = rank < selecting(distinct)
    found = np.zeros(len(digests), bool)
    found[eligible] = selects if part == "select" else ~selects | (distinct == 1)
    return found


def _calibrates(digests: Array) -> Array:
    even = digests[:, 3] % 2 == 0
    if even.any() and not even.all():
        return np.asarray(even)
    rank, distinct = _ranks(digests)
    return np.asarray(even if distinct < 2 else rank < distinct // 2)


def _ranks(digests: Array) -> tuple[Array, int]:
    """Of each sample the rank of its digest among the distinct ones, and how many there are."""
    words = np.ascontiguousarray(digests).view(">u8")
    distinct, inverse = np.unique(words, axis=0, return_inverse=True)
    return inverse.ravel(), len(distinct)
