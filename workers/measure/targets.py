"""Both engines against targets of the output's own shape: numbers (MAE, RMSE, R², normalized error), or only zeros and
ones (macro F1 of a binary or multi-label classifier)."""

from __future__ import annotations

from typing import Any

import numpy as np

from app.domain.spec import Metric
from workers.measure.chance import expected_share, guess_warning, no_better_than_guessing, tags_are_guessed
from workers.measure.losses import loss_figures, undefined
from workers.measure.stats import BlockSums, Level, bootstrap_statistic
from workers.measure.truth import (
    MAX_COUNTED_CLASSES,
    Truth,
    class_counts,
    every_class,
    label_counts,
    labels_mismatch,
    macro_figures,
    rarest_class,
)
from workers.measure.upper_bounds import unseen

Array = np.ndarray[Any, Any]

MAX_TARGETS = 1 << 18  # numbers in a sample whose means R² keeps
_NO_ERROR = 1e-3  # of the targets' spread: below it, a relative increase of the error says nothing
_TINY = 1e-200
_LEAST_SHARE = 1e-6  # of the whole: what a draw of few samples may at least divide by
_ABS_O, _ABS_E, _SQ_O, _SQ_E, _SQ_T, _SHIFTED, _COUNT, _SAMPLES = range(8)


