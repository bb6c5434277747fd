"""Stage `validate`: the shipped engine against the exported original, on data held apart from calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from app.domain.artifact_key import ArtifactRef, FileRef
from app.domain.failures import FailureKind, StageFailure
from workers.data import Samples, synthetic_feeds
from workers.kernel import Session, Stage, StageContext, StageOptions, StageResult, backends
from workers.measure.accuracy import Broken, check_outputs, output_kind
from workers.measure.inputs import fixed_batch
from workers.measure.judge import Metric, decide
from workers.measure.verdict import Verdict

Array = np.ndarray[Any, Any]

BATCH = 16
BATCH_BYTES = 64 << 20
SYNTHETIC_SAMPLES = 32


class ValidateOptions(StageOptions):
    """`metric`: see `workers.measure.judge`. `shapes`: as in the job's spec, for synthetic inputs."""

    backend: str
    runtime: dict[str, Any] = Field(default_factory=dict)
    metric: Metric = "auto"
    max_samples: int = Field(default=2048, ge=1)
    part: Literal["all", "calibration", "validation"] = "all"
    shapes: dict[str, Any] | None = None
    seed: int = Field(default=0, ge=0)
    baseline_backend: str = "onnxruntime"
    baseline_runtime: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class _Piece:
    """A batch to run, padded to what the model takes; only the first `count` samples are real."""

    feeds: dict[str, Array]
    references: dict[str, Array]
    count: int
    padded: int


class Validate(Stage[ValidateOptions]):
    """inputs: model (the exported original), engine, [data], [calibration: its samples are left out of `data`].

    data: metric, kind ("labels" | "references" | "agreement" | "synthetic"), why, output (the one with the largest
    loss: it decides), baseline_value, value, loss_percent (percentage points; agreement and cosine: 100·(1 − mean);
    normalized error: 100·‖a−b‖/‖a‖), loss_ci (95 %), samples, units (what was averaged: samples, or batches where an
    output has no sample axis), enough_samples_for (smallest loss in percent that so many can carry), outputs {name:
    distances, and metric, basis, baseline_value, value, loss_percent, loss_ci where it is judged}, source, batch_size,
    engine_digest, samples_digest, broken. `broken` = {code, output, detail} where the engine must not ship whatever its
    metric: NaN, Infinity, a missing output, a wrong shape or dtype, a failed load or run; its figures are then null.
    """

    name = "validate"
    version = 2
    Options = ValidateOptions
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")
    hardware_bound = True

    def run(self, ctx: StageContext, options: ValidateOptions) -> StageResult:
        original = _load(ctx.inputs["model"], options.baseline_backend, options.baseline_runtime)
        facts: dict[str, Any] = {
            "source": "dataset" if "data" in ctx.inputs else "synthetic",
            "part": options.part,
            "engine_digest": folder_digest(ctx.inputs["engine"]),
            "samples_digest": None,
            "left_out": 0,
        }
        samples = None
        if "data" in ctx.inputs:
            samples = _samples(ctx, options, original)
            facts.update(samples_digest=samples.digest(), left_out=samples.excluded)
        try:
            engine = _load(ctx.inputs["engine"], options.backend, options.runtime)
        except StageFailure as failure:
            if not failure.cacheable or failure.kind is not FailureKind.MODEL:
                raise
            broken = Broken("load_failed", None, failure.detail)
            return StageResult(data={**_nothing(broken), "outputs": {}, "samples": 0, "batch_size": None, **facts})
        try:
            return StageResult(data={**_Comparison(ctx, options, original, engine, samples).result(), **facts})
        finally:
            engine.close()
            original.close()


