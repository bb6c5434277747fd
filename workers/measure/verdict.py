"""What is judged of an engine, output by output, and which output decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from workers.data import LABELS
from workers.measure.accuracy import Kind, OutputComparison, are_probabilities, names_classes, same_scores
from workers.measure.judge import METRICS_OF_KIND, Decision, Metric, TruthComparison, agreement_figures

Array = np.ndarray[Any, Any]

# Percent. Another order of summing moves floats by so much: below it, an output that is compared with the original's
# does not take the verdict from one that is judged by labels or references.
ROUNDING_PERCENT = 1e-3


class Verdict:
    """Accumulates every output of both engines, batch by batch; memory is a few numbers per sample.

    The decision's output is judged on the decision's ground. With `decision.all_outputs`, every other one is held to
    the original's by its kind (see METRICS_OF_KIND), and the output with the largest loss decides: a second head that
    no label covers cannot degrade unseen. One that says the same as the labelled output (its class numbers or its
    probabilities) is judged by the labels as well.
    """

    def __init__(self, decision: Decision, kinds: Mapping[str, Kind]) -> None:
        self._decision = decision
        judged = decision.output
        known = dict(kinds)
        asked = not decision.all_outputs and decision.metric in ("top1", "agreement")
        proven = decision.basis == "labels" or asked
        if proven and known[judged] is not Kind.EXACT:
            known[judged] = Kind.LOGITS
        self.comparisons = {name: OutputComparison(name, kind) for name, kind in known.items()}
        self._by_values = {
            n for n, k in known.items() if k is Kind.LOGITS and not names_classes(n) and not (proven and n == judged)
        }
        self._truths: dict[Metric, TruthComparison] = {}
        self._same: dict[str, TruthComparison] = {}
        if decision.basis == "agreement":
            return
        metrics: tuple[Metric, ...] = (decision.metric,)
        if decision.all_outputs and (known[judged] is Kind.UNCLEAR or judged in self._by_values):
            metrics = ("top1", "normalized_error")
        self._truths = {m: TruthComparison(replace(decision, metric=m)) for m in metrics}
        if decision.basis == "labels" and decision.all_outputs:
            self._same = {n: TruthComparison(replace(decision, output=n)) for n in known if n != judged}

    def add(
        self,
        original: Mapping[str, Array],
        engine: Mapping[str, Array],
        references: Mapping[str, Array],
        rows: int,
        first: int,
    ) -> None:
        """One batch of `rows` samples, `first` the index of its first; outputs have passed `check_outputs`."""
        for name, comparison in self.comparisons.items():
            comparison.add(original[name], engine[name], rows)
            if name in self._by_values and not are_probabilities(original[name]):
                self._by_values.discard(name)  # the first batch looked like probabilities by chance
                comparison.kind = Kind.UNCLEAR
        if not self._truths:
            return
        judged = self._decision.output
        truth = references[LABELS if self._decision.basis == "labels" else judged]
        for comparison_to_truth in self._truths.values():
            comparison_to_truth.add(original[judged], engine[judged], truth, first)
        for name, same in list(self._same.items()):
            if same_scores(original[judged], original[name]):
                same.add(original[name], engine[name], truth, first)
            else:
                del self._same[name]

    def result(self, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the figures of the output that decides, with `metric`, `output`, `basis` and `why`; {output: figures}).

        `enough_samples_for` is the largest of all outputs judged where labels or references judge one of them.
        """
        decision = self._decision
        names = [decision.output]
        if decision.all_outputs:
            names += [n for n in self.comparisons if n != decision.output]
        judged = {name: self._judged(name, seed) for name in names}
        floor = ROUNDING_PERCENT if self._truths else 0.0
        worst = judged[decision.output]
        for figures in judged.values():
            if figures["loss_percent"] > max(worst["loss_percent"], floor):
                worst = figures
        why = decision.why
        if self._truths:
            if len(names) > 1:
                why += "; the other outputs are held to the original's, each by its kind"
            if worst is not judged[decision.output]:
                why += f"; {worst['output']!r} loses more and decides"
            carries = max(judged.values(), key=lambda f: float(f["enough_samples_for"]))
            worst = {**worst, **{k: carries[k] for k in ("enough_samples_for", "enough_samples_reason")}}
        shown = ("metric", "basis", "baseline_value", "value", "loss_percent", "loss_ci")
        outputs = {
            name: comparison.to_json() | {k: judged[name][k] for k in shown if name in judged}
            for name, comparison in self.comparisons.items()
        }
        return {**worst, "why": why}, outputs

    def _judged(self, name: str, seed: int) -> dict[str, Any]:
        """The worst figures of one output."""
        decision = self._decision
        comparison = self.comparisons[name]
        if name == decision.output and self._truths:
            metrics: tuple[Metric, ...] = tuple(self._truths)
            if len(metrics) > 1 and comparison.kind is Kind.LOGITS:
                metrics = ("top1",)
            found = [{**self._truths[m].result(seed), "metric": m, "basis": decision.basis} for m in metrics]
            figures = max(found, key=lambda f: float(f["loss_percent"]))
        elif name in self._same:
            figures = {**self._same[name].result(seed), "metric": decision.metric, "basis": decision.basis}
        else:
            forced = not decision.all_outputs
            metrics = (decision.metric,) if forced else METRICS_OF_KIND[comparison.kind]
            figures = {**agreement_figures(comparison, metrics, seed), "basis": "agreement"}
        return {**figures, "output": name}