class TargetTruth(Truth):
    """mae, rmse: loss = the engine's error over the original's, minus one; where the original has next to no error
    (below 0.1 % of the targets' standard deviation), the difference over that deviation instead.
    r2: 1 − Σ(y − t)² / Σ(t − mean)², the mean of each number over the samples; loss 100·(original − engine).
    normalized_error: ‖y − t‖ / ‖t‖; loss 100·(engine − original).
    macro_f1, as long as all targets are 0 or 1: an answer is positive above 0.5 where all of the original's lie in 0…1
    (probabilities), else above 0 (logits). One number a sample makes two classes, several are one class each.

    The sums are kept in blocks of samples (see BlockSums).
    """

    def __init__(self, targets: Array) -> None:
        """From the first batch."""
        width = int(targets[0].size)
        self._width = width if width <= MAX_TARGETS else 0
        self._sums = BlockSums(_SAMPLES + 1 + self._width, most=2048 if width == 1 else 512)
        self._shift = targets[0].astype(np.float64).ravel()
        classes = 2 if width == 1 else width
        self._answers: list[BlockSums] | None = None
        if 0 < classes <= MAX_COUNTED_CLASSES:
            self._answers = [BlockSums(5 * classes) for _ in ("logits", "probabilities")]
        self._low = self._high = self._least = 0.0
        self._values: set[float] = set()
        self.offers: tuple[Metric, ...] = ("mae", "rmse", "normalized_error") + (("r2",) if self._width else ())

    @property
    def binary(self) -> bool:
        """Whether the targets are the two classes of each number, as far as seen."""
        return self._answers is not None and self._values <= {0.0, 1.0}

    def add(self, original: Array, engine: Array, truth: Array, first: int) -> None:
        n = len(truth)
        if original.size != truth.size or len(original) != n:
            raise labels_mismatch(
                f"From sample {first} on the targets are {list(truth.shape)} and the output {list(original.shape)}.",
                "Give targets of the output's shape.",
            )
        t, a, b = (x.reshape(n, -1).astype(np.float64) for x in (truth, original, engine))
        finite = np.isfinite(a)  # where the original says nothing, neither is wrong
        a, b = np.where(finite, a, t), np.where(finite, b, t)
        if self._width and t.shape[1] != self._width:  # another shape from here on: no means to keep
            self._width, self.offers = 0, ("mae", "rmse", "normalized_error")
        rows = np.zeros((n, self._sums.columns().shape[1]))
        for column, x in ((_ABS_O, a), (_ABS_E, b)):
            rows[:, column] = np.abs(x - t).sum(axis=1)
            rows[:, column + 2] = ((x - t) ** 2).sum(axis=1)
        rows[:, _SQ_T] = (t**2).sum(axis=1)
        rows[:, _COUNT] = t.shape[1]
        rows[:, _SAMPLES] = 1
        if self._width:
            shifted = t - self._shift  # large offsets would cancel away the spread
            rows[:, _SHIFTED] = (shifted**2).sum(axis=1)
            rows[:, _SAMPLES + 1 :] = shifted
        self._sums.add(rows)
        self._low, self._high = min(self._low, float(a.min(initial=0))), max(self._high, float(a.max(initial=0)))
        self._add_classes(t, a, b)

    def _add_classes(self, t: Array, a: Array, b: Array) -> None:
        if len(self._values) < 3:
            self._values.update(float(v) for v in np.unique(t)[:3])
        if self._answers is None or not self._values <= {0.0, 1.0} or (self._width == 0 and t.shape[1] > 1):
            self._answers = None
            return
        labels = t.astype(np.int64)
        for sums, threshold in zip(self._answers, (0.0, 0.5), strict=True):
            answers = [(x > threshold).astype(np.int64) for x in (a, b)]
            if t.shape[1] == 1:
                sums.add(class_counts(labels, answers, np.ones(labels.shape, bool), 2))
            else:
                parts = [labels]
                for answer in answers:
                    parts += [answer, answer * labels]
                sums.add(np.concatenate(parts, axis=1))

    def result(self, metric: Metric, level: Level) -> dict[str, Any]:
        if metric == "macro_f1":
            if not self.binary or self._answers is None:
                raise undefined(metric, "the labels are not zeros and ones", "Use the metric 'r2', 'rmse' or 'mae'.")
            sums = self._answers[int(self._low >= 0 and self._high <= 1)]
            changed = every_class if self._width != 1 else rarest_class
            return macro_figures(sums, level, floor=changed(label_counts(sums), unseen(level.confidence)))
        columns = self._sums.columns()
        total = columns.sum(axis=0, keepdims=True)
        estimates = {"mae": self._mae, "rmse": self._rmse, "r2": self._r2, "normalized_error": self._normalized}
        estimate = estimates[metric]
        if metric == "r2" and not self._spread_squares(total)[0] > 0:
            remedy = "Give samples whose targets differ, or use the metric 'rmse' or 'mae'."
            raise undefined("r2", "the targets do not differ", remedy)
        self._least = float(self._spread_squares(total)[0]) * _LEAST_SHARE
        baseline, value = float(estimate(total, 0)[0]), float(estimate(total, 1)[0])
        sign = -1.0 if metric == "r2" else 1.0
        scale = None
        if metric in ("mae", "rmse"):
            spread = self._spread(total)
            scale = spread if baseline <= _NO_ERROR * spread else None
            if baseline == 0 and not spread:
                scale = 1.0

        def loss_of(drawn: Array) -> Array:
            o, e = estimate(drawn, 0), estimate(drawn, 1)
            if metric in ("mae", "rmse"):
                return np.asarray((e - o) / (np.maximum(o, baseline * _NO_ERROR) if scale is None else scale))
            return np.asarray(sign * (e - o))

        return loss_figures(baseline, value, bootstrap_statistic(columns, loss_of, level, self._sums.samples))

    def notes(self) -> list[str]:
        if len(self._values) == 1 and self._sums.samples > 1:
            return [f"All targets are {next(iter(self._values)):g}: R² and F1 say nothing of other targets."]
        return []

    def warnings(self) -> list[str]:
        if not self.binary or self._answers is None:
            return []
        sums = self._answers[int(self._low >= 0 and self._high <= 1)]
        labels, answers, right = sums.columns().sum(axis=0).reshape(5, -1)[:3]
        if self._width != 1:
            if not tags_are_guessed(labels, answers, right, sums.samples):
                return []
            said = float(answers.sum())
            expected = float((labels * answers).sum()) / max(said * sums.samples, 1.0)
            return [guess_warning(float(right.sum()) / max(said, 1.0), expected, int(said))]
        hit = float(right.sum())
        if not no_better_than_guessing(labels, answers, hit):
            return []
        return [guess_warning(hit / max(sums.samples, 1), expected_share(labels, answers), sums.samples)]

    @staticmethod
    def _mae(s: Array, engine: int) -> Array:
        return np.asarray(s[:, _ABS_O + engine] / np.maximum(s[:, _COUNT], 1))

    @staticmethod
    def _rmse(s: Array, engine: int) -> Array:
        return np.asarray(np.sqrt(s[:, _SQ_O + engine] / np.maximum(s[:, _COUNT], 1)))

    @staticmethod
    def _normalized(s: Array, engine: int) -> Array:
        return np.asarray(np.sqrt(s[:, _SQ_O + engine] / np.maximum(s[:, _SQ_T], _TINY)))

    def _r2(self, s: Array, engine: int) -> Array:
        return np.asarray(1 - s[:, _SQ_O + engine] / np.maximum(self._spread_squares(s), self._least))

    def _spread_squares(self, s: Array) -> Array:
        """Σ(t − mean)², with the mean of each number over the samples drawn."""
        means = (s[:, _SAMPLES + 1 :] ** 2).sum(axis=1) / np.maximum(s[:, _SAMPLES], 1)
        squares = s[:, _SHIFTED] - means
        return np.asarray(np.where(squares > 1e-12 * s[:, _SHIFTED], squares, 0.0))

    def _spread(self, total: Array) -> float:
        """The targets' standard deviation; their root mean square where their shape changes."""
        squares = self._spread_squares(total)[0] if self._width else total[0, _SQ_T]
        return float(np.sqrt(squares / max(total[0, _COUNT], 1)))
