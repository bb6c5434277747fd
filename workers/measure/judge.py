"""Which metric judges an engine, and the loss it finds: against labels, references, or the original's own outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from app.domain.failures import FailureKind, StageFailure, data_failure
from workers.data import LABELS
from workers.measure.accuracy import Kind, OutputComparison, per_row, rounded
from workers.measure.stats import bootstrap_statistic, carried_loss_percent, paired_loss, paired_normalized_error

Array = np.ndarray[Any, Any]
Metric = Literal["auto", "top1", "agreement", "cosine", "normalized_error"]
Basis = Literal["labels", "references", "agreement"]

IGNORED_LABEL = -100  # the frameworks' custom for positions that do not count
METRICS_OF_KIND: dict[Kind, tuple[Metric, ...]] = {  # of several, the worst counts
    Kind.LOGITS: ("agreement",),
    Kind.UNCLEAR: ("agreement", "normalized_error"),
    Kind.EMBEDDING: ("cosine",),
    Kind.NUMBERS: ("normalized_error",),
    Kind.EXACT: ("agreement",),
}
_BOTH = "scores of classes or plain numbers, nothing says which: the worse of top-1 and normalized error"


@dataclass(frozen=True)
class Decision:
    """`output` is judged by `metric` on the ground of `basis`. `all_outputs`: every other output is held to the
    original's by its kind, and the worst decides; without it, somebody asked for this one metric."""

    metric: Metric
    basis: Basis
    output: str
    why: str
    all_outputs: bool = False


def decide(
    metric: Metric, kinds: Mapping[str, Kind], outputs: Mapping[str, Array], references: Mapping[str, Array]
) -> Decision:
    """From the first batch: the original's outputs (and their kinds) and the data set's references.

    Raises StageFailure: `metric_mismatch` (REQUEST) where the metric asked for fits neither outputs nor data,
    `labels_mismatch` (DATA) where labels fit no output of a classifier.
    """
    by_name = {n: r for n, r in references.items() if n in outputs and outputs[n].shape == r.shape}
    if metric in ("auto", "top1"):
        auto = metric == "auto"
        found = _by_labels(outputs, references, kinds, auto=auto) or _by_references(kinds, by_name, auto=auto)
        if found is not None:
            return found
        if metric == "top1":
            raise _mismatch("top1", "needs `labels` in the validation data and an output with a score per class")
        return _by_agreement(kinds, labels_unused=LABELS in references)
    floats = [n for n, k in kinds.items() if k is not Kind.EXACT]
    if metric == "normalized_error":
        for name in by_name:
            if name in floats:
                return Decision(metric, "references", name, f"asked for; against the references of {name!r}")
        fitting = floats
    elif metric == "cosine":
        fitting = sorted((n for n in floats if outputs[n].ndim >= 2), key=lambda n: kinds[n] is not Kind.EMBEDDING)
    else:
        order = (Kind.LOGITS, Kind.UNCLEAR, Kind.EXACT)
        fitting = [n for kind in order for n, k in kinds.items() if k is kind]
    if not fitting:
        raise _mismatch(metric, f"fits none of the outputs {sorted(outputs)}")
    return Decision(metric, "agreement", fitting[0], f"asked for; against the original's output {fitting[0]!r}")


def _by_labels(
    outputs: Mapping[str, Array], references: Mapping[str, Array], kinds: Mapping[str, Kind], *, auto: bool
) -> Decision | None:
    if LABELS not in references or LABELS in outputs:
        return None
    labels = squeezed(references[LABELS])
    fitting = [
        n
        for n, x in outputs.items()
        if x.dtype.kind == "f" and x.ndim >= 2 and x.shape[-1] >= 2 and x.shape[:-1] == labels.shape
    ]
    if fitting:
        most_likely = (Kind.LOGITS, Kind.UNCLEAR, Kind.NUMBERS, Kind.EMBEDDING)
        classes = int(labels.max(initial=0)) + 1
        name = min(fitting, key=lambda n: (most_likely.index(kinds[n]), outputs[n].shape[-1] < classes))
        why = f"the data has labels and {name!r} a score per class"
        return Decision("top1", "labels", name, why, all_outputs=auto)
    classifiers = [n for n, k in kinds.items() if k in (Kind.LOGITS, Kind.UNCLEAR)]
    if classifiers:
        shape = list(outputs[classifiers[0]].shape)
        raise data_failure(
            "labels_mismatch",
            f"Labels of shape {list(labels.shape)} do not fit the scores {classifiers[0]!r}, {shape} per batch.",
            tensor=LABELS,
            remedy="Give one class number per sample.",
        )
    return None


