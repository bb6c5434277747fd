"""Stage `validate`: the shipped engine against the exported original, on data held apart from calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import Metric
from workers.kernel import Session, Stage, StageContext, StageResult
from workers.measure.accuracy import Broken, check_outputs, output_kind
from workers.measure.judge import decide
from workers.measure.pieces import Original, Piece, Pieces, SampleOptions, folder_digest, load_session, open_samples
from workers.measure.stats import Level
from workers.measure.stored import StoredOutputs, expected_mismatch
from workers.measure.verdict import Verdict

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


class ValidateOptions(SampleOptions):
    """`metric`: see docs/measurement.md. `confidence`: of the bound of the loss, one-sided; `max_loss_percent`: the
    limit, for how many samples would show that it is kept."""

    backend: str
    runtime: dict[str, Any] = Field(default_factory=dict)
    metric: Metric = "auto"
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    max_loss_percent: float | None = Field(default=None, ge=0)


class Validate(Stage[ValidateOptions]):
    """inputs: model (the exported original), engine, [data], [calibration: its samples are left out of `data`],
    [expected: the output of `reference_outputs` for the same samples; the original then need not run again].

    data: metric, kind ("labels" | "references" | "agreement" | "synthetic"), why, output (the one with the largest
    loss: it decides), baseline_value, value, loss_percent (each metric's own, see docs/measurement.md), loss_ci (95 %),
    samples, distinct (of those asked for; equal ones count once in the bound), units (what was averaged: samples, or
    batches where an output has no sample axis), enough_samples_for (smallest loss in percent that so many can carry),
    bound_percent (what `confidence` cannot exclude, of any output that is judged; null where there is no bound),
    bound_method, confidence, samples_needed (that have to judge to show that `max_loss_percent` is kept; null where no
    number would do), warnings (what makes the labels worthless), metrics {metric: basis, baseline_value, value,
    loss_percent, loss_ci, bound_percent: all that fit the deciding output}, notes (what weakens the figures), outputs
    {name: distances, and metric, basis, baseline_value, value, loss_percent, loss_ci, bound_percent where it is judged,
    metrics where another one decides}, source, part, shared, left_out, batch_size, engine_digest, samples_digest,
    complete (False: the deadline stopped it), broken.
    `broken` = {code, output, detail} where the engine must not ship whatever its metric: NaN, Infinity, a missing
    output, a wrong shape or dtype, a failed load or run; its figures are then null.
    """

    name = "validate"
    version = 4
    Options = ValidateOptions
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")
    hardware_bound = True

    def run(self, ctx: StageContext, options: ValidateOptions) -> StageResult:
        facts: dict[str, Any] = {
            "part": options.part,
            "shared": options.shared,
            "engine_digest": folder_digest(ctx.inputs["engine"]),
        }
        with _Truth(ctx, options) as truth:
            facts |= truth.facts
            try:
                engine = load_session(ctx.inputs["engine"], options.backend, options.runtime)
            except StageFailure as failure:
                if not failure.cacheable or failure.kind is not FailureKind.MODEL:
                    raise
                broken = Broken("load_failed", None, failure.detail)
                return StageResult(data={**_nothing(broken), "samples": 0, "batch_size": None, **facts})
            try:
                found = _Comparison(ctx, options, truth, engine).result()
            finally:
                engine.close()
        return StageResult(data={**found, **facts}, reusable=found["complete"])


class _Truth:
    """The original: its stored outputs as far as they go, else the model, which is loaded only where it has to run."""

    def __init__(self, ctx: StageContext, options: ValidateOptions) -> None:
        self._ctx, self._options = ctx, options
        self._session: Session | None = None
        self._stored: StoredOutputs | None = None
        if "expected" in ctx.inputs:
            stored = StoredOutputs(ctx.inputs["expected"])
            self._stored = stored if stored.stored else None
        known = self._stored or self._running()
        samples = open_samples(ctx, options, known.inputs, known.outputs)
        self.source = "synthetic" if samples is None else "dataset"
        self.pieces = Pieces(known.inputs, samples, options.shapes, options.seed)
        self.facts = {
            "source": self.source,
            "samples_digest": samples.digest() if samples is not None else None,
            "left_out": samples.excluded if samples is not None else 0,
            "distinct": samples.distinct if samples is not None else None,
        }
        self._original: Original | None = None
        if self._stored is not None:
            self._stored.check(
                {
                    "model_digest": folder_digest(ctx.inputs["model"]),
                    "samples_digest": self.facts["samples_digest"],
                    **({"shapes": options.shapes, "seed": options.seed} if samples is None else {}),
                    "baseline_backend": options.baseline_backend,
                    "baseline_runtime": options.baseline_runtime,
                }
            )
            self.batch = self._stored.batch
        else:
            self._original = Original(self._running(), self.pieces, ctx.reporter.note)
            self.batch = self._original.batch

    def __enter__(self) -> _Truth:
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._session.close()

    def outputs(self) -> Iterator[tuple[Piece, Arrays]]:
        """Every piece with the original's outputs, those of the padding among them."""
        if self._original is not None:
            yield from self._original.outputs()
            return
        assert self._stored is not None
        stored = self._stored.batches()
        for piece in self.pieces.batches(self.batch):
            kept = next(stored, None)
            if kept is None:  # the deadline cut them short
                yield piece, self._running().run(piece.feeds)
            elif kept[0] != piece.count:
                raise expected_mismatch(f"a batch has {kept[0]} samples, wanted are {piece.count}")
            else:
                yield piece, kept[1]

    def _running(self) -> Session:
        if self._session is None:
            o = self._options
            self._session = load_session(self._ctx.inputs["model"], o.baseline_backend, o.baseline_runtime)
        return self._session


class _Comparison:
    def __init__(self, ctx: StageContext, options: ValidateOptions, truth: _Truth, engine: Session) -> None:
        self.ctx, self.options, self.truth, self.engine = ctx, options, truth, engine
        self.total = truth.pieces.total
        self.done = 0
        self.verdict: Verdict | None = None

    def result(self) -> dict[str, Any]:
        broken, complete = None, True
        for piece, outputs in self.truth.outputs():
            broken = self._compare(piece, outputs)
            if broken is not None:
                break
            self.done += piece.count
            self.ctx.reporter.progress(min(self.done / self.total, 1.0), f"{self.done} of {self.total} samples")
            if self.done < self.total and self.ctx.seconds_left() <= 0:
                complete = False
                break
        try:
            figures = _nothing(broken) if broken is not None else self._figures()
        except StageFailure as failure:
            if complete:
                raise
            # Of what was judged in time: more time may tell, so it is neither the data's fault nor kept.
            raise replace(failure, kind=FailureKind.MODEL, cacheable=False) from failure
        if not complete:
            figures["notes"].append(f"The time ran out: {self.done} of {self.total} samples were judged.")
        return {**figures, "samples": self.done, "batch_size": self.truth.batch, "complete": complete}

    def _figures(self) -> dict[str, Any]:
        assert self.verdict is not None, "there is at least one batch"
        pieces, options = self.truth.pieces, self.options
        level = Level(options.confidence, options.seed, max(pieces.total / max(pieces.distinct, 1), 1.0))
        figures, outputs, notes = self.verdict.result(level, options.max_loss_percent)
        basis, why = figures.pop("basis"), figures.pop("why")
        if self.truth.source == "synthetic":
            basis, why = "synthetic", f"no data set was given: random inputs; {why}"
        return {**figures, "kind": basis, "why": why, "broken": None, "outputs": outputs, "notes": notes}

    def _compare(self, piece: Piece, original: Arrays) -> Broken | None:
        try:
            answer = self.engine.run(piece.feeds)
        except StageFailure as failure:
            if not failure.cacheable:
                raise
            return Broken("inference_failed", None, failure.detail)
        broken = check_outputs(original, answer, self.done, piece.count)  # with the padding: fewer rows show
        if broken is not None:
            return broken
        a, b = piece.cut(original), piece.cut(answer)
        if self.verdict is None:
            kinds = {name: output_kind(name, values) for name, values in a.items()}
            one_hot = self.truth.pieces.one_hot_labels
            decision = decide(self.options.metric, kinds, a, piece.references, one_hot=one_hot)
            self.verdict = Verdict(decision, kinds, self.total)
        self.verdict.add(a, b, piece.references, piece.count, self.done)
        return None


def _nothing(broken: Broken) -> dict[str, Any]:
    names = (
        *("metric", "kind", "output", "baseline_value", "value", "loss_percent", "loss_ci", "enough_samples_for"),
        *("bound_percent", "bound_method", "samples_needed"),
    )
    rest: dict[str, Any] = {"units": 0, "metrics": {}, "outputs": {}, "notes": [], "warnings": [], "complete": True}
    return {**dict.fromkeys(names), **rest, "why": broken.detail, "broken": broken.to_json()}
