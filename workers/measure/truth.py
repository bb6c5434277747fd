"""Both engines against the truth: class labels here, numbers in `targets`. Per sample, how right each of the two is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np

from app.domain.failures import StageFailure, data_failure
from app.domain.spec import Metric
from workers.data import LABELS
from workers.measure.chance import expected_share, guess_warning, no_better_than_guessing
from workers.measure.losses import loss_figures, undefined
from workers.measure.stats import BlockSums, Level, bootstrap_statistic, paired_loss
from workers.measure.upper_bounds import unseen

Array = np.ndarray[Any, Any]

IGNORED_LABEL = -100  # the frameworks' custom for positions that do not count
IGNORED_BYTE = 255  # the same in label maps of bytes, which hold no −100
TOP = 5
_FEW = 30  # samples of several positions each, below which nobody can tell a guess from an answer
MAX_COUNTED_CLASSES = 10_000  # of a metric that is an average over classes
_GIVE_LABELS = "Give labels that count, or use the metric 'agreement'."


class Truth(ABC):
    """Accumulates both engines against the truth of one output. `offers`: the metrics that it can answer."""

    offers: tuple[Metric, ...] = ()

    @abstractmethod
    def add(self, original: Array, engine: Array, truth: Array, first: int) -> None:
        """One batch of equal lengths; `first` is the index of its first sample, for messages."""

    @abstractmethod
    def result(self, metric: Metric, level: Level) -> dict[str, Any]:
        """The figures of one of `offers`; raises `metric_undefined` (DATA) where these samples give it no value."""

    def notes(self) -> list[str]:
        """What makes the figures weaker than they look."""
        return []

    def warnings(self) -> list[str]:
        """What makes them worthless: labels that the original itself does not know."""
        return []


def squeezed(labels: Array) -> Array:
    """[n, 1] → [n], and label maps [n, 1, h, w] → [n, h, w]."""
    if labels.ndim in (2, 4, 5) and labels.shape[1] == 1:
        return labels[:, 0]
    return labels


def labels_mismatch(detail: str, remedy: str = "Give one class number per sample.") -> StageFailure:
    return data_failure("labels_mismatch", detail, tensor=LABELS, remedy=remedy)


class ClassTruth(Truth):
    """Against class numbers: one a sample, or one a position (a token, a pixel). Those that do not count (−100; 255 in
    label maps of bytes) are left out, and so are samples of which none counts.

    `axis`: where the scores of the classes stand in the output; None for an output that holds class numbers itself.
    top1, top5: the mean over samples of the share of right positions; loss 100·(original − engine).
    macro_f1, mean_iou: the mean over the classes that occur in the labels or in that engine's answers (so in
    scikit-learn and VOC); the bootstrap draws samples. One prediction changed in the rarest class is what the rule of
    three stands on where not one prediction differs.
    """

    def __init__(self, axis: int | None, original: Array, labels: Array) -> None:
        """From the first batch."""
        self._axis = axis
        self._classes = 0 if axis is None else original.shape[axis]
        self._maps = squeezed(labels).ndim >= 3
        self._hits: dict[Metric, list[Array]] = {"top1": []}
        if self._classes > TOP:
            self._hits["top5"] = []
        self._sums: BlockSums | None = BlockSums(5 * self._classes) if self._counts_classes() else None
        self._differ = self._dense = False
        self._counted = 0
        self._seen: set[int] = set()
        self._shifted = dict.fromkeys((1, -1), 0)  # the original's answers that miss the label by so much
        self.offers = tuple(self._hits) + (("macro_f1",) if self._sums else ())
        if self._sums and self._maps:
            self.offers += ("mean_iou",)

    def _counts_classes(self) -> bool:
        return self._axis is None or self._classes <= MAX_COUNTED_CLASSES

    def add(self, original: Array, engine: Array, truth: Array, first: int) -> None:
        labels = squeezed(truth)
        if self._axis is not None:
            original, engine = (np.moveaxis(x, self._axis, -1) for x in (original, engine))
            shape: tuple[int, ...] = original.shape[:-1]
        else:
            original, engine = (x.reshape(labels.shape) if x.size == labels.size else x for x in (original, engine))
            shape = original.shape
        if shape != labels.shape:
            raise labels_mismatch(
                f"From sample {first} on the labels are {list(labels.shape)} and the output's classes {list(shape)}."
            )
        n = len(labels)
        counted = self._positions_that_count(labels, first).reshape(n, -1)
        labels = np.where(counted, labels.reshape(n, -1), 0).astype(np.int64)
        judged = counted.any(axis=1)
        answers = []
        for x in (original, engine):
            flat = x.reshape(n, labels.shape[1], -1) if self._axis is not None else x.reshape(n, -1)
            answers.append(flat.argmax(axis=-1) if self._axis is not None else flat.astype(np.int64))
            if "top5" in self._hits:
                self._hits["top5"].append(_share((_rank(flat, labels) < TOP) & counted, counted)[judged])
        self._hits["top1"] += [_share((a == labels) & counted, counted)[judged] for a in answers]
        self._differ |= bool(((answers[0] != answers[1]) & counted).any())
        self._dense |= labels.shape[1] > 1
        self._counted += int(counted.sum())
        for shift in self._shifted:
            self._shifted[shift] += int(((answers[0] == labels + shift) & counted).sum())
        if len(self._seen) < 2:
            self._seen.update(int(v) for v in np.unique(labels[counted])[:2])
        self._count_classes(labels, answers, counted)

    def result(self, metric: Metric, level: Level) -> dict[str, Any]:
        if not self._counted:
            raise undefined(metric, "not one label counts", _GIVE_LABELS)
        if metric in self._hits:
            parts = self._hits[metric]
            return share_figures(np.stack([np.concatenate(parts[0::2]), np.concatenate(parts[1::2])], axis=1), level)
        assert self._sums is not None
        iou = metric == "mean_iou"
        counts, more = label_counts(self._sums), unseen(level.confidence)
        carried = rule_of_three(counts) if not self._differ and not self._dense else None
        floor = more / self._sums.samples if self._dense else rarest_class(counts, more)
        return macro_figures(self._sums, level, iou=iou, carried=carried, floor=floor)

    def notes(self) -> list[str]:
        if len(self._seen) == 1:
            return [f"All labels are class {next(iter(self._seen))}: the figures say nothing of the other classes."]
        return []

    def warnings(self) -> list[str]:
        if self._sums is None or not self._counted:
            return []
        labels, answers, right = self._sums.columns().sum(axis=0).reshape(5, -1)[:3]
        shares = np.concatenate(self._hits["top1"][0::2])
        if self._dense:  # positions of a sample are no evidence of their own
            expected = expected_share(labels, answers)
            margin = 2.326 * float(shares.std()) / math.sqrt(len(shares))
            guessed = len(shares) >= _FEW and bool(shares.mean() <= expected + margin)
        else:
            guessed = no_better_than_guessing(labels, answers, float(right.sum()))
        if not guessed:
            return []
        return [guess_warning(float(right.sum()) / self._counted, expected_share(labels, answers), self._counted)] + [
            f"With {'one more than' if shift > 0 else 'one less than'} each label the original would be right in "
            f"{100 * count / self._counted:.0f} %: number the classes as the model does."
            for shift, count in self._shifted.items()
            if count > max(2 * right.sum(), self._counted / 2)
        ]

    def _count_classes(self, labels: Array, answers: list[Array], counted: Array) -> None:
        if self._sums is None:
            return
        if self._axis is None:
            self._make_room(int(max(labels.max(initial=0), answers[0].max(initial=0))) + 1)
            if self._sums is None:
                return
        self._sums.add(class_counts(labels, answers, counted, self._classes))

    def _make_room(self, classes: int) -> None:
        """An output of class numbers does not say how many there are; what only the engine answers is none of them."""
        assert self._sums is not None
        if classes > MAX_COUNTED_CLASSES:
            self._sums = None
            self.offers = tuple(m for m in self.offers if m in self._hits)
        elif self._classes == 0:
            self._classes = max(classes, 2)
            self._sums = BlockSums(5 * self._classes)
        elif classes > self._classes:
            self._classes = classes
            self._sums.widen(5, classes)

    def _positions_that_count(self, labels: Array, first: int) -> Array:
        counted = np.asarray(labels != IGNORED_LABEL)
        if labels.dtype == np.uint8 and self._maps and self._classes <= IGNORED_BYTE:
            counted &= labels != IGNORED_BYTE
        allowed = ~counted | (labels >= 0)
        if self._axis is not None:
            allowed &= ~counted | (labels < self._classes)
        if not allowed.all():
            row = int(np.argmin(allowed.reshape(len(labels), -1).all(axis=1)))
            wrong = labels[row].ravel()[int(np.argmin(allowed[row].ravel()))]
            most = f"0 to {self._classes - 1}" if self._axis is not None else "numbers from 0"
            raise data_failure(
                "labels_out_of_range",
                f"A label of sample {first + row} is {wrong}; the classes are {most}.",
                tensor=LABELS,
                remedy="Number the classes as the model does, from 0; −100 marks positions that do not count.",
            )
        return counted


class ReferenceShare(Truth):
    """Against references of the output's own kind: top1 where they are scores of classes (the class of the largest),
    agreement where they are integers, booleans or strings (the share of equal elements)."""

    def __init__(self, metric: Metric) -> None:
        self.offers = (metric,)
        self._columns: list[Array] = []

    def add(self, original: Array, engine: Array, truth: Array, first: int) -> None:
        if truth.shape != original.shape:
            raise labels_mismatch(
                f"From sample {first} on the references are {list(truth.shape)} and the output {list(original.shape)}.",
                "Give references of the output's shape.",
            )
        if "top1" in self.offers:
            original, engine, truth = (x.argmax(axis=-1) for x in (original, engine, truth))
        every = np.ones(truth.shape, bool)
        self._columns.append(np.stack([_share(np.asarray(x == truth), every) for x in (original, engine)], axis=1))

    def result(self, metric: Metric, level: Level) -> dict[str, Any]:
        assert metric in self.offers
        return share_figures(np.concatenate(self._columns), level)


def share_figures(columns: Array, level: Level) -> dict[str, Any]:
    """`columns` [samples, 2]: how right the original and the engine are of each sample, 0…1."""
    zero_one = bool(np.isin(columns, (0.0, 1.0)).all())
    loss = paired_loss(columns[:, 0] - columns[:, 1], zero_one=zero_one, level=level)
    baseline, value = columns.mean(axis=0)
    return loss_figures(float(baseline), float(value), loss)


def class_counts(labels: Array, answers: list[Array], counted: Array, classes: int) -> Array:
    """[n, 5 · classes] from [n, positions]: per class, how often it is the label, the original's answer, the
    original's right answer, the engine's answer, the engine's right answer."""
    n = len(labels)
    row = np.broadcast_to(np.arange(n)[:, np.newaxis], labels.shape)

    def count(values: Array, which: Array) -> Array:
        valid = which & (values >= 0) & (values < classes)
        return np.bincount(row[valid] * classes + values[valid], minlength=n * classes).reshape(n, classes)

    parts = [count(labels, counted)]
    for answer in answers:
        parts += [count(answer, counted), count(answer, counted & (answer == labels))]
    return np.concatenate(parts, axis=1)


