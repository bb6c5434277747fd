"""Random inputs of a model, where there is no data: plausible, seeded, never zeros where values matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.domain.failures import data_failure
from workers.kernel import TensorSpec
from workers.measure.axes import batch_axes, computed

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


def resolved_shape(
    spec: TensorSpec, batch: int, shapes: Mapping[str, Any] | None = None, axis: int | None = 0
) -> tuple[int, ...]:
    """A concrete shape: fixed dims as they are, the symbolic batch axis `axis` = `batch`, others from
    `shapes[name]["opt"]`, else by custom (images 224 × 224 × 3 channels, sequences 32)."""
    given = _opt(shapes, spec.name)
    out = []
    for at, dim in enumerate(spec.shape):
        if isinstance(dim, int) and dim > 0:
            out.append(dim)
        elif at == axis:
            out.append(batch)
        elif given is not None and at < len(given):
            out.append(int(given[at]))
        elif len(spec.shape) == 4 and spec.dtype.startswith(("float", "uint8", "bfloat")):
            out.append(3 if at == 1 else 224)
        else:
            out.append(32)
    return tuple(out)


def synthetic_shapes(
    inputs: Sequence[TensorSpec], batch: int, shapes: Mapping[str, Any] | None
) -> dict[str, tuple[int, ...]]:
    """A concrete shape for every input, from the job's `shapes` or by custom. A symbolic name means one size, wherever
    it stands; a sum or product of names follows them."""
    axes = batch_axes(inputs)
    sizes: dict[str, int] = {}
    for spec in inputs:
        axis = axes[spec.name]
        if axis is not None and isinstance(dim := spec.shape[axis], str) and dim:
            sizes.setdefault(dim, batch)
    for spec in inputs:
        for dim, size in zip(spec.shape, _opt(shapes, spec.name) or (), strict=False):
            if isinstance(dim, str) and dim:
                sizes.setdefault(dim, int(size))
    found = {}
    for spec in inputs:
        made = resolved_shape(spec, batch, shapes, axes[spec.name])
        for dim, size in zip(spec.shape, made, strict=True):
            if isinstance(dim, str) and dim.isidentifier():
                sizes.setdefault(dim, size)
        found[spec.name] = made
    for spec in inputs:
        shape = list(found[spec.name])
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                known = sizes.get(dim, computed(dim, sizes))
                shape[axis] = shape[axis] if known is None else known
        found[spec.name] = tuple(shape)
    return found


def synthetic_feeds(
    inputs: Sequence[TensorSpec], batch: int, shapes: Mapping[str, Any] | None, seed: int
) -> dict[str, Array]:
    """Plausible random inputs: floats N(0, 1), ids of a table all over it, other integers small, ones for masks, zeros
    for token types.

    `shapes`: input name → {"min", "opt", "max"}, as in the job's spec, or None. The same seed gives the same arrays.
    """
    return random_feeds(inputs, synthetic_shapes(inputs, batch, shapes), seed)


def random_feeds(inputs: Sequence[TensorSpec], dims: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    """As `synthetic_feeds`, in these shapes: input name → shape, the batch included."""
    rng = np.random.default_rng(seed)
    sizes = {dim: size for s in inputs for dim, size in zip(s.shape, dims[s.name], strict=True) if isinstance(dim, str)}
    return {spec.name: _plausible(spec, dims[spec.name], rng, sizes) for spec in inputs}


def _opt(shapes: Mapping[str, Any] | None, name: str) -> Sequence[int] | None:
    entry = (shapes or {}).get(name)
    return None if entry is None else entry["opt"]


def _plausible(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator, sizes: Mapping[str, int]) -> Array:
    dtype, name = numpy_dtype(spec), spec.name.lower()
    low, high = _bounds(spec, sizes)
    if "mask" in name:
        return np.ones(shape, dtype)
    if high is not None and not any(word in name for word in ("token_type", "segment", "position")):
        return np.asarray(rng.integers(low, high + 1, shape)).astype(dtype)
    if dtype.kind in "fc":
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    if "token_type" in name or "segment" in name:
        return np.zeros(shape, dtype)
    if "position" in name and len(shape) > 1:
        steps = np.minimum(np.arange(shape[-1]), shape[-1] if high is None else high)
        return np.ascontiguousarray(np.broadcast_to(steps, shape)).astype(dtype)
    if dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    high = 256 if dtype == np.uint8 and len(shape) >= 3 else 10
    return np.asarray(rng.integers(0, high, shape)).astype(dtype)


def _bounds(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, int | None]:
    """The whole numbers that an input may hold, both included; no highest where nothing bounds them."""
    if spec.values is None:
        return 0, None
    low, high = spec.values
    if isinstance(high, str):
        high = sizes.get(high, 1) - (low < 1)
    return low, max(low, high)
