"""Inputs at the shapes that an engine is judged at beside its data, with the original's answers: made once for all
candidates, and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.domain.failures import FailureKind, StageFailure
from workers.kernel import Session, TensorSpec
from workers.measure.axes import batch_axes
from workers.measure.fitting import fitted
from workers.measure.rows import taken
from workers.measure.shapes import Shape, Shapes, at_batch, axis_sizes
from workers.measure.synthetic import random_feeds

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

ROWS = 16  # of a probe: samples at once, where memory holds them
_BYTES = 16 << 20  # of a probe's inputs and outputs
_MOST_BYTES = 128 << 20  # of those of one sample
_SAME = 1e-3  # of an output's norm, that two calls of the original may differ by: rounding, no chance
_INDEX = "index.json"


@dataclass(frozen=True)
class Probe:
    """One call. `sizes`: of the free axes, by name; `dims`: of the inputs, `batch` samples included."""

    label: str
    dims: dict[str, list[int]]
    sizes: dict[str, int]
    batch: int
    in_use: bool


class Prober:
    """Runs the original at every shape. `rows`: shape → samples of the data that have it, or others to be made of;
    None without data."""

    def __init__(
        self,
        session: Session,
        rows: Mapping[str, Arrays] | None,
        *,
        seed: int,
        batches: Sequence[int],
    ) -> None:
        self._session, self._rows, self._seed = session, rows, seed
        self._axes = batch_axes(session.inputs)
        self._batches = sorted(set(batches))
        self.left_out: list[dict[str, Any]] = []

    def probes(self, shapes: Shapes) -> Iterator[tuple[Probe, Arrays, Arrays]]:
        """(what it is, inputs, the original's outputs). A shape that the original refuses is left out, and so are
        answers that are empty or no numbers at shapes that nobody uses."""
        try:
            found = self._called(shapes.typical, self._batches)
        except StageFailure:  # some models declare a free batch, and take one sample
            self._batches = self._batches[:1]
            try:
                found = self._called(shapes.typical, self._batches)
            except StageFailure as failure:
                reason = f"the original does not take the inputs that were made up: {failure.detail[:200]}"
                self.left_out.append({"label": "all", "reason": reason})
                return
        if not self._answers_twice_alike(found[-1][1], found[-1][2]):
            self.left_out.append({"label": "all", "reason": "two calls of the original do not agree: it is random"})
            return
        yield from found
        for alternatives in shapes.others:
            reason = ""
            for shape in alternatives:
                try:
                    answered = self._called(shape, self._batches)
                except (StageFailure, MemoryError) as failure:
                    detail = failure.detail if isinstance(failure, StageFailure) else "too large"
                    reason = reason or f"the original does not take it: {detail[:200]}"
                    continue
                if answered and (shape.in_use or all(_says_something(outputs) for _, _, outputs in answered)):
                    yield from answered
                    break
                reason = reason or "the original answers with nothing, or with no numbers"
            else:
                at = alternatives[0]
                self.left_out.append({"label": at.label, "dims": at.dims, "in_use": at.in_use, "reason": reason})

    def _called(self, shape: Shape, batches: Sequence[int]) -> list[tuple[Probe, Arrays, Arrays]]:
        """At one sample, and at as many as memory holds."""
        found: list[tuple[Probe, Arrays, Arrays]] = []
        room = max(batches)
        for wanted in batches:
            batch = min(wanted, room)
            if found and batch == found[-1][0].batch:
                break
            feeds = self._feeds(shape, batch)
            outputs = self._session.run(feeds)
            size = sum(a.nbytes for a in (*feeds.values(), *outputs.values()))
            if size > _MOST_BYTES:
                raise StageFailure("too_large", "its tensors take too much memory", FailureKind.MODEL)
            room = max(_BYTES // max(size // batch, 1), 1)
            dims = {name: list(a.shape) for name, a in feeds.items()}
            sizes = axis_sizes(self._session.inputs, shape.dims, self._axes)
            found.append((Probe(shape.label, dims, sizes, batch, shape.in_use), feeds, outputs))
        return found

    def _feeds(self, shape: Shape, batch: int) -> dict[str, Array]:
        inputs = self._session.inputs
        dims = at_batch(inputs, shape.dims, batch, self._axes)
        if self._rows is None:
            return random_feeds(inputs, dims, self._seed)
        rows = self._rows.get(shape.label) or self._rows["typical"]
        there = {n: taken(a, self._axes[n], np.arange(batch)) for n, a in rows.items()}
        return fitted(inputs, there, dims, offset=1)

    def _answers_twice_alike(self, feeds: Arrays, outputs: Arrays) -> bool:
        again = self._session.run(dict(feeds))
        for name, a in outputs.items():
            b = again[name]
            if a.shape != b.shape or (a.dtype.kind not in "fc" and not np.array_equal(a, b)):
                return False
            if a.dtype.kind in "fc":
                x, y = (np.nan_to_num(v.astype(np.float64)) for v in (a, b))
                if np.linalg.norm(x - y) > _SAME * max(float(np.linalg.norm(x)), 1e-12):
                    return False
        return True


def write_probes(folder: Path, probes: Iterator[tuple[Probe, Arrays, Arrays]]) -> list[Probe]:
    """One file a probe; `write_index` ends it."""
    written: list[Probe] = []
    for probe, feeds, outputs in probes:
        arrays = {f"i{k}": feeds[name] for k, name in enumerate(sorted(feeds))}
        arrays |= {f"o{k}": outputs[name] for k, name in enumerate(sorted(outputs))}
        np.savez(folder / f"{len(written)}.npz", **arrays)  # type: ignore[arg-type]  # numpy types **kwds as bool
        written.append(probe)
    return written


def write_index(
    folder: Path, probes: Sequence[Probe], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    names = {"inputs": sorted(s.name for s in inputs), "outputs": sorted(s.name for s in outputs)}
    (folder / _INDEX).write_text(json.dumps({"probes": [asdict(p) for p in probes], **names}, sort_keys=True))


def read_probes(folder: Path) -> list[tuple[Probe, dict[str, Array], dict[str, Array]]]:
    index = json.loads((folder / _INDEX).read_text())
    found = []
    for i, probe in enumerate(index["probes"]):
        with np.load(folder / f"{i}.npz", allow_pickle=False) as arrays:
            feeds = {name: arrays[f"i{k}"] for k, name in enumerate(index["inputs"])}
            outputs = {name: arrays[f"o{k}"] for k, name in enumerate(index["outputs"])}
        found.append((Probe(**probe), feeds, outputs))
    return found


def _says_something(outputs: Arrays) -> bool:
    return all(a.size and (a.dtype.kind not in "fc" or bool(np.isfinite(a).all())) for a in outputs.values())
