"""How a metric's figures are written down: values, the loss in percent, its interval, and what the samples carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from app.domain.failures import StageFailure, data_failure
from workers.measure.stats import Level, Loss, carried_loss_percent
from workers.measure.upper_bounds import difference, least_samples, proportion

_MOST_PERCENT = 1e6
_MOST_NEEDED = 10_000_000


def rounded(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def percent(fraction: float) -> float:
    """At most a million: an error relative to an original of zeros has no bound."""
    return rounded(max(min(100 * fraction, _MOST_PERCENT), -_MOST_PERCENT))


def loss_figures(
    baseline: float,
    value: float,
    loss: Loss,
    *,
    carried: tuple[float, str] | None = None,
) -> dict[str, Any]:
    """`carried`: the smallest loss in percent that can be told from none, and why, where the interval does not say it.
    The figures keep the loss itself under `losses`, for what all that decides of an output leaves open."""
    carries, why = carried or carried_loss_percent(
        loss.samples, zero_one=loss.counts is not None, upper_margin=loss.high - loss.estimate
    )
    return {
        "baseline_value": rounded(baseline),
        "value": rounded(value),
        "loss_percent": percent(loss.estimate),
        "loss_ci": [percent(loss.low), percent(loss.high)],
        "bound_percent": percent(loss.upper) if math.isfinite(loss.upper) else None,
        "bound_method": loss.method,
        "units": loss.samples,
        "enough_samples_for": carries,
        "enough_samples_reason": why,
        "losses": [loss],
    }


def worst_of(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures with the largest loss; that all of them keep a limit is shown where the bound of each does."""
    worst = max(found, key=lambda figures: float(figures["loss_percent"]))
    return {**worst, "losses": [loss for figures in found for loss in figures["losses"]]}


def bound_figures(losses: Sequence[Loss], level: Level, limit_percent: float | None) -> dict[str, Any]:
    """Of all losses together: `bound_percent` (what cannot be excluded at `confidence`; null where nothing can),
    `bound_method`, and `samples_needed` to show that they keep the limit (null where no number would)."""
    losses = [loss.widened(level.repeats) for loss in losses]
    widest = max(losses, key=lambda loss: loss.upper)
    needed: int | None = None
    if limit_percent is not None:
        each = [samples_needed(loss, limit_percent / 100, level.confidence) for loss in losses]
        needed = None if None in each else max(n for n in each if n is not None)
    return {
        "bound_percent": percent(widest.upper) if math.isfinite(widest.upper) else None,
        "bound_method": widest.method,
        "confidence": level.confidence,
        "samples_needed": needed,
    }


def samples_needed(loss: Loss, limit: float, confidence: float) -> int | None:
    """How many samples would show that the loss lies within `limit` (a fraction), if it goes on as it is; None where no
    number would. Exact where the loss is counted; else by how a margin shrinks with the samples."""
    if loss.upper <= limit:
        return loss.samples
    if loss.estimate >= limit:
        return None
    if loss.counts is not None:
        return _counted(loss, limit, confidence)
    least = least_samples(confidence)
    if not math.isfinite(loss.upper):
        return least
    over = (loss.upper - loss.estimate) / (limit - loss.estimate)
    return max(math.ceil(loss.samples * over**2), least)


def _counted(loss: Loss, limit: float, confidence: float) -> int | None:
    assert loss.counts is not None
    rates = [count / loss.samples for count in loss.counts]
    one_sided = "Clopper" in loss.method

    def enough(samples: int) -> bool:
        worse, better = math.ceil(rates[0] * samples), math.floor(rates[1] * samples)
        if one_sided:
            return proportion(worse, samples, confidence) <= limit
        return difference(worse, better, samples, confidence) <= limit

    few, many = loss.samples, 2 * loss.samples
    while not enough(many):
        few, many = many, 2 * many
        if many > _MOST_NEEDED:
            return None
    while many - few > max(1, few // 32):
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def undefined(metric: str, why: str, remedy: str) -> StageFailure:
    """The metric has no value on these samples."""
    return data_failure("metric_undefined", f"The metric {metric!r} is undefined here: {why}.", remedy=remedy)
