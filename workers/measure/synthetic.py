"""Random inputs of a model, where there is no data: plausible, seeded, never zeros where values matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.domain.failures import data_failure
from workers.kernel import TensorSpec

Array = np.ndarray[Any, Any]

DTYPE_ALIASES = {"float": "float32", "double": "float64", "half": "float16", "boolean": "bool"}


def numpy_dtype(spec: TensorSpec) -> np.dtype[Any]:
    """The numpy dtype of a tensor; raises StageFailure (`dataset_dtype_mismatch`) where numpy has none for it."""
    try:
        dtype = np.dtype(DTYPE_ALIASES.get(spec.dtype, spec.dtype))
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "fiubc":
        raise data_failure(
            "dataset_dtype_mismatch",
            f"Input {spec.name!r} has type {spec.dtype}, which a data set cannot hold.",
            tensor=spec.name,
            remedy="Use a model whose inputs are numbers or booleans.",
        )
    return dtype


def resolved_shape(spec: TensorSpec, batch: int, shapes: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """A concrete shape: fixed dims as they are, the first symbolic axis = `batch`, others from `shapes[name]["opt"]`,
    else by custom (images 224 × 224 × 3 channels, sequences 32)."""
    given = _opt(shapes, spec.name)
    out = []
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, int) and dim > 0:
            out.append(dim)
        elif axis == 0:
            out.append(batch)
        elif given is not None and axis < len(given):
            out.append(int(given[axis]))
        elif len(spec.shape) == 4 and spec.dtype.startswith(("float", "uint8", "bfloat")):
            out.append(3 if axis == 1 else 224)
        else:
            out.append(32)
    return tuple(out)


def synthetic_shapes(
    inputs: Sequence[TensorSpec], batch: int, shapes: Mapping[str, Any] | None
) -> dict[str, tuple[int, ...]]:
    """A concrete shape for every input, from the job's `shapes` or by custom; a symbolic name means one size, wherever
    it stands."""
    sizes: dict[str, int] = {}
    for spec in inputs:
        for dim, size in zip(spec.shape, _opt(shapes, spec.name) or (), strict=False):
            if isinstance(dim, str) and dim:
                sizes.setdefault(dim, int(size))
    found = {}
    for spec in inputs:
        shape = list(resolved_shape(spec, batch, shapes))
        if _opt(shapes, spec.name) is None:
            for axis, dim in enumerate(spec.shape[1:], start=1):
                if isinstance(dim, str):
                    shape[axis] = sizes.get(dim, shape[axis])
        found[spec.name] = tuple(shape)
    return found


def synthetic_feeds(
    inputs: Sequence[TensorSpec], batch: int, shapes: Mapping[str, Any] | None, seed: int
) -> dict[str, Array]:
    """Plausible random inputs: floats N(0, 1), small integers for ids, ones for masks, zeros for token types.

    `shapes`: input name → {"min", "opt", "max"}, as in the job's spec, or None. Integers stay below 10, which every
    embedding table holds. The same seed gives the same arrays.
    """
    return random_feeds(inputs, synthetic_shapes(inputs, batch, shapes), seed)


def random_feeds(inputs: Sequence[TensorSpec], dims: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    """As `synthetic_feeds`, in these shapes: input name → shape, the batch included."""
    rng = np.random.default_rng(seed)
    return {spec.name: _plausible(spec, dims[spec.name], rng) for spec in inputs}


def _opt(shapes: Mapping[str, Any] | None, name: str) -> Sequence[int] | None:
    entry = (shapes or {}).get(name)
    return None if entry is None else entry["opt"]


def _plausible(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    dtype, name = numpy_dtype(spec), spec.name.lower()
    if "mask" in name:
        return np.ones(shape, dtype)
    if dtype.kind in "fc":
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    if "token_type" in name or "segment" in name:
        return np.zeros(shape, dtype)
    if "position" in name and len(shape) > 1:
        return np.ascontiguousarray(np.broadcast_to(np.arange(shape[-1]), shape)).astype(dtype)
    if dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    high = 256 if dtype == np.uint8 and len(shape) >= 3 else 10
    return np.asarray(rng.integers(0, high, shape)).astype(dtype)
