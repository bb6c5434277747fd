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
from workers.data import synthetic_feeds
from workers.kernel import Session, TensorSpec, backends
from workers.onnx_graph import all_nodes, node_label

if TYPE_CHECKING:
    from workers.kernel import Arrays

# Two implementations of the same float32 graph differ by rounding only: far below this.
RELATIVE_TOLERANCE = 1e-3


def open_session(folder: Path) -> Session:
    """The model with the defaults of ONNX Runtime, as its owner would run it."""
    return backends()["onnxruntime"]().load(folder, {})


def with_node(failure: StageFailure, model: ModelProto) -> StageFailure:
    """Add the node where the runtime's message gives only its op."""
    if failure.node is None and (match := re.search(r"for op (\w+)", failure.detail)):
        failure.node = next((node_label(n) for n in all_nodes(model) if n.op_type == match.group(1)), None)
    return failure


def batch_axis(inputs: Sequence[TensorSpec]) -> bool:
    """Whether the batch is dynamic: every input that has axes has a symbolic first one."""
    axes = [spec.shape[0] for spec in inputs if spec.shape]
    return bool(axes) and all(isinstance(dim, str) for dim in axes)


def batch_sizes(inputs: Sequence[TensorSpec], shapes: Mapping[str, Any] | None) -> list[int]:
    """One or two batch sizes that the model and the user's ranges allow, the smaller first."""
    if not batch_axis(inputs):
        fixed = [spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)]
        return [int(fixed[0])] if fixed else [1]
    ranges = [shapes[s.name] for s in inputs if s.shape and s.name in shapes] if shapes else []
    low = max((int(r["min"][0]) for r in ranges), default=1)
    high = min((int(r["max"][0]) for r in ranges), default=low + 1)
    return sorted({low, max(low, min(low + 1, high))})


@dataclass
class Trial:
    """One first inference. `failure` is how it failed; `not_finite` names outputs with NaN or Infinity."""

    batch: int
    failure: StageFailure | None
    not_finite: list[str]
    shapes: dict[str, tuple[int, ...]]

    def to_json(self) -> dict[str, Any]:
        return {"batch": self.batch, "passed": self.failure is None}


def first_inferences(session: Session, sizes: Sequence[int], shapes: Mapping[str, Any] | None) -> list[Trial]:
    """Run on random inputs at each batch size; a run that fails is recorded, not raised."""
    trials = []
    for batch in sizes:
        try:
            outputs = session.run(synthetic_feeds(session.inputs, batch, shapes, seed=batch))
        except StageFailure as failure:
            trials.append(Trial(batch, failure, [], {}))
            continue
        odd = [n for n, a in outputs.items() if a.dtype.kind == "f" and not np.isfinite(a).all()]
        trials.append(Trial(batch, None, odd, {n: a.shape for n, a in outputs.items()}))
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
