"""How the arrays of several requests become one batch, and its outputs the answer to each. Pure: numpy only."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from .serving_settings import InvalidRequest, Settings
else:  # beside this file, in a bundle
    from serving_settings import InvalidRequest, Settings  # type: ignore[import-not-found,no-redef]

Array = np.ndarray[Any, Any]
Spec = tuple[str, str, tuple[int, ...]]  # name, numpy's name of the type, shape

_NATIVE = "biufc"


def dtype_of(name: str) -> np.dtype[Any]:
    """numpy's type of this name, or that of `ml_dtypes` (bfloat16); raises TypeError where there is none."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        try:
            found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        except AttributeError:
            raise TypeError(f"{name} is no type of an array") from None
        return found


@functools.lru_cache(256)
def name_of(dtype: np.dtype[Any]) -> str:
    """numpy makes the name anew each time it is asked for, in Python."""
    return dtype.name


@dataclass(frozen=True)
class Tensor:
    """An input or output as the manifest tells it; dims that may vary are text."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def interface(folder: Path) -> tuple[list[Tensor], list[Tensor]] | None:
    """Inputs and outputs as the bundle's `manifest.json` tells them; None where it does not."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not manifest.get("inputs") or not manifest.get("outputs"):
        return None
    made = [[Tensor(t["name"], t["dtype"], tuple(t["shape"])) for t in manifest[k]] for k in ("inputs", "outputs")]
    return made[0], made[1]


@dataclass(eq=False, slots=True)
class Plan:
    """One request: its arrays in the order of the model's inputs, and their shapes in the batch, filled up."""

    arrays: list[Array]
    shapes: list[tuple[int, ...]]
    rows: int
    key: Hashable
    single: bool  # shares a batch with nobody

    def sizes(self, at: int, axis: int) -> int:
        return int(self.arrays[at].shape[axis])


class Unsplittable(Exception):
    """Outputs of a batch that do not lie along the batch: whose rows are whose cannot be told."""


