"""What is found out about an engine before it is served: whether a sample's answer depends on what else is in its
batch, and whether it changes where an axis is filled up with zeros."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Run = Callable[[dict[str, Array]], Arrays]

# Of an output's largest number, what filling up may move it by: the order of summing, and where activations are rounded
# by the range of their tensor, a step of theirs.
_PADDED = {"fp32": 1e-4}
_PADDED_ROUNDED = 1e-2


def apart(found: Array, wanted: Array) -> float:
    """The largest difference, over the largest finite number of `wanted`; infinite for other shapes or types."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if wanted.dtype.kind not in "fcV":
        return 0.0 if np.array_equal(found, wanted) else float("inf")
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    size = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
    with np.errstate(invalid="ignore"):
        off = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    worst = float(np.nan_to_num(off, nan=np.inf).max(initial=0.0))
    return worst if worst == 0.0 else worst / size if size else float("inf")


def depends_on_batch(
    run: Run,
    samples: Sequence[Arrays],
    batched: Collection[str],
    allowed: float,
    random: Collection[str] = (),
    engines: Sequence[tuple[int, int | None]] = ((1, None),),
) -> str | None:
    """Why requests cannot share a batch, in words; None where each sample's rows come out as they do alone.

    `samples`: at least two, of one shape, a row each, unlike each other; `batched`: inputs along whose first axis the
    samples lie. `allowed`: see `apart`. `random`: outputs whose numbers differ from call to call, of which only the
    shape is asked. `engines`: the smallest and largest batch of each engine that answers; of one that is not asked for
    a single sample, that a sample comes out as it does among its own copies: what one engine answers is not compared
    with what another does. Raises what `run` raises for a single sample, or its copies."""
    for least, most in engines:
        size = max(len(samples) + 1, least) if most is None else min(max(len(samples) + 1, least), most)
        if size == 1:
            continue  # no batch ever has two samples
        order = [i % len(samples) for i in range(size)]
        alone = [run(_joined(samples, [i] * least, batched)) for i in range(len(samples))]
        try:
            together = run(_joined(samples, order, batched))
        except Exception as error:  # whatever a library raises: it takes no such batch
            return f"the engine does not take {size} samples at once: {str(error)[:200]}"
        if why := _not_alike(together, alone, order, least, allowed, random):
            return why
    return None


def _joined(samples: Sequence[Arrays], order: Sequence[int], batched: Collection[str]) -> dict[str, Array]:
    return {n: np.concatenate([samples[i][n] for i in order]) if n in batched else a for n, a in samples[0].items()}


def _not_alike(
    together: Arrays,
    alone: Sequence[Arrays],
    order: Sequence[int],
    copies: int,
    allowed: float,
    random: Collection[str],
) -> str | None:
    """`alone`: of each sample, so many copies of it."""
    for name, array in together.items():
        if not array.ndim or array.shape[0] != len(order):
            return (
                f"output {name} has no row for each sample: its shape is {list(array.shape)} for {len(order)} of them"
            )
        for row, i in enumerate(order):
            whole, found = np.asarray(alone[i][name]), array[row : row + 1]
            wanted = whole if copies == 1 else whole[:1]
            if found.shape != wanted.shape:
                return f"output {name} has another shape in a batch than alone"
            if name not in random and (off := apart(found, wanted)) > allowed:
                return f"output {name} of a sample changes with what else is in its batch (by {off:.2g} of its largest)"
    return None


@dataclass
class Padding:
    """What of `pad` may be done, as `Settings` has it; `refused`: input → why not."""

    pad: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    cut: dict[str, dict[int, tuple[str, int]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def padding(
    run: Run,
    samples: Sequence[Arrays],
    wanted: Mapping[str, Mapping[int, Sequence[int]]],
    precision: str,
) -> Padding:
    """Which axes may be filled up with zeros to these sizes: all of `wanted` together (a sequence has its ids and its
    mask), or none. `samples`: real ones, of several sizes where there are some. The sample is filled up by a few and to
    every size that holds it; its outputs, cut back where they have grown, must be what they are without. Models that
    look at what stands beside the sample (a mean over it, a convolution that reaches over its end, no mask) are found
    out by that. Raises what `run` raises for a sample as it is."""
    cut: dict[str, dict[int, tuple[str, int]]] = {}
    allowed = _PADDED.get(precision, _PADDED_ROUNDED)
    tried = 0
    for sample in samples:
        plain = run(dict(sample))
        for target in _targets(sample, wanted):
            filled = {n: _filled(a, target.get(n, {})) for n, a in sample.items()}
            tried += 1
            try:
                found = run(filled)
            except Exception as error:  # whatever a library raises
                return _refused(wanted, f"the engine does not take it filled up: {str(error)[:200]}")
            for name, array in plain.items():
                grown = _grown(array, found.get(name), sample, target)
                if grown is None:
                    return _refused(wanted, f"the shape of output {name} does not follow the size of one input's axis")
                cut.setdefault(name, {}).update(grown)
                back = found[name][tuple(slice(0, n) for n in array.shape)]
                if (off := apart(back, array)) > allowed:
                    return _refused(wanted, f"output {name} changes when it is filled up (by {off:.2g} of its largest)")
    if not tried:
        return _refused(wanted, "no sample is smaller than these sizes: nothing could be tried")
    pad = {n: {axis: tuple(sizes) for axis, sizes in axes.items()} for n, axes in wanted.items()}
    return Padding(pad, {n: axes for n, axes in cut.items() if axes})


def _refused(wanted: Mapping[str, Any], why: str) -> Padding:
    return Padding(refused=dict.fromkeys(wanted, why))


def _targets(sample: Arrays, wanted: Mapping[str, Mapping[int, Sequence[int]]]) -> list[dict[str, dict[int, int]]]:
    """Of each padded axis the size to fill up to: to each bucket in turn, the same place in the list for all axes."""
    found = []
    most = max((len(sizes) for axes in wanted.values() for sizes in axes.values()), default=0)
    for i in range(most):
        target: dict[str, dict[int, int]] = {}
        for name, axes in wanted.items():
            for axis, sizes in axes.items():
                size = sizes[min(i, len(sizes) - 1)]
                if size >= sample[name].shape[axis]:
                    target.setdefault(name, {})[axis] = size
        complete = all(axis in target.get(name, {}) for name, axes in wanted.items() for axis in axes)
        grows = any(size > sample[name].shape[axis] for name, axes in target.items() for axis, size in axes.items())
        if complete and grows:
            found.append(target)
    return found


def _filled(array: Array, sizes: Mapping[int, int]) -> Array:
    if not sizes:
        return array
    shape = [sizes.get(axis, size) for axis, size in enumerate(array.shape)]
    found = np.zeros(shape, array.dtype)
    found[tuple(slice(0, n) for n in array.shape)] = array
    return found


def _grown(
    plain: Array, found: Array | None, sample: Arrays, target: Mapping[str, Mapping[int, int]]
) -> dict[int, tuple[str, int]] | None:
    """Of each axis of an output that has grown, the input's axis that it follows; None where it follows none."""
    if found is None or found.ndim != plain.ndim:
        return None
    follows: dict[int, tuple[str, int]] = {}
    for axis, (before, after) in enumerate(zip(plain.shape, found.shape, strict=True)):
        if before == after:
            continue
        sources = [
            (name, at)
            for name, axes in target.items()
            for at, size in axes.items()
            if (sample[name].shape[at], size) == (before, after)
        ]
        if not sources:
            return None
        follows[axis] = sources[0]
    return follows
