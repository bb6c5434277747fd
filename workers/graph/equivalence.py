"""Whether a rewritten graph computes the same function as the original: compared on random inputs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from app.domain.failures import StageFailure
from workers.artifacts import ONNX
from workers.data import synthetic_feeds
from workers.graph.onnx_files import save_model
from workers.graph.onnx_graph import CONTRIB_DOMAIN, model_specs
from workers.kernel import Session, runner_of

RELATIVE_TOLERANCE = 1e-3  # of the largest magnitude of the output
ABSOLUTE_TOLERANCE = 1e-6

Arrays = dict[str, np.ndarray[Any, Any]]


class EquivalenceCheck:
    """The original's outputs on random inputs, and whether another graph gives the same."""

    def __init__(self, original: ModelProto, shapes: Mapping[str, Any] | None, workspace: Path) -> None:
        self.original = original
        self._workspace = workspace
        self.feeds: list[Arrays] = []
        self.batch_sizes: list[int] = []
        self._expected: list[Arrays] = []
        self._why_none = ""
        try:
            session = _load(original, workspace)
        except (StageFailure, ValueError) as failure:
            self._why_none = _reason(failure)
            return
        for seed, batch in enumerate(_batch_sizes(original)):
            try:
                feeds = _with_gaps_in_masks(synthetic_feeds(model_specs(original)[0], batch, shapes, seed), seed)
                expected = session.run(feeds)
            except StageFailure as failure:
                self._why_none = _reason(failure)
                continue
            self.feeds.append(feeds)
            self.batch_sizes.append(batch)
            self._expected.append(expected)
        session.close()

    def outputs(self, model: ModelProto) -> list[Arrays]:
        """The outputs of another graph with the same inputs, on each of the random inputs, and once more where padding
        at the left leaves nothing to the first positions. Raises StageFailure, ValueError."""
        session = _load(model, self._workspace)
        padded = [_padded_left(feeds) for feeds in self.feeds[-1:]]
        answers = [session.run(feeds) for feeds in (*self.feeds, *(p for p in padded if p is not None))]
        session.close()
        return answers

    def compare(self, model: ModelProto, *, newer_opset: bool = False) -> tuple[float, str | None]:
        """The largest absolute difference over all inputs and outputs, and why `model` may not be used (or None).
        `newer_opset`: whether it may import another one."""
        changed = _interface_change(self.original, model, newer_opset)
        if changed:
            return 0.0, changed
        if not self.feeds:
            return 0.0, f"it could not be compared: the original does not run on random inputs ({self._why_none})"
        largest = 0.0
        try:
            session = _load(model, self._workspace)
            for feeds, expected in zip(self.feeds, self._expected, strict=True):
                actual = session.run(feeds)
                for name, reference in expected.items():
                    difference, limit = _difference(reference, actual[name])
                    if not difference <= limit:
                        return 0.0, f"output {name!r} differs by {difference:.3g}, more than {limit:.3g}"
                    largest = max(largest, difference)
            session.close()
        except (StageFailure, ValueError) as failure:
            return 0.0, f"the result does not run: {_reason(failure)}"
        return largest, None


def _load(model: ModelProto, workspace: Path) -> Session:
    folder = workspace / "compared"
    shutil.rmtree(folder, ignore_errors=True)  # a new file: a session still open may have mapped the old one
    folder.mkdir()
    save_model(model, folder)
    return runner_of(ONNX).load(folder, {})


def _reason(failure: StageFailure | ValueError) -> str:
    """What to say of a failure that is a fact about the model; another one (memory, time) is raised."""
    if isinstance(failure, StageFailure) and not failure.cacheable:
        raise failure
    return str(failure)[:300]


def _batch_sizes(model: ModelProto) -> list[int]:
    """Two inputs: at the model's fixed batch size, or at 1 and 2."""
    fixed = [spec.shape[0] for spec in model_specs(model)[0] if spec.shape and isinstance(spec.shape[0], int)]
    return [fixed[0], fixed[0]] if fixed and fixed[0] > 0 else [1, 2]


def _with_gaps_in_masks(feeds: Arrays, seed: int) -> Arrays:
    """Masks of ones would hide a fusion that ignores the mask, or that assumes padding at the right."""
    rng = np.random.default_rng(seed)
    for name, value in feeds.items():
        if "mask" in name.lower() and value.ndim >= 2 and value.dtype.kind in "iub" and value.shape[-1] > 2:
            value[..., 1:] = rng.integers(0, 2, size=(*value.shape[:-1], value.shape[-1] - 1))
    return feeds


def _padded_left(feeds: Arrays) -> Arrays | None:
    """With the first third of every mask zero, in the first row; None where there is no mask."""
    masks = {n: v for n, v in feeds.items() if "mask" in n.lower() and v.ndim >= 2 and v.shape[-1] > 2}
    for name, value in masks.items():
        masks[name] = value.copy()
        masks[name][0, ..., : value.shape[-1] // 3] = 0
    return {**feeds, **masks} if masks else None


def _interface_change(before: ModelProto, after: ModelProto, newer_opset: bool) -> str | None:
    (inputs, outputs), (inputs_after, outputs_after) = model_specs(before), model_specs(after)
    if inputs != inputs_after:
        return "it changes the inputs"
    if outputs != outputs_after:
        return "it changes the outputs"
    opsets = [{o.domain: o.version for o in m.opset_import if o.domain != CONTRIB_DOMAIN} for m in (before, after)]
    if not newer_opset and any(opsets[1].get(domain, version) != version for domain, version in opsets[0].items()):
        return "it changes the opset"
    return None


def _difference(reference: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Largest absolute difference and its limit. NaN and infinities must stand in the same places."""
    if reference.shape != actual.shape or reference.dtype != actual.dtype:
        return math.inf, 0.0
    if reference.dtype.kind not in "fc":
        same = bool(np.array_equal(reference, actual))
        return (0.0 if same else math.inf), 0.0
    a, b = reference.astype(np.float64).reshape(-1), actual.astype(np.float64).reshape(-1)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return math.inf, 0.0
    if not finite.any():
        return 0.0, 0.0
    limit = RELATIVE_TOLERANCE * float(np.abs(a[finite]).max()) + ABSOLUTE_TOLERANCE
    return float(np.abs(a[finite] - b[finite]).max()), limit
