"""The batches that the original and an engine are compared on, and the original's outputs for them.

Stages `reference_outputs` and `validate` go the same way through the same samples: selection, order and batch size are
decided here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from app.domain.artifact_key import ArtifactRef, FileRef
from app.domain.failures import FailureKind, StageFailure
from workers.artifacts import names_in
from workers.data import Samples, synthetic_feeds
from workers.kernel import Session, StageContext, StageOptions, TensorSpec, backends
from workers.measure.axes import batch_axes, fixed_batch
from workers.measure.shares import Part

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

BATCH = 16
BATCH_BYTES = 64 << 20
SYNTHETIC_SAMPLES = 32


class SampleOptions(StageOptions):
    """Which samples, and how the original runs. `part`: of a data set that is split by digest; `shared`: it calibrates,
    too. `shapes`: as in the job's spec, and `seed`: for synthetic inputs."""

    max_samples: int = Field(default=2048, ge=1)
    part: Part = "all"
    shared: bool = False
    shapes: dict[str, Any] | None = None
    seed: int = Field(default=0, ge=0)
    baseline_backend: str = "onnxruntime"
    baseline_runtime: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """A batch to run, padded to what the model takes; only the first `count` samples are real."""

    feeds: dict[str, Array]
    references: dict[str, Array]
    count: int
    padded: int

    def cut(self, outputs: Arrays) -> dict[str, Array]:
        """Without the rows of the padding."""
        if self.count == self.padded:
            return dict(outputs)
        return {n: a[: self.count] if a.ndim and a.shape[0] == self.padded else a for n, a in outputs.items()}


class Pieces:
    """All samples in batches; synthetic ones where there is no data set."""

    def __init__(
        self, inputs: Sequence[TensorSpec], samples: Samples | None, shapes: Mapping[str, Any] | None, seed: int
    ) -> None:
        self._inputs, self._samples, self._shapes, self._seed = inputs, samples, shapes, seed
        self.fixed = fixed_batch(inputs)
        # An engine may be built for the job's shapes only (a TensorRT profile).
        axes = batch_axes(inputs)
        ends = [(r["max"], axes.get(name)) for name, r in (shapes or {}).items()]
        self.largest = min((int(end[a]) for end, a in ends if a is not None and a < len(end)), default=BATCH)
        self.total = SYNTHETIC_SAMPLES if samples is None else len(samples)
        self.distinct = SYNTHETIC_SAMPLES if samples is None else samples.distinct
        self.one_hot_labels = samples is not None and samples.one_hot_labels

    def batches(self, batch: int) -> Iterator[Piece]:
        if self._samples is None:
            for i in range(-(-SYNTHETIC_SAMPLES // batch)):
                feeds = synthetic_feeds(self._inputs, batch, self._shapes, self._seed + i)
                yield Piece(feeds, {}, batch, batch)
            return
        for found in self._samples.batches(batch):
            if len(found) < batch and self.fixed is not None:
                yield Piece(found.filled(batch), found.references, len(found), batch)
            else:
                yield Piece(found.feeds, found.references, len(found), len(found))


class Original:
    """The original, running. `batch`: the model's own batch size, else as many samples as 64 MiB of inputs and outputs
    hold, at most 16; 1 where the free batch axis is none."""

    def __init__(self, session: Session, pieces: Pieces, note: Callable[[str], None]) -> None:
        self._session, self._pieces = session, pieces
        self._first: Arrays | None = None
        self.batch = pieces.fixed or self._usable_batch(note)

    def outputs(self) -> Iterator[tuple[Piece, Arrays]]:
        """Every piece with the original's outputs for it, those of the padding among them."""
        for piece in self._pieces.batches(self.batch):
            found, self._first = self._first, None
            yield piece, found if found is not None else self._session.run(piece.feeds)

    def _usable_batch(self, note: Callable[[str], None]) -> int:
        feeds = next(self._pieces.batches(1)).feeds
        self._first = self._session.run(feeds)
        size = max(1, sum(a.nbytes for a in (*feeds.values(), *self._first.values())))
        batch = int(min(BATCH, self._pieces.largest, max(1, BATCH_BYTES // size)))
        if batch > 1:
            try:
                self._first = self._session.run(next(self._pieces.batches(batch)).feeds)
            except StageFailure as failure:
                if failure.code != "inference_failed":
                    raise
                note("The original fails on batches: samples are compared one by one.")
                return 1
        return batch


def open_samples(
    ctx: StageContext, options: SampleOptions, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> Samples | None:
    """Input `data` without the samples of input `calibration`; None where there is no data."""
    if "data" not in ctx.inputs:
        return None
    used: list[str] = []
    if "calibration" in ctx.inputs:
        used = Samples(ctx.only_file("calibration"), inputs, outputs).digests()
    return Samples(
        ctx.only_file("data"),
        inputs,
        outputs,
        part=options.part,
        shared=options.shared,
        max_samples=options.max_samples,
        exclude=used,
    )


def load_session(folder: Path, backend: str, runtime: Mapping[str, Any]) -> Session:
    known = backends()
    if backend not in known:
        raise StageFailure("backend_unavailable", f"This worker has no backend {backend!r}.", FailureKind.REQUEST)
    return known[backend]().load(folder, runtime)


def folder_digest(folder: Path) -> str:
    """The artifact digest of the files as they lie there: what was judged is what ships."""
    refs = []
    for name in names_in(folder):
        path = folder / name
        with path.open("rb") as file:
            refs.append(FileRef(name, hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size))
    return ArtifactRef(tuple(refs)).digest