class Rows:
    """`names`: the model's inputs in their order; `tensors`: as the manifest tells them, where it does."""

    def __init__(self, names: Sequence[str], settings: Settings, tensors: Sequence[Tensor] | None = None) -> None:
        self.names, self.settings = list(names), settings
        told = {t.name: t for t in tensors or ()}
        self.tensors = [told.get(n) for n in self.names]
        self._types = [t and dtype_of(t.dtype) for t in self.tensors]
        self._at = {n: i for i, n in enumerate(self.names)}
        self._axes = [settings.batch_axis.get(n, 0) for n in self.names]
        self._pads = [settings.pad.get(n, {}) for n in self.names]
        self._batched = any(axis == 0 for axis in self._axes) and settings.max_batch > 1

    def plan(self, feeds: Mapping[str, Any]) -> Plan:
        """Raises `InvalidRequest` for what the model does not take."""
        if len(feeds) != len(self.names) or any(n not in feeds for n in self.names):
            raise self._other_names(feeds)
        arrays: list[Array] = []
        shapes: list[tuple[int, ...]] = []
        key: list[Hashable] = []
        rows: int | None = None
        for i, name in enumerate(self.names):
            array = self._checked(i, feeds[name])
            shape = self._padded(i, array.shape)
            arrays.append(array)
            shapes.append(shape)
            if not self._batched:
                continue
            if self._axes[i] is None:
                key.append((array.dtype.num, shape, hashlib.blake2b(array.tobytes(), digest_size=16).digest()))
                continue
            if not shape:
                raise InvalidRequest("invalid_request", f"input {name} is a single number; its first axis is the batch")
            if rows is None:
                rows = shape[0]
            elif shape[0] != rows:
                raise InvalidRequest(
                    "invalid_request", f"input {name} has {shape[0]} rows, another input {rows}: as many in all of them"
                )
            key.append((array.dtype.num, shape[1:]))
        return Plan(arrays, shapes, 1 if rows is None else rows, tuple(key), not self._batched)

    def specs(self, plans: Sequence[Plan]) -> list[Spec]:
        """Of the batch of these requests."""
        first, rows = plans[0], sum(p.rows for p in plans)
        found = []
        for i, name in enumerate(self.names):
            shape = first.shapes[i]
            if len(plans) > 1 and self._axes[i] == 0:
                shape = (rows, *shape[1:])
            found.append((name, name_of(first.arrays[i].dtype), shape))
        return found

    def fill(self, views: Sequence[Array], plans: Sequence[Plan]) -> None:
        """Write the requests' arrays one after the other into those of the batch."""
        for i, view in enumerate(views):
            at = 0
            for plan in plans[:1] if len(plans) == 1 or self._axes[i] is None else plans:
                array = plan.arrays[i]
                place = view if len(plans) == 1 or self._axes[i] is None else view[at : at + plan.rows]
                at += plan.rows
                if place.shape != array.shape:
                    place[...] = 0
                    place = place[tuple(slice(0, n) for n in array.shape)]
                place[...] = array

    def split(self, outputs: Mapping[str, Array], plans: Sequence[Plan]) -> list[dict[str, Array]]:
        """The answer to each, in memory of its own. Raises `Unsplittable`."""
        if len(plans) == 1:
            return [{n: self._cut(n, a, plans[0]).copy() for n, a in outputs.items()}]
        total = sum(p.rows for p in plans)
        for name, array in outputs.items():
            if not array.ndim or array.shape[0] != total:
                shown = list(array.shape)
                raise Unsplittable(
                    f"output {name} of a batch of {total} has the shape {shown}: it has no row of its own"
                )
        answers, at = [], 0
        for plan in plans:
            end = at + plan.rows
            answers.append({n: self._cut(n, a[at:end], plan).copy() for n, a in outputs.items()})
            at = end
        return answers

    def _cut(self, name: str, array: Array, plan: Plan) -> Array:
        for axis, (source, at) in self.settings.cut.get(name, {}).items():
            size = plan.sizes(self._at[source], at)
            if array.ndim > axis and array.shape[axis] > size:
                array = array[(slice(None),) * axis + (slice(0, size),)]
        return array

    def _checked(self, i: int, given: Any) -> Array:
        array, name, tensor, dtype = np.asarray(given), self.names[i], self.tensors[i], self._types[i]
        if tensor is None or dtype is None:
            if array.dtype.kind not in _NATIVE and dtype_of(array.dtype.name).kind != "V":
                raise InvalidRequest("invalid_request", f"input {name} is of type {array.dtype}: numbers are taken")
        elif array.dtype != dtype:
            raise InvalidRequest("invalid_request", f"input {name} is {array.dtype}, the model's is {tensor.dtype}")
        if tensor is not None:
            wanted = tensor.shape
            fits = len(wanted) == array.ndim
            for dim, size in zip(wanted, array.shape, strict=False) if fits else ():
                fits = fits and (not isinstance(dim, int) or dim < 0 or dim == size)
            if not fits:
                raise InvalidRequest(
                    "invalid_request", f"input {name} has the shape {list(array.shape)}, the model's is {list(wanted)}"
                )
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))

    def _padded(self, i: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        pads = self._pads[i]
        if not pads:
            return shape
        filled = list(shape)
        for axis, sizes in pads.items():
            if axis < len(filled):
                filled[axis] = next((s for s in sizes if s >= filled[axis]), filled[axis])
        return tuple(filled)

    def _other_names(self, feeds: Mapping[str, Any]) -> InvalidRequest:
        lacking = [n for n in self.names if n not in feeds]
        what = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(sorted(set(feeds) - set(self.names)))}"
        return InvalidRequest("invalid_request", f"the request {what}; the inputs are {', '.join(self.names)}")


def nbytes(spec: Spec) -> int:
    """What an array of this type and shape takes."""
    return dtype_of(spec[1]).itemsize * math.prod(spec[2])
