"""What is judged of an engine, output by output, and which output decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import Metric
from workers.data import LABELS
from workers.measure.accuracy import Kind, OutputComparison, are_probabilities, names_classes, same_scores
from workers.measure.agreement import DECIDES, TELLS, agreement_figures, worst_figures
from workers.measure.judge import Decision
from workers.measure.losses import bound_figures, worst_of
from workers.measure.pairs import PairComparison
from workers.measure.stats import Level
from workers.measure.targets import TargetTruth
from workers.measure.truth import ClassTruth, ReferenceShare, Truth

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

# Percent. Another order of summing moves floats by so much: below it, an output that is compared with the original's
# does not take the verdict from one that is judged by labels or references.
ROUNDING_PERCENT = 1e-3
_CHUNK_BYTES = 8 << 20  # of the original's outputs that are compared at a time: doubles of them are made
_PAIRS: tuple[Metric, ...] = ("spearman", "neighbours")
_SHOWN = ("metric", "basis", "baseline_value", "value", "loss_percent", "loss_ci", "bound_percent")


_WORSE_THAN_THE_MEAN = "The original is worse than the mean of the targets (R² below 0): see whether they are its own."


class Verdict:
    """Accumulates every output of both engines, batch by batch; memory is a few numbers per sample.

    The decision's output is judged on the decision's ground. With `decision.all_outputs`, every other one is held to
    the original's by its kind (see DECIDES), and the output with the largest loss decides: a second head that
    no label covers cannot degrade unseen. One that says the same as the labelled output (its class numbers or its
    probabilities) is judged by the labels as well. `total`: how many samples there will be, as far as is known.
    """

    def __init__(self, decision: Decision, kinds: Mapping[str, Kind], total: int | None = None) -> None:
        self._decision = decision
        self._samples = 0
        judged = decision.output
        known = dict(kinds)
        asked = not decision.all_outputs and decision.metric in ("top1", "agreement", "kl")
        proven = decision.form == "classes" or asked
        if proven and known[judged] is not Kind.EXACT:
            known[judged] = Kind.LOGITS
        if decision.form == "targets" and known[judged] is not Kind.EMBEDDING:
            known[judged] = Kind.NUMBERS
        self.comparisons = {name: OutputComparison(name, kind) for name, kind in known.items()}
        for name, comparison in self.comparisons.items():
            if comparison.kind is Kind.EMBEDDING or (name == judged and decision.metric in _PAIRS):
                comparison.pairs = PairComparison(total)
        self.comparisons[judged].axis = decision.axis
        self._by_values = {
            n for n, k in known.items() if k is Kind.LOGITS and not names_classes(n) and not (proven and n == judged)
        }
        self._truths: list[Truth] | None = None
        self._same: dict[str, ClassTruth] = {}

    def add(self, original: Arrays, engine: Arrays, references: Arrays, rows: int, first: int) -> None:
        """One batch of `rows` samples, `first` the index of its first; outputs have passed `check_outputs`."""
        per_sample = all(x.ndim and len(x) == rows for x in original.values())
        size = max(1, sum(x.nbytes for x in original.values()) // max(rows, 1))
        step = max(1, _CHUNK_BYTES // size) if per_sample else rows
        for start in range(0, rows, step):
            part = slice(start, start + step) if step < rows else slice(None)
            a, b, truth = (
                {n: x[part] if step < rows else x for n, x in g.items()} for g in (original, engine, references)
            )
            self._add(a, b, truth, min(step, rows - start), first + start)
        self._samples += rows

    def _add(self, original: Arrays, engine: Arrays, references: Arrays, rows: int, first: int) -> None:
        for name, comparison in self.comparisons.items():
            comparison.add(original[name], engine[name], rows)
            if name in self._by_values and not are_probabilities(original[name]):
                self._by_values.discard(name)  # the first batch looked like probabilities by chance
                comparison.kind = Kind.UNCLEAR
        decision = self._decision
        if decision.basis == "agreement":
            return
        judged = decision.output
        truth = references[LABELS if decision.basis == "labels" else judged]
        if decision.one_hot:
            truth = truth.argmax(axis=-1)
        if self._truths is None:
            self._truths = _truths(decision, original[judged], truth)
            if decision.form == "classes" and decision.axis is not None and decision.all_outputs:
                for name, x in original.items():
                    if name != judged and (x.dtype.kind in "iu" or x.shape == original[judged].shape):
                        axis = None if x.dtype.kind in "iu" else decision.axis
                        self._same[name] = ClassTruth(axis, x, truth)
        for against in self._truths:
            against.add(original[judged], engine[judged], truth, first)
        for name, same in list(self._same.items()):
            scores, other = (_classes_last(original[n], decision.axis) for n in (judged, name))
            if same_scores(scores, other):
                same.add(original[name], engine[name], truth, first)
            else:
                del self._same[name]

    def result(
        self, level: Level, limit_percent: float | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """(the figures of the output that decides, with `metric`, `metrics`, `output`, `basis`, `why` and `warnings`;
        {output: figures}; notes).

        `enough_samples_for` is the largest of all outputs judged where labels or references judge one of them, and
        `bound_percent` (see `bound_figures`) that of all outputs judged: each of them has to keep the limit.
        """
        decision = self._decision
        names = [decision.output]
        if decision.all_outputs:
            names += [n for n in self.comparisons if n != decision.output]
        notes = self._notes()
        judged = {name: self._judged(name, level, notes) for name in names}
        floor = ROUNDING_PERCENT if self._truths else 0.0
        worst = judged[decision.output]
        for figures in judged.values():
            if figures["loss_percent"] > max(worst["loss_percent"], floor):
                worst = figures
        if worst["metric"] == "r2" and worst["baseline_value"] < 0:
            notes.append(_WORSE_THAN_THE_MEAN)
        why = decision.why
        if self._truths:
            if decision.form == "targets" and decision.basis == "labels" and decision.all_outputs:
                why += f" and are {'zeros and ones' if judged[decision.output]['metric'] == 'macro_f1' else 'numbers'}"
            if len(names) > 1:
                why += "; the other outputs are held to the original's, each by its kind"
            if worst is not judged[decision.output]:
                why += f"; {worst['output']!r} loses more and decides"
            carries = max(judged.values(), key=lambda f: float(f["enough_samples_for"]))
            worst = {**worst, **{k: carries[k] for k in ("enough_samples_for", "enough_samples_reason")}}
        losses = [loss for figures in judged.values() for loss in figures["losses"]]
        worst = {**worst, **bound_figures(losses, level, limit_percent), "warnings": self._warnings(notes)}
        del worst["losses"]
        outputs = {
            name: comparison.to_json() | {k: judged[name][k] for k in _SHOWN if name in judged}
            for name, comparison in self.comparisons.items()
        }
        metrics = self._metrics(worst, level, notes)
        if worst["output"] != decision.output:
            outputs[decision.output]["metrics"] = self._metrics(judged[decision.output], level, notes)
        return {**worst, "why": why, "metrics": metrics}, outputs, list(dict.fromkeys(notes))

    def _judged(self, name: str, level: Level, notes: list[str]) -> dict[str, Any]:
        """The worst figures of one output, by the metrics that decide of it."""
        decision = self._decision
        comparison = self.comparisons[name]
        if name == decision.output and self._truths:
            metrics = self._deciding(comparison, level, notes)
            found = [self._against_truth(self._truths, m, level) | {"metric": m} for m in metrics]
            figures = worst_of(found) | {"basis": decision.basis}
        elif name in self._same and decision.metric in self._same[name].offers:
            same = self._same[name].result(decision.metric, level)
            figures = {**same, "metric": decision.metric, "basis": decision.basis}
        else:
            forced = not decision.all_outputs
            metrics = (decision.metric,) if forced else DECIDES[comparison.kind]
            figures = {**worst_figures(comparison, metrics, level), "basis": "agreement"}
        return {**figures, "output": name}

    def _deciding(self, comparison: OutputComparison, level: Level, notes: list[str]) -> tuple[Metric, ...]:
        """The metrics of which the worst counts, for the output that labels or references judge."""
        decision = self._decision
        assert self._truths
        if decision.all_outputs and decision.form == "scores":
            return ("top1", "normalized_error") if comparison.kind is Kind.UNCLEAR else ("top1",)
        if decision.all_outputs and decision.form == "classes":
            return (decision.metric,) if decision.metric in self._truths[0].offers else ("top1",)
        if not decision.all_outputs or decision.form != "targets" or decision.basis != "labels":
            return (decision.metric,)
        (targets,) = self._truths
        assert isinstance(targets, TargetTruth)
        if targets.binary:
            return ("macro_f1",)
        try:
            self._against_truth(self._truths, "r2", level)
        except StageFailure as failure:
            notes.append(f"{failure.detail} The normalized error decides instead.")
            return ("normalized_error",)
        return ("r2",)

    def _against_truth(self, truths: list[Truth], metric: Metric, level: Level) -> dict[str, Any]:
        for truth in truths:
            if metric in truth.offers or (metric == "macro_f1" and isinstance(truth, TargetTruth)):
                return truth.result(metric, level)
        raise StageFailure(
            "metric_mismatch",
            f"The metric {metric!r} cannot be formed of the output {self._decision.output!r}: it has too many classes, "
            "or numbers in a sample.",
            FailureKind.REQUEST,
            remedy="Use the metric 'auto'.",
        )

    def _metrics(self, judged: Mapping[str, Any], level: Level, notes: list[str]) -> dict[str, Any]:
        """{metric: figures} of all that fit one output, the deciding one among them."""
        name = judged["output"]
        sources: list[tuple[Metric, str, Truth | None]] = []
        if name == self._decision.output and self._truths:
            for truth in self._truths:
                offers = truth.offers + (("macro_f1",) if isinstance(truth, TargetTruth) and truth.binary else ())
                sources += [(m, self._decision.basis, truth) for m in offers]
        elif name in self._same:
            sources += [(m, self._decision.basis, self._same[name]) for m in self._same[name].offers]
        comparison = self.comparisons[name]
        sources += [(m, "agreement", None) for m in TELLS[comparison.kind]]
        out = {judged["metric"]: {k: judged[k] for k in _SHOWN[1:]}}
        for metric, basis, against in sources:
            if metric in out:
                continue
            try:
                if against is None:
                    figures = agreement_figures(comparison, metric, level)
                else:
                    figures = against.result(metric, level)
            except StageFailure as failure:
                notes.append(failure.detail)
                continue
            out[metric] = {k: {**figures, "basis": basis}[k] for k in _SHOWN[1:]}
        return out

    def _warnings(self, notes: Sequence[str]) -> list[str]:
        """What makes all figures worthless, in all likelihood."""
        found = [warning for truth in self._truths or () for warning in truth.warnings()]
        return found + [note for note in notes if note == _WORSE_THAN_THE_MEAN]

    def _notes(self) -> list[str]:
        notes = [note for truth in self._truths or () for note in truth.notes()]
        if self._samples == 1:
            notes.append("There is one sample: no interval can be formed, and no loss can be told from none.")
        for name, comparison in self.comparisons.items():
            if comparison.original_not_finite:
                notes.append(
                    f"The original's own output {name!r} holds NaN or Infinity in {comparison.original_not_finite} "
                    "places: they are not compared."
                )
        return notes


def _truths(decision: Decision, original: Array, truth: Array) -> list[Truth]:
    if decision.form == "classes":
        return [ClassTruth(decision.axis, original, truth)]
    if decision.form == "exact":
        return [ReferenceShare("agreement")]
    if decision.form == "scores":
        return [ReferenceShare("top1"), TargetTruth(truth)]
    return [TargetTruth(truth)]


def _classes_last(values: Array, axis: int | None) -> Array:
    return values if axis is None or values.dtype.kind in "iu" else np.moveaxis(values, axis, -1)