def macro_figures(
    sums: BlockSums, level: Level, *, iou: bool = False, carried: tuple[float, str] | None = None, floor: float
) -> dict[str, Any]:
    """The mean F1 (or intersection over union) over classes, of `class_counts`. `floor`: what errors that no sample
    showed may take of it, on top of what the bootstrap finds."""

    def mean(drawn: Array, engine: int) -> Array:
        c = drawn.reshape(len(drawn), 5, -1)
        label, answer, right = c[:, 0], c[:, 1 + 2 * engine], c[:, 2 + 2 * engine]
        below = label + answer - right if iou else label + answer
        score = (right if iou else 2 * right) / np.maximum(below, 1)
        return np.asarray(score.sum(axis=1) / np.maximum((below > 0).sum(axis=1), 1))

    columns = sums.columns()
    loss = bootstrap_statistic(columns, lambda s: mean(s, 0) - mean(s, 1), level, sums.samples)
    loss = replace(loss, upper=loss.upper + floor)
    if carried is not None:
        loss = replace(loss, low=min(loss.low, -carried[0] / 100), high=max(loss.high, carried[0] / 100))
    total = columns.sum(axis=0, keepdims=True)
    values = float(mean(total, 0)[0]), float(mean(total, 1)[0])
    return loss_figures(values[0], values[1], loss, carried=carried)