def _by_references(kinds: Mapping[str, Kind], by_name: Mapping[str, Array], *, auto: bool) -> Decision | None:
    order = [Kind.LOGITS, Kind.UNCLEAR, *(k for k in Kind if k not in (Kind.LOGITS, Kind.UNCLEAR))]
    name = min(by_name, key=lambda n: order.index(kinds[n]), default=None)
    if name is None:
        return None
    kind = kinds[name]
    if kind is Kind.LOGITS or (kind is Kind.UNCLEAR and not auto):
        return Decision("top1", "references", name, f"the data has references for the scores {name!r}", auto)
    if not auto:
        return None
    chosen: Metric = "agreement" if kind is Kind.EXACT else "normalized_error"
    why = f"the data has references for {name!r}" + (f" ({_BOTH})" if kind is Kind.UNCLEAR else "")
    return Decision(chosen, "references", name, why, all_outputs=True)


def _by_agreement(kinds: Mapping[str, Kind], *, labels_unused: bool) -> Decision:
    for kind in (Kind.LOGITS, Kind.UNCLEAR, Kind.EMBEDDING, Kind.NUMBERS, Kind.EXACT):
        for name, found in kinds.items():
            if found is kind:
                why = "the labels fit no output" if labels_unused else "no labels or references"
                what = _BOTH if kind is Kind.UNCLEAR else str(kind)
                why += f": agreement with the original, each output by its kind ({name!r}: {what}); the worst decides"
                return Decision(METRICS_OF_KIND[kind][0], "agreement", name, why, all_outputs=True)
    raise StageFailure("no_outputs", "The model has no outputs that are tensors.")


def _mismatch(metric: str, why: str) -> StageFailure:
    return StageFailure(
        "metric_mismatch",
        f"The metric {metric!r} {why}.",
        FailureKind.REQUEST,
        remedy="Use the metric 'auto', or one that fits the model's outputs and the data.",
    )


