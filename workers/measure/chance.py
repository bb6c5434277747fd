"""Whether the original knows the labels at all: against what guessing with the same frequencies would be right in."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_DRAWS = 999
_SURE = 0.01  # of a permutation test: what guessing reaches so seldom is no guess
_MOST = 20_000  # answers that are drawn anew one by one
_NORMAL = 2.326  # standard deviations, for the same one-sided error
_FEW = 30  # answers, below which an approximation says nothing


def no_better_than_guessing(labels: Array, answers: Array, right: float, seed: int = 0) -> bool:
    """Whether `right` of the answers fit the labels no better than chance: a permutation test at 1 % (p = (b + 1) /
    (m + 1), Phipson and Smyth 2010). `labels`, `answers`: how often each class is one.

    False also where nobody could tell: few samples, or labels of one class only.
    """
    labels, answers = (np.asarray(x, np.int64) for x in (labels, answers))
    n = int(labels.sum())
    if n == 0 or answers.sum() != n or np.count_nonzero(labels) < 2:
        return False
    hits, spread = _guessing(labels.astype(float), answers.astype(float))
    if n > _MOST or np.count_nonzero(answers) < 2:
        return n >= _FEW and bool(right <= hits + _NORMAL * spread)
    rng = np.random.default_rng(seed)
    truth, said = (np.repeat(np.arange(len(x)), x) for x in (labels, answers))
    guessed = np.array([np.count_nonzero(rng.permutation(truth) == said) for _ in range(_DRAWS)])
    if _p(guessed, int(np.minimum(labels, answers).sum())) > _SURE:
        return False  # the best answers of these frequencies could not be told from guesses either
    return _p(guessed, right) > _SURE


def tags_are_guessed(labels: Array, answers: Array, right: Array, samples: int) -> bool:
    """Likewise where each of several tags is there or not: how often each is, is said to be, and rightly so. Of all of
    them together, as if they came and went together, which is the widest that guesses spread."""
    labels, answers = (np.stack([x, samples - x], axis=1).astype(float) for x in (labels, answers))
    hits, spreads = zip(*(_guessing(*pair) for pair in zip(labels, answers, strict=True)), strict=True)
    found = float((samples - labels[:, 0] - answers[:, 0] + 2 * right).sum())
    mixed = ((labels > 0).all(axis=1) & (answers > 0).all(axis=1)).any()
    return samples >= _FEW and bool(mixed) and found <= sum(hits) + _NORMAL * sum(spreads)


def expected_share(labels: Array, answers: Array) -> float:
    """What guessing with these frequencies is right in, 0…1."""
    n = max(float(labels.sum()), 1.0)
    return float((labels * answers).sum() / n**2)


def guess_warning(share: float, expected: float, answers: int) -> str:
    return (
        f"The original does not know these labels: it is right in {100 * share:.1f} % of {answers} answers, and "
        f"guessing with the same frequencies in {100 * expected:.1f} %. They may be shuffled, shifted, or of other "
        "samples: then no figure of accuracy here means anything."
    )


def _p(guessed: Array, right: float) -> float:
    return float((guessed >= right).sum() + 1) / (len(guessed) + 1)


def _guessing(labels: Array, answers: Array) -> tuple[float, float]:
    """Mean and standard deviation of the hits over all permutations (Hoeffding 1951)."""
    n = labels.sum()
    mean = (labels * answers).sum() / n
    squares = n * mean - (answers * labels**2).sum() / n - (labels * answers**2).sum() / n + mean**2
    return float(mean), float(np.sqrt(max(squares, 0.0) / max(n - 1, 1)))
