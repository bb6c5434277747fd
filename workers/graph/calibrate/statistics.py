"""Calibration of activation ranges for static quantization, in memory that does not grow with the number of samples.

Minima and maxima are reduced inside the graph, so a batch leaves two numbers per tensor. The other methods make a
second pass that bins one batch at a time into a histogram of fixed size per tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from workers.graph.interpreter import open_session
from workers.graph.onnx_graph import model_specs
from workers.measure.axes import batch_axes, fixed_batch
from workers.measure.rows import count, taken

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
Batches = Callable[[int], Iterable[Feeds]]
Method = Literal["minmax", "entropy", "percentile", "mse"]

HISTOGRAM_BINS = 2048  # of each sign
USABLE_MAGNITUDE = 1e30  # beyond it stand masks of -inf or the lowest float, which eight bits cannot carry
BATCH_SIZE = 8  # of the min/max pass; histograms take sample by sample
_TRIED_ENDS = 64  # of each sign, by the least squared error
_STRIDE = 8  # bins between two tried thresholds: 0.4 % of the range


@dataclass(frozen=True)
class Ranges:
    """Lowest and highest value by tensor (zero always included), and the tensors whose range cannot be quantized."""

    tensors: Mapping[str, tuple[float, float]]
    unusable: Sequence[str]
    samples: int


def calibratable(model: ModelProto, op_types: Collection[str], excluded_nodes: Collection[str]) -> list[str]:
    """Names of the float32 activations that the nodes to quantize read or write, sorted. Needs inferred shapes."""
    graph = model.graph
    initializers = {i.name for i in graph.initializer}
    floats = {
        v.name
        for v in [*graph.value_info, *graph.input, *graph.output]
        if v.type.tensor_type.elem_type == TensorProto.FLOAT and v.name not in initializers
    }
    nodes = [n for n in graph.node if n.op_type in op_types and n.name not in excluded_nodes]
    return sorted({name for node in nodes for name in (*node.input, *node.output)} & floats)


def calibrate(
    model: Path,
    tensors: Sequence[str],
    batches: Batches,
    *,
    method: Method,
    percentile: float,
    symmetric: bool,
    progress: Callable[[float, str], None] | None = None,
    total: int | None = None,
) -> Ranges:
    """Ranges of `tensors` of the model file (in a folder that takes scratch files) over the data.

    `batches(n)` starts a new pass in batches of up to n samples; `total` is their number, for `progress`.
    `symmetric`: the eight bits are spent equally on both signs (int8). `percentile` of all values stays inside the
    range, e.g. 99.99. Raises whatever the runtime raises on an input that the model does not take.
    """
    passes = 1 if method == "minmax" else 2

    def told(number: int, seen: int) -> None:
        if total and progress:
            progress((number + min(1.0, seen / total)) / passes, f"calibration, {seen} of {total} samples")

    extremes, samples = _min_max(model, tensors, batches, lambda seen: told(0, seen))
    unusable = [t for t, (low, high) in extremes.items() if not max(-low, high) <= USABLE_MAGNITUDE]
    ranges = {t: r for t, r in extremes.items() if t not in set(unusable)}
    if method == "minmax":
        return Ranges(ranges, unusable, samples)
    histograms = _histograms(model, ranges, batches, lambda seen: told(1, seen))
    narrowed = {}
    for name, (low, high) in ranges.items():
        counts, limit = histograms[name], max(-low, high)
        if method == "percentile":
            bottom, top = percentile_range(counts, limit, percentile)
        elif method == "mse":
            bottom, top = mse_range(counts, limit, (low, high), symmetric=symmetric)
        else:
            # Of 256 levels, those on the larger side; all of them after a ReLU.
            share = 0.5 if symmetric or high <= low else limit / (high - low)
            top = entropy_threshold(counts, limit, round(256 * share))
            bottom = -top
        narrowed[name] = (max(low, bottom), min(high, top))
    return Ranges(narrowed, unusable, samples)


def _min_max(
    model: Path, tensors: Sequence[str], batches: Batches, seen: Callable[[int], None]
) -> tuple[dict[str, tuple[float, float]], int]:
    augmented = onnx.load(model, load_external_data=False)
    names = []
    for index, tensor in enumerate(tensors):
        for op in ("ReduceMin", "ReduceMax"):
            name = f"calibration_{index}_{op}"
            augmented.graph.node.append(helper.make_node(op, [tensor], [name], name=name, keepdims=0))
            names.append(name)
    session, batching = _session(augmented, names, model)
    low = np.zeros(len(tensors))
    high = np.zeros(len(tensors))
    samples = 0
    for feeds, many in batching.padded(batches(batching.size or BATCH_SIZE)):
        values = np.asarray([float(v) for v in session.run(names, dict(feeds))]).reshape(-1, 2)
        low, high = np.minimum(low, values[:, 0]), np.maximum(high, values[:, 1])  # both keep a NaN
        samples += many
        seen(samples)
    return {t: (float(low[i]), float(high[i])) for i, t in enumerate(tensors)}, samples


def channel_maxima(
    model: Path, channels: Mapping[str, int], batches: Batches, seen: Callable[[int], None]
) -> dict[str, Array]:
    """The largest magnitude in each channel of `channels` (tensor → size of its last axis), over all data: float64
    [channels]. Reduced inside the graph."""
    augmented = onnx.load(model, load_external_data=False)
    graph = augmented.graph
    opset = next((o.version for o in augmented.opset_import if o.domain in ("", "ai.onnx")), 0)
    graph.initializer.append(helper.make_tensor("calibration_axis", TensorProto.INT64, [1], [0]))
    axes: dict[str, Any] = {"keepdims": 0} if opset >= 18 else {"keepdims": 0, "axes": [0]}  # an input since opset 18
    names = []
    for index, (tensor, size) in enumerate(channels.items()):
        label = f"calibration_{index}"
        graph.initializer.append(helper.make_tensor(f"{label}_shape", TensorProto.INT64, [2], [-1, size]))
        graph.node.append(helper.make_node("Abs", [tensor], [f"{label}_abs"]))
        graph.node.append(helper.make_node("Reshape", [f"{label}_abs", f"{label}_shape"], [f"{label}_rows"]))
        inputs = [f"{label}_rows", "calibration_axis"] if opset >= 18 else [f"{label}_rows"]
        graph.node.append(helper.make_node("ReduceMax", inputs, [label], **axes))
        names.append(label)
    session, batching = _session(augmented, names, model)
    found = {tensor: np.zeros(size) for tensor, size in channels.items()}
    samples = 0
    for feeds, many in batching.padded(batches(batching.size or BATCH_SIZE)):
        for tensor, value in zip(channels, session.run(names, dict(feeds)), strict=True):
            found[tensor] = np.maximum(found[tensor], value)
        samples += many
        seen(samples)
    return found


def _histograms(
    model: Path,
    ranges: Mapping[str, tuple[float, float]],
    batches: Batches,
    seen: Callable[[int], None],
) -> dict[str, Array]:
    """Counts in 2 x `HISTOGRAM_BINS` bins over [-m, m], m = the largest magnitude of each tensor."""
    augmented = onnx.load(model, load_external_data=False)
    inputs = {i.name for i in augmented.graph.input}
    names = [t for t in ranges if t not in inputs]
    session, batching = _session(augmented, names, model)
    counts = {t: np.zeros(2 * HISTOGRAM_BINS, np.int64) for t in ranges}
    samples = 0
    for feeds, many in batching.padded(batches(batching.size or 1)):
        outputs = dict(zip(names, session.run(names, dict(feeds)), strict=True))
        for name, (low, high) in ranges.items():
            values = outputs.pop(name) if name in outputs else feeds[name]
            counts[name] += histogram(values, max(-low, high))
        samples += many
        seen(samples)
    return counts


@dataclass(frozen=True)
class _Batching:
    """`size`: where the model fixes its batch."""

    axes: Mapping[str, int | None]
    size: int | None

    def padded(self, batches: Iterable[Feeds]) -> Iterator[tuple[Feeds, int]]:
        """Feeds with their number of samples. A fixed batch is filled up: it repeats its samples."""
        for feeds in batches:
            samples = count(feeds, self.axes)
            if self.size is not None and samples < self.size:
                order = np.arange(self.size) % samples
                yield {name: taken(value, self.axes[name], order) for name, value in feeds.items()}, samples
            else:
                yield feeds, samples


def _session(augmented: ModelProto, outputs: Sequence[str], model: Path) -> tuple[Any, _Batching]:
    """A session on `augmented` with further `outputs`, and how the model takes its batches."""
    have = {o.name for o in augmented.graph.output}
    augmented.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in have)
    path = model.with_name(f"augmented-{model.name}")  # external data is found beside it
    onnx.save(augmented, path)
    session = open_session(path, optimize=True)
    path.unlink()
    inputs, _ = model_specs(augmented)
    return session, _Batching(batch_axes(inputs), fixed_batch(inputs))


def histogram(values: Array, limit: float) -> Array:
    """Counts of `values` in 2 x `HISTOGRAM_BINS` equal bins over [-limit, limit]; outliers go to the end bins."""
    if limit <= 0:
        counts = np.zeros(2 * HISTOGRAM_BINS, np.int64)
        counts[HISTOGRAM_BINS] = values.size
        return counts
    bins = np.floor(values.astype(np.float32, copy=False).reshape(-1) * np.float32(HISTOGRAM_BINS / limit))
    indices = np.clip(bins + HISTOGRAM_BINS, 0, 2 * HISTOGRAM_BINS - 1).astype(np.int32)
    return np.bincount(indices, minlength=2 * HISTOGRAM_BINS)


def percentile_range(counts: Array, limit: float, percentile: float) -> tuple[float, float]:
    """The range that keeps `percentile` % of all values: the rest is cut in equal halves from both ends."""
    cut = (100.0 - percentile) / 200.0
    share = np.cumsum(counts) / max(1, counts.sum())
    width = limit / HISTOGRAM_BINS
    low = int(np.searchsorted(share, cut, side="right"))
    high = int(np.searchsorted(share, 1.0 - cut, side="left")) + 1
    return min(0.0, low * width - limit), max(0.0, high * width - limit)


def mse_range(counts: Array, limit: float, extremes: tuple[float, float], *, symmetric: bool) -> tuple[float, float]:
    """The range whose 255 steps give the least mean squared error over the histogram: what is clipped loses its
    distance to the range, what is kept loses step²/12. Both ends are tried together, `_TRIED_ENDS` each, from the
    extremes down to a sixteenth of them. Zeros are exact whatever the range: the bins beside it take their neighbours'
    counts."""
    low, high = extremes
    weights = counts.astype(np.float64)
    weights[HISTOGRAM_BINS], weights[HISTOGRAM_BINS - 1] = counts[HISTOGRAM_BINS + 1], counts[HISTOGRAM_BINS - 2]
    width = limit / HISTOGRAM_BINS
    centres = (np.arange(2 * HISTOGRAM_BINS) - HISTOGRAM_BINS + 0.5) * width
    ends = np.linspace(1.0, 1 / 16, _TRIED_ENDS)

    def clipped(limits: Array) -> Array:
        """Squared distance of what lies beyond each limit of one sign, summed."""
        beyond = np.maximum(np.sign(limits[0]) * (centres[None, :] - limits[:, None]), 0.0)
        found: Array = (beyond**2 * weights).sum(axis=1)
        return found

    if symmetric:
        tops = ends * max(-low, high)
        best = int(np.argmin(clipped(tops) + clipped(-tops) + weights.sum() * (2 * tops / 254) ** 2 / 12))
        return -float(tops[best]), float(tops[best])
    tops, bottoms = ends * high, ends * low
    lost_above = clipped(tops) if high > 0 else np.zeros(_TRIED_ENDS)
    lost_below = clipped(bottoms) if low < 0 else np.zeros(_TRIED_ENDS)
    steps = (tops[:, None] - bottoms[None, :]) / 255
    lost = lost_above[:, None] + lost_below[None, :] + weights.sum() * steps**2 / 12
    i, j = np.unravel_index(int(np.argmin(lost)), lost.shape)
    return float(bottoms[j]), float(tops[i])


def entropy_threshold(counts: Array, limit: float, levels: int) -> float:
    """The clipping threshold whose `levels`-level quantization loses the least information (KL divergence).

    For every tried threshold the distribution P of the magnitudes below it, with what lies above counted into the last
    bin, is compared with Q, the same bins averaged over `levels` groups. Source: S. Migacz, "8-bit Inference with
    TensorRT", GTC 2017. The bin at zero takes its neighbour's count: zeros quantize exactly whatever the threshold.
    Averaging a sparse histogram costs (bins - groups) / 2N by sampling noise alone (G. Miller, 1955); that bias is
    taken off, or little data would always ask for tight clipping.
    """
    magnitudes = (counts[HISTOGRAM_BINS:] + counts[HISTOGRAM_BINS - 1 :: -1]).astype(np.float64)
    magnitudes[0] = magnitudes[1]
    total = magnitudes.sum()
    if total == 0:
        return limit
    best, best_bins = np.inf, HISTOGRAM_BINS
    above = total - np.cumsum(magnitudes)
    for bins in range(levels, HISTOGRAM_BINS + 1, _STRIDE):
        kept = magnitudes[:bins]
        if not kept.any():
            continue
        p = kept.copy()
        p[-1] += above[bins - 1]
        group = np.arange(bins) * levels // bins
        filled = kept > 0
        sums = np.bincount(group, weights=kept, minlength=levels)
        members = np.bincount(group, weights=filled, minlength=levels)
        q = np.where(filled, (sums / np.maximum(members, 1))[group], 0.0)
        noise = (filled.sum() - np.count_nonzero(members)) / (2.0 * total)
        divergence = _kl_divergence(p, q) - noise
        if divergence < best:
            best, best_bins = divergence, bins
    return limit * best_bins / HISTOGRAM_BINS


def _kl_divergence(p: Array, q: Array) -> float:
    """KL(P‖Q) of two count vectors; empty bins borrow 1e-4 from the filled ones so that it stays finite."""

    def smoothed(counts: Array) -> Array:
        shares = counts / counts.sum()
        empty = shares == 0
        filled = int((~empty).sum())
        borrowed = 1e-4 * empty.sum() / filled / shares.size
        shares = np.where(empty, 1e-4 / shares.size, np.maximum(shares - borrowed, 1e-12))
        normalized: Array = shares / shares.sum()
        return normalized

    p, q = smoothed(p), smoothed(q)
    return float(np.sum(p * np.log(p / q)))
