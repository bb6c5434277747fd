"""The statistics of the reports: percentiles with the samples that carry them, intervals by bootstrap, A/A.

All intervals are 95 % and deterministic for the same samples and seed. Times may be in any unit; only ratios and
quantiles are formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from workers.measure.upper_bounds import (
    at_most,
    bounded_mean,
    difference,
    least_samples,
    proportion,
    proportion_from_below,
    student,
    unseen,
)

Array = np.ndarray[Any, Any]

# How many samples a percentile needs: MLPerf LoadGen's early-stopping bound with one slow query, 99 % confidence.
REQUIRED_SAMPLES = {"p50": (0.50, 11), "p90": (0.90, 64), "p95": (0.95, 130), "p99": (0.99, 662), "p999": (0.999, 6636)}
P50_SAMPLES = REQUIRED_SAMPLES["p50"][1]
P99_SAMPLES = REQUIRED_SAMPLES["p99"][1]
P99_CONFIDENCE = 0.95
P99_BOUND_SAMPLES = 299  # ln 0.05 / ln 0.99: from so many on, the largest bounds the percentile
RESAMPLES = 4000
_BLOCK_CELLS = 1 << 21  # of the sums that are kept, and of the draws that are looked at together
_DRAWS = 2000
_STEP = 50  # draws at a time
_BLOCKS = 2048
_MANY_PAIRS = 30  # from which on an interval is no longer exact; the bound is


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    ratio: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"ratio": _rounded(self.ratio), "low": _rounded(self.low), "high": _rounded(self.high)}

    def widened(self, factor: float) -> Interval:
        """This estimate with an interval that is wider by this factor at either end."""
        return Interval(self.ratio, self.low / factor, self.high * factor)

    def hull(self, other: Interval) -> Interval:
        """This estimate with an interval that also covers the other's."""
        return Interval(self.ratio, min(self.low, other.low), max(self.high, other.high))


def percentiles(latencies: Array, unit: float = 1.0) -> tuple[dict[str, float | None], dict[str, str]]:
    """Nearest-rank percentiles of `latencies`, divided by `unit`, and why any of them is None.

    Keys: p50, p90, p95, p99, p999.
    """
    ordered = np.sort(np.asarray(latencies, dtype=np.float64))
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name, (level, needed) in REQUIRED_SAMPLES.items():
        if len(ordered) >= needed:
            rank = max(math.ceil(level * len(ordered) - 1e-9), 1)
            values[name] = float(ordered[rank - 1]) / unit
        else:
            values[name] = None
            reasons[name] = f"{len(ordered)} samples; {needed} are needed to carry this percentile"
    return values, reasons


def p99_bound(latencies: Array, unit: float = 1.0) -> float | None:
    """What the p99 of all calls exceeds in at most 5 % of such measurements: the smallest order statistic that bounds
    it, by the binomial distribution of how many calls lie below (the rule of MLPerf LoadGen's early stopping). None
    where not even the largest does (fewer than 299)."""
    rank = _bounding_rank(len(latencies))
    if rank is None:
        return None
    return float(np.partition(np.asarray(latencies, dtype=np.float64), rank - 1)[rank - 1]) / unit


@lru_cache(maxsize=1024)
def _bounding_rank(samples: int) -> int | None:
    """The smallest r for which fewer than r of the samples lie below the percentile, in 95 % of the cases."""
    level = REQUIRED_SAMPLES["p99"][0]
    if samples < P99_BOUND_SAMPLES:
        return None
    low, high = math.floor(level * samples), samples
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at_most(middle - 1, samples, level) >= P99_CONFIDENCE else (middle, high)
    return high


def settled(window_medians: Sequence[float], tolerance: float = 0.10) -> bool:
    """Whether an engine is warm: the last three windows agree within `tolerance` (largest to smallest), or none of
    them is faster by more than that than the best of at least three before. On a machine that is fast and slow in turns
    no three agree, however long one waits, and the engine is as warm as it will be all the same."""
    before, last = window_medians[:-3], window_medians[-3:]
    if len(last) < 3 or min(window_medians) <= 0:
        return False
    return max(last) <= (1 + tolerance) * min(last) or (len(before) >= 3 and min(before) <= (1 + tolerance) * min(last))


