"""Samples made to another shape: cut or repeated along their axes, so that lengths and sizes that a data set does not
have are tried with values that it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workers.kernel import TensorSpec

Array = np.ndarray[Any, Any]


def fitted(
    inputs: Sequence[TensorSpec], arrays: Mapping[str, Array], dims: Mapping[str, tuple[int, ...]], offset: int
) -> dict[str, Array]:
    """`arrays` in the shapes `dims`. What is cut starts at `offset` (modulo what there is): a cut of length one is not
    the same start token every time. Masks that a cut leaves empty are filled; lengths stay within what is left."""
    found = {}
    for spec in inputs:
        array = arrays[spec.name]
        name = spec.name.lower()
        for axis, size in enumerate(dims[spec.name]):
            have = array.shape[axis]
            if size == have or (have == 0 and size > 0):
                continue
            first = offset % (have - size + 1) if size < have else 0
            array = np.take(array, (first + np.arange(size)) % max(have, 1), axis=axis)
        if "mask" in name and array.size and array.ndim > 1:
            empty = ~array.reshape(len(array), -1).any(axis=1)
            array = np.where(empty.reshape(-1, *[1] * (array.ndim - 1)), np.ones_like(array), array)
        found[spec.name] = np.asarray(array, order="C")
    longest = max((s for d in dims.values() for s in d[1:2]), default=0)
    for spec in inputs:
        array = found[spec.name]
        if "len" in spec.name.lower() and array.dtype.kind in "iu" and array.ndim == 1 and longest:
            found[spec.name] = np.minimum(array, longest).astype(array.dtype)
    return found
