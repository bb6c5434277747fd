"""Upper bounds of a loss at a confidence, one-sided: the loss that the samples do not exclude.

Exact for what is right or wrong, and for means of bounded losses; both hold for any number of samples. Nothing here is
random but the order in which a bounded mean is gone through, which is seeded.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SHARE_UNSEEN = 0.05  # of all inputs, at most, that may be unlike any sample where an unbounded loss is bounded
_NUISANCE = 0.05  # of the error that the share of differing pairs may take (Berger and Boos)
_DISCORDANT = 8  # shares of differing pairs that are looked at
_MOST_CELLS = 1 << 18
_MANY = 30  # differing pairs, from which on the bound lies below that of both proportions apart
_SPREAD = 6.5  # standard deviations: the mass beyond is below 1e-9
_BET = 0.9  # of the largest bet that cannot ruin
_STEPS = 48  # of a bisection
_GRID = 16  # values between which one that sums tails begins
_COARSE = 9  # and its steps, on the safe side


def unseen(confidence: float) -> float:
    """−ln(1 − confidence): so many of n samples may be of a kind that none of them showed; 3.0 at 95 % is the rule of
    three (Hanley and Lippman-Hand 1983)."""
    return -math.log1p(-confidence)


def least_samples(confidence: float) -> int:
    """Below which no bound is claimed of a loss that has none by itself: more than a twentieth of all inputs may be
    unlike every sample."""
    return math.ceil(unseen(confidence) / SHARE_UNSEEN)


@lru_cache(maxsize=4096)
def proportion(count: int, samples: int, confidence: float) -> float:
    """Clopper and Pearson 1934: the largest p for which `count` or fewer of `samples` are not too few."""
    if count >= samples:
        return 1.0
    if count == 0:
        return -math.expm1(math.log1p(-confidence) / samples)
    low, high = count / samples, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if at_most(count, samples, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def proportion_from_below(count: int, samples: int, confidence: float) -> float:
    """Likewise, the smallest p for which `count` or more are not too many."""
    return 1.0 - proportion(samples - count, samples, confidence)


@lru_cache(maxsize=4096)
def difference(losses: int, gains: int, samples: int, confidence: float) -> float:
    """Of p(loss) − p(gain), from `samples` pairs of which so many got worse and so many better.

    The exact unconditional test of two paired proportions: pairs (losses, gains) are ordered by the score statistic
    (Tango 1998, with the share of differing pairs as observed), and its tail is summed over the trinomial distribution.
    The share of pairs that differ is a nuisance: the largest tail counts over its interval, which takes a twentieth of
    the error (Berger and Boos 1994). Where there are too many to sum over: both proportions' own bounds, at half of the
    error each.
    """
    differing = losses + gains
    if gains == 0 and losses == 0:
        return proportion(0, samples, confidence)  # gains can only lower it
    error = 1 - confidence
    aside = 1 - _NUISANCE * error / 2
    most, least = proportion(differing, samples, aside), proportion_from_below(differing, samples, aside)
    half = 1 - error / 2
    apart = proportion(losses, samples, half) - proportion_from_below(gains, samples, half)
    lowest, highest = (losses - gains) / samples, apart if differing > _MANY else max(apart, most)
    losing = _window(samples, (least + lowest) / 2, (most + highest) / 2)
    gaining = _window(samples, (least - highest) / 2, (most - lowest) / 2)
    if len(losing) * len(gaining) > _MOST_CELLS:
        return apart
    pairs = _Pairs(samples, losing, gaining)
    allowed = error * (1 - _NUISANCE)

    def too_large(value: float) -> bool:
        return _largest_tail(pairs, losses, gains, value, least, most) <= allowed

    # The tail does not fall everywhere: the last value that it holds counts.
    steps = np.linspace(lowest, highest, _GRID)
    last = next((i for i in range(_GRID - 2, 0, -1) if not too_large(float(steps[i]))), 0)
    low, high = float(steps[last]), float(steps[last + 1])
    for _ in range(_COARSE):
        middle = (low + high) / 2
        low, high = (low, middle) if too_large(middle) else (middle, high)
    return high


def _window(samples: int, low: float, high: float) -> Array:
    """The counts that such shares make, but for a mass below 1e-9."""
    low, high = samples * min(max(low, 0.0), 1.0), samples * min(max(high, 0.0), 1.0)
    first, last = low - _SPREAD * math.sqrt(low) - 12, high + _SPREAD * math.sqrt(high) + 12
    return np.arange(max(int(first), 0), min(int(last), samples) + 1)


class _Pairs:
    """All pairs of these counts that got worse and better, and the trinomial coefficients of them."""

    def __init__(self, samples: int, losing: Array, gaining: Array) -> None:
        self.samples = samples
        self.losses, self.gains = (x.ravel() for x in np.meshgrid(losing, gaining, indexing="ij"))
        self.differing = self.losses + self.gains
        most = max(losing[-1], gaining[-1])
        factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])
        with np.errstate(divide="ignore"):  # more that differ than there are: −∞ from there on
            falling = np.concatenate([[0.0], np.cumsum(np.log(np.maximum(samples - np.arange(2 * most), 0)))])
        self.coefficients = falling[self.differing] - factorials[self.losses] - factorials[self.gains]

    def score(self, difference: float) -> Array:
        """How far each pair lies below this difference, in standard deviations."""
        return np.asarray(_score(self.losses, self.gains, self.samples, difference))

    def probability(self, cells: Array, difference: float, differing: float) -> float:
        """Of these pairs together, where p(loss) − p(gain) is `difference` and their sum `differing`."""
        losing, gaining = (differing + difference) / 2, (differing - difference) / 2
        logs = [math.log(max(p, 1e-300)) for p in (losing, gaining, 1 - differing)]
        losses, gains, same = self.losses[cells], self.gains[cells], self.samples - self.differing[cells]
        return float(np.exp(self.coefficients[cells] + losses * logs[0] + gains * logs[1] + same * logs[2]).sum())


def _score(losses: Any, gains: Any, samples: int, difference: float) -> Any:
    spread = np.maximum(losses + gains, samples * abs(difference)) - samples * difference**2
    return (losses - gains - samples * difference) / np.sqrt(np.maximum(spread, 1e-12))


def _largest_tail(pairs: _Pairs, losses: int, gains: int, difference: float, least: float, most: float) -> float:
    """The probability of what lies as far below `difference` as what was seen, at the worst share of what differs."""
    seen = _score(losses, gains, pairs.samples, difference)
    tail = np.flatnonzero(pairs.score(difference) <= seen + 1e-9)
    low, high = (min(max(share, abs(difference)), 1.0) for share in (least, most))
    largest = 0.0
    for count in (_DISCORDANT, 4):  # once more around the worst
        shares = np.linspace(low, high, count)
        tails = [pairs.probability(tail, difference, float(share)) for share in shares]
        worst = int(np.argmax(tails))
        largest = max(largest, tails[worst])
        low, high = float(shares[max(worst - 1, 0)]), float(shares[min(worst + 1, count - 1)])
    return largest


def bounded_mean(values: Array, low: float, high: float, confidence: float, seed: int = 0) -> float:
    """Of the mean of values in low…high, whatever their distribution: by betting against it (Waudby-Smith and Ramdas
    2024, "Estimating means of bounded random variables by betting", with their predictable plug-in bets)."""
    y = (high - np.asarray(values, np.float64)) / (high - low)  # a lower bound of the mean of what is right
    y = np.clip(y, 0, 1)[np.random.default_rng(seed).permutation(len(y))]
    n, count = len(y), np.arange(1, len(y) + 1)
    means = (0.5 + np.cumsum(y)) / (count + 1)
    variances = (0.25 + np.cumsum((y - means) ** 2)) / (count + 1)
    bets = np.sqrt(2 * unseen(confidence) / (n * np.concatenate([[0.25], variances[:-1]])))
    least, most = 0.0, float(y.mean())
    for _ in range(_STEPS):
        mean = (least + most) / 2
        wealth = np.cumsum(np.log1p(np.minimum(bets, _BET / max(mean, 1e-12)) * (y - mean)))
        if wealth.max() >= unseen(confidence):
            least = mean
        else:
            most = mean
    return high - least * (high - low)


def at_most(count: int, samples: int, p: float) -> float:
    """The probability of `count` or fewer of `samples`, each with probability p."""
    if count >= samples:
        return 1.0
    return 0.0 if count < 0 else incomplete_beta(samples - count, count + 1, 1 - p)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22, Lentz)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(a, b, x) / a
    return 1 - front * _fraction(b, a, 1 - x) / b


def _fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 20_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _not_zero(1 + numerator * d)
            c = _not_zero(1 + numerator / max(c, tiny, key=abs))
            value *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return value


def _not_zero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300


@lru_cache(maxsize=256)
def student(confidence: float, freedom: int) -> float:
    """The quantile of Student's t, for a confidence above one half."""
    low, high = 0.0, 1e4
    for _ in range(80):
        t = (low + high) / 2
        beyond = incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2
        low, high = (t, high) if beyond > 1 - confidence else (low, t)
    return high
