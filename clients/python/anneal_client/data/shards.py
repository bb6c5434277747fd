"""Shards: batches are gathered by the shapes of their samples and written when there are enough of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anneal_client.errors import ConversionFailed
from anneal_client.exporting.checks import need
from anneal_client.prepared import Dataset

SHARD_BYTES = 64 << 20
HELD_BYTES = 256 << 20  # of samples that wait for others of their shapes

Shapes = tuple[tuple[str, Any, tuple[int, ...]], ...]


class ShardWriter:
    """Writes one data set. `axes`: of arrays whose samples do not lie along the first axis, which it is; None for one
    that is given whole with every shard. `max_samples`: more are left out."""

    def __init__(
        self, name: str, *, axes: Mapping[str, int | None] | None = None, max_samples: int | None = None
    ) -> None:
        self._np = need("numpy", "data")
        self._axes = dict(axes or {})
        told = {n: {"batch_axis": axis} for n, axis in self._axes.items()}
        self._made = Dataset(f"{name}", told)
        self._made.path.mkdir()
        self._left = max_samples
        self._waiting: dict[Shapes, list[dict[str, Any]]] = {}
        self._bytes: dict[Shapes, int] = {}
        self._shards = 0

    @property
    def full(self) -> bool:
        """Whether there are `max_samples`."""
        return self._left is not None and self._left <= 0

    def add(self, batch: Mapping[str, Any]) -> None:
        """Samples, by the name of the model's input (or `labels`, or the model's output). Raises `ConversionFailed`:
        arrays that differ in how many samples they have, or hold no numbers."""
        arrays = {name: self._array(name, value) for name, value in batch.items()}
        size = self._size(arrays)
        if self._left is not None:
            size = min(size, self._left)
            self._left -= size
            arrays = {n: self._cut(n, a, size) for n, a in arrays.items()}
        if size == 0:
            return
        key: Shapes = tuple((n, a.dtype, self._sample_shape(n, a)) for n, a in sorted(arrays.items()))
        self._waiting.setdefault(key, []).append(arrays)
        self._bytes[key] = self._bytes.get(key, 0) + sum(a.nbytes for a in arrays.values())
        self._made.samples += size
        if self._bytes[key] >= SHARD_BYTES:
            self._write(key)
        while sum(self._bytes.values()) > HELD_BYTES:
            self._write(max(self._bytes, key=self._bytes.__getitem__))

    def finish(self) -> Dataset:
        """The data set; a single shard is an `.npz`, several are a folder of them. Raises `ConversionFailed` where
        there is no sample."""
        for key in list(self._waiting):
            self._write(key)
        if self._made.samples == 0:
            raise ConversionFailed("no_samples", "There is no sample in what was given.")
        folder = self._made.path
        if self._shards == 1:
            single = folder.with_name(f"{folder.name}.npz")
            next(folder.iterdir()).rename(single)
            folder.rmdir()
            self._made.path = single
        return self._made

    def _write(self, key: Shapes) -> None:
        batches = self._waiting.pop(key)
        del self._bytes[key]
        joined = {
            name: self._np.concatenate([b[name] for b in batches], axis)
            if (axis := self._axes.get(name, 0)) is not None
            else batches[0][name]
            for name in batches[0]
        }
        self._np.savez(Path(self._made.path, f"shard-{self._shards:05d}.npz"), **joined)
        self._shards += 1

    def _array(self, name: str, value: Any) -> Any:
        array = as_array(self._np, value)
        if array.dtype.kind not in "biufcV":
            raise ConversionFailed(
                "not_numbers",
                f"{name!r} holds {array.dtype} ({str(value)[:80]}), not numbers of one shape.",
                remedy="Encode text and categories as the model does; samples of unlike lengths: `pad={name: value}`.",
            )
        axis = self._axes.get(name, 0)
        if axis is not None and array.ndim <= axis:
            what = "a single number" if array.ndim == 0 else f"of {array.ndim} axes"
            raise ConversionFailed("no_sample_axis", f"{name!r} is {what}; its samples were to lie on axis {axis}.")
        return array

    def _size(self, arrays: Mapping[str, Any]) -> int:
        sizes = {n: a.shape[axis] for n, a in arrays.items() if (axis := self._axes.get(n, 0)) is not None}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            remedy = "If samples lie on another axis, name it: axes={'state': 1}; None for an array without samples."
            raise ConversionFailed("samples_differ", f"Arrays differ in their samples: {told}.", remedy=remedy)
        if not sizes:
            raise ConversionFailed("no_sample_axis", "No array has an axis of samples.")
        return int(next(iter(sizes.values())))

    def _cut(self, name: str, array: Any, size: int) -> Any:
        axis = self._axes.get(name, 0)
        return array if axis is None else array[(slice(None),) * axis + (slice(size),)]

    def _sample_shape(self, name: str, array: Any) -> tuple[int, ...]:
        axis = self._axes.get(name, 0)
        return tuple(array.shape) if axis is None else (*array.shape[:axis], *array.shape[axis + 1 :])


def as_array(np: Any, value: Any) -> Any:
    """A numpy array of a tensor (of torch, wherever it lies), a list or an array; bfloat16 as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        return np.asarray(value)
    except ValueError:  # rows of unlike lengths
        return np.asarray(list(value), dtype=object)
