"""Running the model for the first time, and comparing two models by their outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto

from app.domain.failures import StageFailure
from workers.artifacts import ONNX
from workers.data import synthetic_feeds
from workers.graph.onnx_graph import all_nodes, node_label
from workers.kernel import Session, TensorSpec, runner_of
from workers.measure.axes import batch_axes, fixed_batch
from workers.measure.rows import first_samples, stored_shapes, taken

if TYPE_CHECKING:
    from workers.kernel import Arrays

_ATTEMPTS = 3
_SAMPLES = 16  # of each layout of a data set
# How ONNX Runtime says that a number is none that the operator takes (an id, a length, a picture number).
_VALUES = re.compile(
    r"out of (?:data )?bounds|out of range|[Ii]nvalid value|not in (?:the )?range|inclusive range|[Ii]nvalid ind|"
    r"indices .{0,40}(?:must|should)|must be (?:>|<|within|less|greater|non-negative)"
)

# Two implementations of the same float32 graph differ by rounding only: far below this.
RELATIVE_TOLERANCE = 1e-3


def open_session(folder: Path) -> Session:
    """The model with the defaults of ONNX Runtime, as its owner would run it."""
    return runner_of(ONNX).load(folder, {})


def with_node(failure: StageFailure, model: ModelProto) -> StageFailure:
    """Add the node where the runtime's message gives only its op."""
    if failure.node is None and (match := re.search(r"for op (\w+)", failure.detail)):
        failure.node = next((node_label(n) for n in all_nodes(model) if n.op_type == match.group(1)), None)
    return failure


def dynamic_batch(inputs: Sequence[TensorSpec]) -> bool:
    """Whether the batch is free: it stands on an axis of some input, and is fixed in none."""
    axes = batch_axes(inputs)
    sizes = [spec.shape[axis] for spec in inputs if (axis := axes[spec.name]) is not None]
    return bool(sizes) and all(isinstance(dim, str) for dim in sizes)


def batch_sizes(inputs: Sequence[TensorSpec], shapes: Mapping[str, Any] | None) -> list[int]:
    """One or two batch sizes that the model and the user's ranges allow, the smaller first."""
    if not dynamic_batch(inputs):
        return [fixed_batch(inputs) or 1]
    axes = batch_axes(inputs)
    ranges = [
        (shapes[s.name], axis) for s in inputs if shapes and s.name in shapes and (axis := axes[s.name]) is not None
    ]
    low = max((int(r["min"][axis]) for r, axis in ranges), default=1)
    high = min((int(r["max"][axis]) for r, axis in ranges), default=low + 1)
    return sorted({low, max(low, min(low + 1, high))})


class TrialInputs:
    """What a model is tried on: samples of the job's data set where there is one, else random inputs."""

    def __init__(self, data: Path | None, shapes: Mapping[str, Any] | None) -> None:
        self._data, self._shapes = data, shapes
        self._read: dict[tuple[Any, ...], list[Arrays]] = {}

    @property
    def real(self) -> bool:
        return self._data is not None

    def stored(self, inputs: Sequence[TensorSpec]) -> list[dict[str, tuple[int, ...]]]:
        """The shapes of the data's arrays, shard by shard; none without data."""
        return [] if self._data is None else stored_shapes(self._data, inputs)

    def at(self, inputs: Sequence[TensorSpec], batch: int, attempt: int) -> Arrays:
        """Inputs for this batch; other ones for every attempt. Raises StageFailure (DATA) where the data do not fit."""
        samples = self.samples(inputs)
        if not samples:
            return synthetic_feeds(inputs, batch, self._shapes, seed=batch + 100 * attempt)
        axes = batch_axes(inputs)
        chosen = samples[attempt % len(samples)]
        rows = attempt * batch + np.arange(batch)
        return {name: taken(array, axes[name], rows) for name, array in chosen.items()}

    def samples(self, inputs: Sequence[TensorSpec]) -> list[Arrays]:
        """The first samples of each layout that the data have; none without data."""
        if self._data is None:
            return []
        axes = batch_axes(inputs)
        key = tuple(sorted(axes.items()))
        if key not in self._read:
            self._read[key] = first_samples(self._data, inputs, axes, _SAMPLES)
        return self._read[key]


@dataclass
class Trial:
    """First inferences at one batch size, until one passes. `failure` is how they failed; `not_finite` names outputs
    with NaN or Infinity; `by_values`: it was numbers that the model refused, not sizes."""

    batch: int
    failure: StageFailure | None
    not_finite: list[str]

    @property
    def by_values(self) -> bool:
        return self.failure is not None and _VALUES.search(self.failure.detail) is not None

    def to_json(self) -> dict[str, Any]:
        return {"batch": self.batch, "passed": self.failure is None}


def first_inferences(
    session: Session, inputs: Sequence[TensorSpec], sizes: Sequence[int], source: TrialInputs
) -> list[Trial]:
    """Run at each batch size on a few inputs until it passes; what fails is recorded, not raised."""
    trials = []
    for batch in sizes:
        first: StageFailure | None = None
        for attempt in range(_ATTEMPTS):
            feeds = source.at(inputs, batch, attempt)
            try:
                outputs = session.run(feeds)
            except StageFailure as failure:
                first = first or failure
                continue
            odd = [n for n, a in outputs.items() if a.dtype.kind == "f" and not np.isfinite(a).all()]
            trials.append(Trial(batch, None, odd))
            break
        else:
            trials.append(Trial(batch, first, []))
    return trials


@dataclass(frozen=True)
class Difference:
    """The worst output of a comparison: its name, max |a - b|, and whether that is more than rounding."""

    tensor: str
    error: float
    significant: bool


def compare(wanted: Arrays, got: Arrays) -> Difference:
    """The output that differs most, by its own scale: significant above `RELATIVE_TOLERANCE` of the largest value (at
    least 1), for a missing output, another shape, and NaN or Infinity on one side only."""
    worst, ratio = Difference("", 0.0, False), -1.0
    for name, a in wanted.items():
        b = got.get(name)
        if b is None or a.shape != b.shape:
            return Difference(name, float("inf"), True)
        if not a.size:
            continue
        x, y = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(x)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
            return Difference(name, float("inf"), True)
        if not finite.any():
            continue
        error = float(np.abs(x[finite] - y[finite]).max())
        limit = RELATIVE_TOLERANCE * max(1.0, float(np.abs(x[finite]).max()))
        if error / limit > ratio:
            ratio = error / limit
            worst = Difference(name, error, error > limit)
    return worst