class _Comparison:
    def __init__(
        self, ctx: StageContext, options: ValidateOptions, original: Session, engine: Session, samples: Samples | None
    ) -> None:
        self.ctx, self.options, self.samples = ctx, options, samples
        self.original, self.engine = original, engine
        self.fixed = fixed_batch(original.inputs)
        self.total = SYNTHETIC_SAMPLES if samples is None else len(samples)
        self.done = 0
        self.verdict: Verdict | None = None

    def result(self) -> dict[str, Any]:
        batch = self._usable_batch()
        broken = None
        for piece in self._pieces(batch):
            broken = self._compare(piece)
            if broken is not None:
                break
            self.done += piece.count
            self.ctx.reporter.progress(min(self.done / self.total, 1.0), f"{self.done} of {self.total} samples")
        figures = {**_nothing(broken), "outputs": {}} if broken is not None else self._figures()
        return {**figures, "samples": self.done, "batch_size": batch}

    def _figures(self) -> dict[str, Any]:
        assert self.verdict is not None, "there is at least one batch"
        figures, outputs = self.verdict.result(self.options.seed)
        basis, why = figures.pop("basis"), figures.pop("why")
        if self.samples is None:
            basis, why = "synthetic", f"no data set was given: random inputs; {why}"
        return {**figures, "kind": basis, "why": why, "broken": None, "outputs": outputs}

    def _compare(self, piece: _Piece) -> Broken | None:
        a = _cut(self.original.run(piece.feeds), piece)
        try:
            b = _cut(self.engine.run(piece.feeds), piece)
        except StageFailure as failure:
            if not failure.cacheable:
                raise
            return Broken("inference_failed", None, failure.detail)
        broken = check_outputs(a, b, self.done)
        if broken is not None:
            return broken
        if self.verdict is None:
            kinds = {name: output_kind(name, values) for name, values in a.items()}
            self.verdict = Verdict(decide(self.options.metric, kinds, a, piece.references), kinds)
        self.verdict.add(a, b, piece.references, piece.count, self.done)
        return None

    def _usable_batch(self) -> int:
        """The model's own batch size, else as many samples as 64 MiB hold, at most 16; 1 where the original's free
        batch axis is none."""
        if self.fixed is not None:
            return self.fixed
        one = next(self._pieces(1))
        size = max(1, sum(a.nbytes for a in one.feeds.values()))
        batch = int(min(BATCH, max(1, BATCH_BYTES // size)))
        if batch > 1:
            try:
                self.original.run(next(self._pieces(batch)).feeds)
            except StageFailure as failure:
                if failure.code != "inference_failed":
                    raise
                self.ctx.reporter.note("The original fails on batches: samples are compared one by one.")
                return 1
        return batch

    def _pieces(self, batch: int) -> Iterator[_Piece]:
        if self.samples is None:
            for i in range(-(-SYNTHETIC_SAMPLES // batch)):
                feeds = synthetic_feeds(self.original.inputs, batch, self.options.shapes, self.options.seed + i)
                yield _Piece(feeds, {}, batch, batch)
            return
        for found in self.samples.batches(batch):
            feeds, missing = found.feeds, batch - len(found)
            if missing and self.fixed is not None:
                feeds = {n: np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) for n, a in feeds.items()}
                yield _Piece(feeds, found.references, len(found), batch)
            else:
                yield _Piece(feeds, found.references, len(found), len(found))


def folder_digest(folder: Path) -> str:
    """The artifact digest of the files as they lie there: what was judged is what ships."""
    refs = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            refs.append(FileRef(path.name, hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size))
    return ArtifactRef(tuple(refs)).digest


def _samples(ctx: StageContext, options: ValidateOptions, original: Session) -> Samples:
    used: list[str] = []
    if "calibration" in ctx.inputs:
        used = Samples(ctx.only_file("calibration"), original.inputs, original.outputs).digests()
    return Samples(
        ctx.only_file("data"),
        original.inputs,
        original.outputs,
        part=options.part,
        max_samples=options.max_samples,
        exclude=used,
    )


def _load(folder: Path, backend: str, runtime: Mapping[str, Any]) -> Session:
    known = backends()
    if backend not in known:
        raise StageFailure("backend_unavailable", f"This worker has no backend {backend!r}.", FailureKind.REQUEST)
    return known[backend]().load(folder, runtime)


def _cut(outputs: Mapping[str, Array], piece: _Piece) -> dict[str, Array]:
    """Without the rows of the padding."""
    if piece.count == piece.padded:
        return dict(outputs)
    return {n: a[: piece.count] if a.ndim and a.shape[0] == piece.padded else a for n, a in outputs.items()}


def _nothing(broken: Broken) -> dict[str, Any]:
    names = ("metric", "kind", "output", "baseline_value", "value", "loss_percent", "loss_ci", "enough_samples_for")
    return {**dict.fromkeys(names), "units": 0, "why": broken.detail, "broken": broken.to_json()}
