"""What a training is told, and how far it came."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from app.domain.failures import StageFailure
from app.domain.spec import Metric

MOST_EVALUATIONS = 20  # of a whole training


@dataclass(frozen=True)
class Terms:
    """`epochs` over the data, at most; `batch`: samples of a step; `metric`: what the job judges by."""

    epochs: int
    learning_rate: float
    seed: int
    batch: int
    metric: Metric


@dataclass
class Progress:
    """What a training goes on from, beside the tensors. `steps`: there will be, 0 before that is known; `seconds`: that
    it took so far. `threads`: that torch computes with. `before`: {loss, agreement} before anything was changed;
    `equalized`: channels. `curve`: [{step, seconds, learning_rate, train_loss, loss, agreement}] of the held-out
    samples; `best`: the step of the best weights. `cut`: whether time made the steps fewer. `ended`: why it is over."""

    steps: int = 0
    step: int = 0
    epoch: int = 0
    in_epoch: int = 0
    seconds: float = 0.0
    worse: int = 0
    rate: float = 1.0
    backed_off: int = 0
    stuck: int = 0
    best: int = 0
    evaluations: int = MOST_EVALUATIONS
    threads: int = 1
    equalized: int = 0
    before: dict[str, float] = field(default_factory=dict)
    cut: bool = False
    ended: str | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)


def short(value: float) -> float:
    return float(f"{value:.6g}")


def too_short(seconds: float, each: float, wanted: int, evaluating: float) -> StageFailure:
    whole = each * wanted + evaluating
    return StageFailure(
        "training_budget_too_short",
        f"Training was not begun: {wanted} steps take about {whole:.0f} s here, and there are {max(seconds, 0):.0f} s.",
        remedy="Give a larger budget_seconds or quantization.training.max_seconds, fewer epochs, or fewer samples.",
        cacheable=False,
    )
