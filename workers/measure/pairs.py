"""Whether an engine's embeddings stand to each other as the original's do: Spearman's rank correlation of the cosine
similarities of all pairs, and how often a sample's nearest neighbour is the same one.

At most 512 samples take part, evenly spread over all, and vectors of at most 4 MiB a side are kept: memory and time do
not grow with the data set.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from workers.measure.losses import loss_figures, undefined
from workers.measure.stats import Level, Loss, paired_loss
from workers.measure.upper_bounds import least_samples

Array = np.ndarray[Any, Any]

MOST = 512
LEAST = 3
_KEPT_BYTES = 4 << 20
_SAME = 1e-6  # similarities this close are a tie: equal samples are each other's neighbours
_DRAWS = 1000
_NONE = 1e-12  # a variance of ranks, which lie in 0…1
_NEEDS = f"Give at least {LEAST} distinct samples, or use the metric 'cosine'."


class PairComparison:
    """Collects the vectors of both engines. `total`: how many samples there will be, as far as is known."""

    def __init__(self, total: int | None = None) -> None:
        self._stride = max(1, -(-(total or 1) // MOST))
        self._seen = 0
        self._vectors: tuple[list[Array], list[Array]] = ([], [])
        self._width: int | None = None

    def add(self, original: Array, engine: Array) -> None:
        """Both [n, width] or [n, …, width]; the axes between (the tokens of a text) are averaged."""
        rows = np.arange(self._seen, self._seen + len(original))
        self._seen += len(original)
        if self._width is None:
            self._width = original.shape[-1]
        if original.shape[-1] != self._width:
            return
        room = min(MOST, max(LEAST, _KEPT_BYTES // (4 * self._width)))
        for row in np.flatnonzero(rows % self._stride == 0):
            if len(self._vectors[0]) >= room:
                return
            for kept, values in zip(self._vectors, (original, engine), strict=True):
                kept.append(values[row].reshape(-1, self._width).mean(axis=0, dtype=np.float64).astype(np.float32))

    def neighbours(self, level: Level) -> dict[str, Any]:
        """The share of samples whose nearest neighbour is the same; loss 100·(1 − share)."""
        a, b = self._similarities("neighbours")
        np.fill_diagonal(a, -np.inf)
        np.fill_diagonal(b, -np.inf)
        chosen = a[np.arange(len(a)), b.argmax(axis=1)]
        same = (chosen >= a.max(axis=1) - _SAME).astype(np.float64)
        loss = paired_loss(1 - same, zero_one=True, level=level, least=0.0).at_least(0.0)
        return loss_figures(1.0, float(same.mean()), loss)

    def spearman(self, level: Level) -> dict[str, Any]:
        """Spearman's ρ of the similarities of all pairs; loss 100·(1 − ρ). The bootstrap draws samples, with the ranks
        that the pairs have among all; a sample makes no pair with itself."""
        a, b = self._similarities("spearman")
        upper = np.triu_indices(len(a), 1)
        x, y = np.zeros_like(a), np.zeros_like(a)
        x[upper], y[upper] = _ranks(a[upper]), _ranks(b[upper])
        x, y = x + x.T, y + y.T
        if np.ptp(x[upper]) == 0:
            raise undefined("spearman", "all pairs of samples are equally similar", _NEEDS)
        n = len(a)
        counts = np.random.default_rng(level.seed).multinomial(n, np.full(n, 1 / n), size=_DRAWS).astype(np.float64)
        rho = float(_weighted_correlation(x, y, np.ones((1, n)))[0])
        drawn = 1 - _weighted_correlation(x, y, counts)
        ends = [max(float(q), 0.0) for q in np.quantile(drawn, (0.025, 0.975, level.confidence))]
        enough = n >= least_samples(level.confidence)
        method = "bootstrap" if enough else f"none: fewer than {least_samples(level.confidence)} samples"
        bound = max(ends[2], 1 - rho) if enough else math.inf
        return loss_figures(1.0, rho, Loss(1 - rho, min(ends[0], 1 - rho), max(ends[1], 1 - rho), bound, method, n))

    def _similarities(self, metric: str) -> tuple[Array, Array]:
        count = len(self._vectors[0])
        if count < LEAST:
            raise undefined(metric, f"pairs need at least {LEAST} samples, there are {count}", _NEEDS)
        pair = []
        for kept in self._vectors:
            v = np.stack(kept).astype(np.float64)
            norms = np.linalg.norm(v, axis=1, keepdims=True)
            v /= np.where(norms > 0, norms, 1)
            pair.append(np.round(v @ v.T, 9))  # the order of summing makes no difference of rank
        return pair[0], pair[1]


def _ranks(values: Array) -> Array:
    """Ranks from 0, ties in the middle, scaled to 0…1."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middle = ends - (counts + 1) / 2
    return np.asarray(middle[inverse.ravel()] / len(values))


def _weighted_correlation(x: Array, y: Array, counts: Array) -> Array:
    """Pearson's r of x and y [n, n] over all pairs i ≠ j with weights counts[d, i]·counts[d, j]: [d]. Where only y is
    constant it tells nothing of x: 0."""
    off = 1.0 - np.eye(len(x))

    def total(values: Array) -> Array:
        return np.asarray(((counts @ (values * off)) * counts).sum(axis=1))

    weight = np.maximum(total(np.ones_like(x)), 1e-300)
    mx, my = total(x) / weight, total(y) / weight
    cov = total(x * y) / weight - mx * my
    vx, vy = total(x * x) / weight - mx**2, total(y * y) / weight - my**2
    r = cov / np.sqrt(np.maximum(vx, _NONE) * np.maximum(vy, _NONE))
    return np.asarray(np.where(vx <= _NONE, 1.0, np.where(vy <= _NONE, 0.0, r))).clip(-1, 1)