def squeezed(labels: Array) -> Array:
    """[n, 1] → [n]."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


class TruthComparison:
    """Accumulates both engines against labels or references: per sample, how right each is.

    With labels, an output of integers is taken for the numbers of classes, one of floats for scores.
    """

    def __init__(self, decision: Decision) -> None:
        self._decision = decision
        self._columns: list[Array] = []

    def add(self, original: Array, engine: Array, truth: Array, first: int) -> None:
        if self._decision.basis == "labels":
            labels = squeezed(truth)
            if original.dtype.kind == "f":
                self._check_range(labels, original.shape[-1], first)
                original, engine = original.argmax(axis=-1), engine.argmax(axis=-1)
            counted = labels != IGNORED_LABEL
            pair = [_share((x.reshape(labels.shape) == labels) & counted, counted) for x in (original, engine)]
        elif self._decision.metric == "top1":
            wanted = truth.argmax(axis=-1)
            every = np.ones(wanted.shape, bool)
            pair = [_share(x.argmax(axis=-1) == wanted, every) for x in (original, engine)]
        elif self._decision.metric == "agreement":
            pair = [_share(x == truth, np.ones(truth.shape, bool)) for x in (original, engine)]
        else:
            t = per_row(truth.astype(np.float64), len(truth)).reshape(len(truth), -1)
            pair = [((x.astype(np.float64).reshape(len(truth), -1) - t) ** 2).sum(axis=1) for x in (original, engine)]
            pair.append((t**2).sum(axis=1))
        self._columns.append(np.stack(pair, axis=1))

    def result(self, seed: int) -> dict[str, Any]:
        """baseline_value, value, loss and interval (fractions), zero_one, samples."""
        columns = np.concatenate(self._columns)
        if self._decision.metric == "normalized_error":

            def errors(sums: Array, column: int) -> Array:
                return np.sqrt(sums[:, column] / np.maximum(sums[:, 2], 1e-300))

            loss = bootstrap_statistic(columns, lambda s: errors(s, 1) - errors(s, 0), False, seed)
            total = columns.sum(axis=0, keepdims=True)
            values = float(errors(total, 0)[0]), float(errors(total, 1)[0])
            zero_one = False
        else:
            values = float(columns[:, 0].mean()), float(columns[:, 1].mean())
            zero_one = bool(np.isin(columns, (0.0, 1.0)).all())
            loss = paired_loss(columns[:, 0] - columns[:, 1], zero_one=zero_one, seed=seed)
        return _figures(values[0], values[1], loss, zero_one, len(columns))

    def _check_range(self, labels: Array, classes: int, first: int) -> None:
        allowed = (labels >= 0) & (labels < classes)
        if labels.ndim > 1:
            allowed |= labels == IGNORED_LABEL
        if not allowed.all():
            row = int(np.argmin(allowed.reshape(len(labels), -1).all(axis=1)))
            raise data_failure(
                "labels_out_of_range",
                f"A label of sample {first + row} is {labels[row].ravel()[0]}; the classes are 0 to {classes - 1}.",
                tensor=LABELS,
                remedy="Number the classes as the model does, from 0.",
            )


def agreement_figures(output: OutputComparison, metrics: Sequence[Metric], seed: int) -> dict[str, Any]:
    """The loss of one output against the original's, with the `metric` of these that finds the largest."""
    found = [{**_one_agreement(output, metric, seed), "metric": metric} for metric in metrics]
    return max(found, key=lambda figures: float(figures["loss_percent"]))


def _one_agreement(output: OutputComparison, metric: Metric, seed: int) -> dict[str, Any]:
    if metric == "normalized_error":
        errors = output.column("squared_error")
        loss = paired_normalized_error(errors, output.column("squared_norm"), seed)
        loss = (loss[0], max(loss[1], 0.0), loss[2])
        return _figures(0.0, loss[0], loss, False, len(errors))
    column = output.column("cosine" if metric == "cosine" else "agreement")
    zero_one = metric != "cosine" and bool(np.isin(column, (0.0, 1.0)).all())
    loss = paired_loss(1 - column, zero_one=zero_one, seed=seed)
    loss = (loss[0], max(loss[1], 0.0), loss[2])
    return _figures(1.0, float(column.mean()), loss, zero_one, len(column))


def _figures(
    baseline: float, value: float, loss: tuple[float, float, float], zero_one: bool, samples: int
) -> dict[str, Any]:
    carried, why = carried_loss_percent(samples, zero_one=zero_one, upper_margin=loss[2] - loss[0])
    return {
        "baseline_value": rounded(baseline),
        "value": rounded(value),
        "loss_percent": _percent(loss[0]),
        "loss_ci": [_percent(loss[1]), _percent(loss[2])],
        "units": samples,
        "enough_samples_for": carried,
        "enough_samples_reason": why,
    }


def _percent(fraction: float) -> float:
    """At most a million: an error relative to an original of zeros has no bound."""
    return rounded(min(100 * fraction, 1e6))


def _share(hits: Array, counted: Array) -> Array:
    """The share of counted positions that hit, per sample; a sample without any counts as right."""
    hits, counted = hits.reshape(len(hits), -1), counted.reshape(len(counted), -1)
    total = counted.sum(axis=1)
    return np.where(total > 0, hits.sum(axis=1) / np.maximum(total, 1), 1.0)
