"""How a metric's figures are written down: values, the loss in percent, its interval, and what the samples carry."""

from __future__ import annotations

from typing import Any

from app.domain.failures import StageFailure, data_failure
from workers.measure.stats import carried_loss_percent

_MOST_PERCENT = 1e6


def rounded(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def percent(fraction: float) -> float:
    """At most a million: an error relative to an original of zeros has no bound."""
    return rounded(max(min(100 * fraction, _MOST_PERCENT), -_MOST_PERCENT))


def loss_figures(
    baseline: float,
    value: float,
    loss: tuple[float, float, float],
    samples: int,
    *,
    zero_one: bool = False,
    carried: tuple[float, str] | None = None,
) -> dict[str, Any]:
    """`loss`: estimate, low and high as fractions. `carried`: the smallest loss in percent that can be told from none,
    and why, where the interval does not say it."""
    carries, why = carried or carried_loss_percent(samples, zero_one=zero_one, upper_margin=loss[2] - loss[0])
    return {
        "baseline_value": rounded(baseline),
        "value": rounded(value),
        "loss_percent": percent(loss[0]),
        "loss_ci": [percent(loss[1]), percent(loss[2])],
        "units": samples,
        "enough_samples_for": carries,
        "enough_samples_reason": why,
    }


def undefined(metric: str, why: str, remedy: str) -> StageFailure:
    """The metric has no value on these samples."""
    return data_failure("metric_undefined", f"The metric {metric!r} is undefined here: {why}.", remedy=remedy)