def ratio_of_medians(numerator: Sequence[Array], denominator: Sequence[Array], seed: int = 0) -> Interval:
    """How much larger the numerator's median is than the denominator's: the pseudo-median (Hodges–Lehmann) of the
    rounds' ratios, with an interval by bootstrap over rounds.

    The two sides hold one array of samples per round, in the same order: both sides of a round saw the same moment of
    the machine. A machine that is fast and slow in turns (another tenant on its cores) makes pooled samples bimodal,
    and their median jumps from one mode to the other; within a round, most of that cancels out.
    """
    pairs = zip(_paired(numerator, denominator), denominator, strict=True)
    logs = np.log([float(np.median(a)) / float(np.median(b)) for a, b in pairs])
    counts = _draws(len(logs), seed)
    estimate, resampled = _pseudo_medians(logs, np.ones((1, len(logs)))), _pseudo_medians(logs, counts)
    return _interval(float(np.exp(estimate[0])), np.exp(resampled), len(logs))


def ratio_of_means(numerator: Sequence[Array], denominator: Sequence[Array], seed: int = 0) -> Interval:
    """mean(numerator) / mean(denominator); rounds as in `ratio_of_medians`."""
    counts = _draws(len(_paired(numerator, denominator)), seed)

    def means(rounds: Sequence[Array]) -> Array:
        sums = np.array([float(np.sum(r)) for r in rounds])
        sizes = np.array([len(r) for r in rounds], dtype=np.float64)
        return np.asarray((counts @ sums) / (counts @ sizes))

    estimate = float(np.concatenate(numerator).mean() / np.concatenate(denominator).mean())
    return _interval(estimate, means(numerator) / means(denominator), len(numerator))


@dataclass(frozen=True)
class Level:
    """How sure an upper bound has to be (0.5…1, one-sided), and what resampling starts from. `repeats`: samples for
    each distinct one: one that stands in the data ten times is no tenfold evidence, and the margin is as much wider."""

    confidence: float = 0.95
    seed: int = 0
    repeats: float = 1.0


