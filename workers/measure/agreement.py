"""How well an output of the engine agrees with the original's, by one metric: value, loss in percent, interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from app.domain.spec import Metric
from workers.measure.accuracy import Kind, OutputComparison
from workers.measure.losses import loss_figures, undefined, worst_of
from workers.measure.stats import Level, bootstrap_statistic, paired_loss, paired_normalized_error

Array = np.ndarray[Any, Any]

DECIDES: dict[Kind, tuple[Metric, ...]] = {  # of several, the worst counts
    Kind.LOGITS: ("agreement",),
    Kind.UNCLEAR: ("agreement", "normalized_error"),
    Kind.EMBEDDING: ("cosine",),
    Kind.NUMBERS: ("normalized_error",),
    Kind.EXACT: ("agreement",),
}
TELLS: dict[Kind, tuple[Metric, ...]] = {  # all that fit: reported beside the one that decides
    Kind.LOGITS: ("agreement", "kl"),
    Kind.UNCLEAR: ("agreement", "kl", "normalized_error", "psnr"),
    Kind.EMBEDDING: ("cosine", "spearman", "neighbours"),
    Kind.NUMBERS: ("normalized_error", "psnr"),
    Kind.EXACT: ("agreement",),
}
_EQUAL_DB = 200.0  # of a PSNR that has no bound


def worst_figures(output: OutputComparison, metrics: Sequence[Metric], level: Level) -> dict[str, Any]:
    """The figures of the `metric` of these that finds the largest loss."""
    found = [{**agreement_figures(output, metric, level), "metric": metric} for metric in metrics]
    return worst_of(found)


def agreement_figures(output: OutputComparison, metric: Metric, level: Level) -> dict[str, Any]:
    """Raises `metric_undefined` (DATA) where these samples give the metric no value.

    agreement, cosine: the mean; loss 100·(1 − mean). kl: the mean of KL(original ‖ engine) in nats; loss
    100·(1 − e^−KL), since e^−KL is the (geometric mean) share of the probability that the engine still gives to what
    the original says: 0 for equal, below 100 however far, and 100·KL where small. normalized_error: ‖a − b‖ / ‖a‖.
    psnr: 20·log10(range / RMS error) in dB over the original's range; loss 100·(RMS error / range): 40 dB are 1 %.
    """
    if metric in ("spearman", "neighbours"):
        if output.pairs is None:
            raise undefined(metric, "the output holds no vectors", "Use the metric 'auto'.")
        return output.pairs.spearman(level) if metric == "spearman" else output.pairs.neighbours(level)
    if metric == "normalized_error":
        errors = output.column("squared_error")
        loss = paired_normalized_error(errors, output.column("squared_norm"), level).at_least(0.0)
        return loss_figures(0.0, loss.estimate, loss)
    if metric == "psnr":
        return _psnr(output, level)
    if metric == "kl":
        column = output.column("kl")
        pair = np.stack([column, np.ones_like(column)], axis=1)
        loss = bootstrap_statistic(pair, lambda s: -np.expm1(-s[:, 0] / s[:, 1]), level).at_least(0.0)
        return loss_figures(0.0, float(column.mean()), loss)
    column = output.column("cosine" if metric == "cosine" else "agreement")
    zero_one = metric != "cosine" and bool(np.isin(column, (0.0, 1.0)).all())
    most = 2.0 if metric == "cosine" else 1.0
    loss = paired_loss(1 - column, zero_one=zero_one, level=level, least=0.0, most=most).at_least(0.0)
    return loss_figures(1.0, float(column.mean()), loss)


def _psnr(output: OutputComparison, level: Level) -> dict[str, Any]:
    span = output.highest - output.lowest
    if not span > 0:
        raise undefined("psnr", "the original's output is the same everywhere", "Use the metric 'normalized_error'.")
    pair = np.stack([output.column("squared_error"), output.column("numbers")], axis=1)
    loss = bootstrap_statistic(pair, lambda s: np.sqrt(s[:, 0] / np.maximum(s[:, 1], 1)) / span, level)
    decibels = min(-20 * float(np.log10(loss.estimate)), _EQUAL_DB) if loss.estimate > 0 else _EQUAL_DB
    return loss_figures(_EQUAL_DB, decibels, loss.at_least(0.0))