def label_counts(sums: BlockSums) -> Array:
    """How often each class is the label, of the sums of `class_counts`."""
    return np.asarray(sums.columns().sum(axis=0).reshape(5, -1)[0])


def rarest_class(label_counts: Array, changed: float) -> float:
    """What so many changed predictions may take of macro F1: each moves F1 of two classes by at most one in the count
    of the rarest class."""
    present = label_counts[label_counts > 0]
    return min(1.0, 2 * changed / (len(present) * float(present.min()))) if len(present) else 1.0


def every_class(label_counts: Array, changed: float) -> float:
    """Likewise, where each sample has an answer for every class, and all of them may be wrong."""
    present = label_counts[label_counts > 0]
    return float(np.minimum(1.0, 2 * changed / present).mean()) if len(present) else 1.0


def rule_of_three(label_counts: Array) -> tuple[float, str]:
    """What macro F1 may lose unseen where not one prediction differs: up to three may at 95 %."""
    present = label_counts[label_counts > 0]
    value = 100 * rarest_class(label_counts, 3.0)
    why = f"rule of three: up to three of {int(present.sum())} predictions may differ unseen, in a class of "
    return float(f"{value:.5g}"), why + f"{int(present.min())}"


def _rank(scores: Array, labels: Array) -> Array:
    """How many classes are before the label's [n, positions], by score, equal ones by their number."""
    own = np.take_along_axis(scores, labels[..., np.newaxis], axis=-1)
    before = np.arange(scores.shape[-1]) < labels[..., np.newaxis]
    return np.asarray(((scores > own) | ((scores == own) & before)).sum(axis=-1))


def _share(hits: Array, counted: Array) -> Array:
    """The share of counted positions that hit, per sample; a sample without any counts as right."""
    hits, counted = hits.reshape(len(hits), -1), counted.reshape(len(counted), -1)
    total = counted.sum(axis=1)
    return np.where(total > 0, hits.sum(axis=1) / np.maximum(total, 1), 1.0)