@dataclass(frozen=True)
class Loss:
    """As fractions: an estimate from `samples` with its 95 % interval, and the `upper` bound that the samples leave at
    the confidence asked for; infinite where they leave none. `counts`: of what is right or wrong, samples that got
    worse and better. `method`: of the bound."""

    estimate: float
    low: float
    high: float
    upper: float
    method: str
    samples: int
    counts: tuple[int, int] | None = None

    def at_least(self, low: float) -> Loss:
        return replace(self, low=max(self.low, low))

    def widened(self, repeats: float) -> Loss:
        return replace(self, upper=self.estimate + (self.upper - self.estimate) * repeats)


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of at least two values with its interval by Student's t. What is called `ratio` is the mean."""
    n = len(values)
    if n < 2:
        raise ValueError("an interval needs two values at least")
    mean, half = float(np.mean(values)), student(0.975, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def paired_loss(
    per_sample: Array, *, zero_one: bool, level: Level = Level(), least: float = -1.0, most: float = 1.0
) -> Loss:
    """Mean of a per-sample loss: the paired differences (original − engine), which lie in `least`…`most`.

    With `zero_one` (right or wrong) the bound is exact, and so is the interval where few differ: of a proportion where
    nothing can get better, else of the difference of two paired ones. The bound of other means holds for all
    distributions in that range; their interval is by bootstrap over samples.
    """
    values = np.asarray(per_sample, dtype=np.float64)
    n = len(values)
    if zero_one:
        worse, better = int((values > 0).sum()), int((values < 0).sum())
        both, exact = 0.975, "exact (Clopper–Pearson)"
        if least >= 0:
            low, high = proportion_from_below(worse, n, both), proportion(worse, n, both)
            upper = proportion(worse, n, level.confidence)
        else:
            low, high = _interval_of_pairs(worse, better, n)
            upper, exact = difference(worse, better, n, level.confidence), "exact (paired proportions, Berger–Boos)"
        return Loss((worse - better) / n, low, high, upper, exact, n, (worse, better))
    columns = np.stack([values, np.ones_like(values)], axis=1)
    loss = bootstrap_statistic(columns, lambda sums: sums[:, 0] / sums[:, 1], level)
    upper = bounded_mean(values, least, most, level.confidence, level.seed)
    return replace(loss, upper=max(upper, loss.estimate), method="betting (Waudby-Smith and Ramdas)")


def _interval_of_pairs(worse: int, better: int, samples: int) -> tuple[float, float]:
    """95 % of p(worse) − p(better): exact for few, of the normal distribution for many."""
    if worse + better < _MANY_PAIRS:
        return -difference(better, worse, samples, 0.975), difference(worse, better, samples, 0.975)
    estimate = (worse - better) / samples
    margin = 1.96 * math.sqrt((worse + better) / samples - estimate**2) / math.sqrt(samples)
    return max(estimate - margin, -1.0), min(estimate + margin, 1.0)


def paired_normalized_error(squared_error: Array, squared_norm: Array, level: Level = Level()) -> Loss:
    """‖a − b‖ / ‖a‖ over all samples, from each sample's ‖a − b‖² and ‖a‖²."""
    pair = np.stack([np.asarray(squared_error, np.float64), np.asarray(squared_norm, np.float64)], axis=1)
    return bootstrap_statistic(pair, lambda sums: np.sqrt(sums[:, 0] / np.maximum(sums[:, 1], 1e-300)), level)


def bootstrap_statistic(columns: Array, statistic: Any, level: Level, samples: int | None = None) -> Loss:
    """`statistic` ([draws, k] → [draws]) of the column sums of `columns` [samples, k]; `samples`: how many they are,
    where the columns are sums of several.

    Above 2,048 samples, blocks of neighbours are drawn instead of single samples: time and memory stay bounded. The
    bound has no range to stand on: it supposes that what was not seen is at most as bad as the worst of what was, and
    as rare as the samples leave room for (`unseen`), and is not given for so few that it would be a large part.
    """
    n = samples or len(columns)
    estimate = float(statistic(columns.sum(axis=0, keepdims=True))[0])
    if len(columns) > _BLOCKS:
        edges = np.linspace(0, len(columns), _BLOCKS + 1).astype(np.int64)[:-1]
        columns = np.add.reduceat(columns, edges, axis=0)
    size = len(columns)
    counts = _sample_counts(size, level.seed)
    step = max(1, min(_STEP, _BLOCK_CELLS // columns.shape[1]))
    drawn = np.concatenate(
        [statistic(counts[i : i + step].astype(np.float64) @ columns) for i in range(0, _DRAWS, step)]
    )
    low, high = np.quantile(drawn, _tails(size))
    upper, method = math.inf, f"none: fewer than {least_samples(level.confidence)} samples"
    if n >= least_samples(level.confidence):
        total, more = columns.sum(axis=0, keepdims=True), unseen(level.confidence)
        worst = max(float(statistic(total + more * columns[i : i + _STEP]).max()) for i in range(0, size, _STEP))
        upper = max(float(np.quantile(drawn, 1 - _tail(size, level.confidence))), estimate) + max(worst - estimate, 0.0)
        method = "bootstrap, and as many of the worst kind as may be unseen"
    return Loss(estimate, min(float(low), estimate), max(float(high), estimate), upper, method, n)


@lru_cache(maxsize=4)
def _sample_counts(size: int, seed: int) -> Array:
    """[2,000, size]: how often each of at most 2,048 blocks is drawn; the same for all metrics of the same samples."""
    rng = np.random.default_rng(seed)
    counts = np.empty((_DRAWS, size), np.uint8)  # one on average: none comes near 256
    for start in range(0, _DRAWS, _STEP):
        counts[start : start + _STEP] = rng.multinomial(size, np.full(size, 1 / size), size=_STEP)
    return counts


class BlockSums:
    """Sums of the samples' contributions [n, width], in blocks: what the bootstrap draws from where a statistic needs
    more than a few numbers of each sample (a count per class). Memory does not grow with the samples: there are at most
    512 blocks, fewer where rows are wide, and sample i goes into block i mod blocks. As long as there are not more
    samples than blocks, each sample has its own."""

    def __init__(self, width: int, most: int = 512) -> None:
        self.blocks = int(min(most, max(16, _BLOCK_CELLS // max(width, 1))))
        self.samples = 0
        self._sums = np.zeros((self.blocks, width))

    def add(self, rows: Array) -> None:
        np.add.at(self._sums, (self.samples + np.arange(len(rows))) % self.blocks, rows)
        self.samples += len(rows)

    def columns(self) -> Array:
        """[blocks in use, width]."""
        return self._sums[: min(self.samples, self.blocks)]

    def widen(self, groups: int, size: int) -> None:
        """From [blocks, groups × less] to [blocks, groups × size], with zeros behind each group."""
        old = self._sums.reshape(self.blocks, groups, -1)
        new = np.zeros((self.blocks, groups, size))
        new[:, :, : old.shape[2]] = old
        self._sums = new.reshape(self.blocks, -1)


def carried_loss_percent(samples: int, *, zero_one: bool, upper_margin: float) -> tuple[float, str]:
    """The smallest loss, in percent, that `samples` can tell from none, and why.

    Zero-one metrics: the rule of three. Others: how far the interval reaches above the estimate (`upper_margin`, a
    fraction); one sample carries nothing.
    """
    if zero_one:
        value = min(100.0, 300.0 / samples)
        return _rounded(value), f"rule of three: {samples} samples without one error leave up to 3/{samples} at 95 %"
    if samples < 2:
        return 100.0, "one sample has no spread to judge by"
    return _rounded(100 * upper_margin), f"the 95 % interval over {samples} samples reaches this far above the estimate"


def _paired(a: Sequence[Array], b: Sequence[Array]) -> Sequence[Array]:
    if len(a) != len(b) or len(a) < 2 or any(len(r) == 0 for r in (*a, *b)):
        raise ValueError("both sides need the same rounds, at least two, none empty")
    return a


def _draws(rounds: int, seed: int) -> Array:
    """[RESAMPLES, rounds]: how often each round is drawn."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.multinomial(rounds, np.full(rounds, 1 / rounds), size=RESAMPLES), dtype=np.float64)


def _pseudo_medians(values: Array, counts: Array) -> Array:
    """Of each draw (a row of `counts`: how often each value is in it): the median of the means of all its pairs, every
    value with itself included."""
    first, second = np.triu_indices(len(values))
    means = (values[first] + values[second]) / 2
    order = np.argsort(means, kind="stable")
    means, first, second = means[order], first[order], second[order]
    medians = []
    for chunk in np.array_split(counts, max(1, counts.shape[0] * len(means) // _BLOCK_CELLS)):
        weight = chunk[:, first] * chunk[:, second]
        same = first == second
        weight[:, same] = (weight[:, same] + chunk[:, first[same]]) / 2  # c·(c + 1) / 2 pairs of a value with itself
        reached = np.cumsum(weight, axis=1)
        half = reached[:, -1:] / 2
        lower = np.argmax(reached >= half - 1e-9, axis=1)
        upper = np.argmax(reached > half + 1e-9, axis=1)
        medians.append((means[lower] + means[upper]) / 2)
    return np.concatenate(medians)


def _tails(n: int) -> tuple[float, float]:
    """The quantiles of the bootstrap that make a 95 % interval with `n` blocks.

    A plain percentile interval is too narrow for few blocks; the expanded one takes the normal tail at
    sqrt(n/(n−1))·t (Hesterberg 2015, "What teachers should know about the bootstrap").
    """
    tail = _tail(n, 0.975)
    return tail, 1 - tail


def _tail(n: int, confidence: float) -> float:
    if n < 2:
        return 0.0
    return 0.5 * math.erfc(math.sqrt(n / (n - 1)) * student(confidence, n - 1) / math.sqrt(2))


def _interval(estimate: float, resampled: Array, blocks: int) -> Interval:
    low, high = np.quantile(resampled, _tails(blocks))
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate))


def _rounded(value: float) -> float:
    """Five significant digits: what a report shows, and equal on every run with the same samples."""
    return float(f"{value:.5g}")
