"""The decisions of the search, over short measurements. Pure: figures in, who goes on and why the others do not out.

Successive halving (Jamieson & Talwalkar 2016) with intervals instead of a fixed fraction: who can still win goes on, at
most so many. What a short timing drops is told from noise by its interval, so that a winner is seldom lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.domain.spec import OptimizationSpec
from workers.search.limits import MOST_FINALISTS, SLOWER
from workers.search.objective import TIE, primary_batch, ratio_of


@dataclass(frozen=True)
class Speed:
    """A gain over the baseline with its 95 % interval, at the batch size that the objective is judged at."""

    ratio: float
    low: float
    high: float

    def scaled(self, factor: float) -> Speed:
        return Speed(factor * self.ratio, factor * self.low, factor * self.high)


def speed_of(spec: OptimizationSpec, figures: Mapping[str, Any] | None) -> Speed | None:
    """From one engine's figures of a benchmark; None where it failed or was not measured there."""
    if not figures or "failed" in figures or not figures.get("batches"):
        return None
    batch = primary_batch(spec, [*figures["batches"]])
    ratio = ratio_of(spec, figures["batches"][batch])
    return None if ratio is None else Speed(float(ratio["ratio"]), float(ratio["low"]), float(ratio["high"]))


def slower_elsewhere(spec: OptimizationSpec, figures: Mapping[str, Any], gain: float = 1.0) -> str | None:
    """A batch size other than the objective's at which the engine is slower with confidence, whatever its options may
    `gain`: it can never ship."""
    batch = primary_batch(spec, [*figures["batches"]])
    for size, at in figures["batches"].items():
        ratio = ratio_of(spec, at)
        if size != batch and ratio is not None and ratio["high"] * gain < SLOWER:
            return f"slower at batch size {size}: {ratio['ratio']:.2f}x"
    return None


def over_all_sizes(spec: OptimizationSpec, figures: Mapping[str, Any] | None) -> float:
    """The logarithm of the mean gain over all batch sizes that were timed."""
    found = [ratio_of(spec, at) for at in (figures or {}).get("batches", {}).values()]
    logs = [math.log(max(float(ratio["ratio"]), 1e-9)) for ratio in found if ratio is not None]
    return sum(logs) / len(logs) if logs else 0.0


def can_win(speed: Speed, best_low: float, *, gain: float = 1.0) -> bool:
    """Whether its interval, stretched by what tuning may gain, still reaches the best one's lower end."""
    return speed.high * gain >= best_low


def dropped_as_slow(speed: Speed, best: str, best_speed: Speed) -> str:
    return (
        f"short timing: {speed.ratio:.2f}x [{speed.low:.2f}, {speed.high:.2f}], which cannot reach {best} with "
        f"{best_speed.ratio:.2f}x [{best_speed.low:.2f}, {best_speed.high:.2f}]"
    )


def loses_too_much(spec: OptimizationSpec, accuracy: Mapping[str, Any]) -> bool:
    """On a few samples: only where even the kind end of the interval lies over the limit."""
    loss, interval = accuracy.get("loss_percent"), accuracy.get("loss_ci")
    if loss is None:
        return True
    kind_end = interval[0] if interval else loss
    return bool(min(kind_end, loss) > spec.validation.max_accuracy_loss_percent)


def may_keep(spec: OptimizationSpec, accuracy: Mapping[str, Any]) -> bool:
    """On all samples of the search: within the limit, or off it by no more than chance often makes (about a standard
    error). Samples that nobody chose by have the last word, and a limit that is kept is not to be lost before."""
    loss, interval = accuracy.get("loss_percent"), accuracy.get("loss_ci")
    if loss is None:
        return False
    kind = (loss + interval[0]) / 2 if interval else loss
    return bool(min(kind, loss) <= spec.validation.max_accuracy_loss_percent)


def over_limit(spec: OptimizationSpec, accuracy: Mapping[str, Any]) -> bool:
    """By the estimate itself: what the gate will ask of the final engine."""
    loss = accuracy.get("loss_percent")
    return loss is None or loss > spec.validation.max_accuracy_loss_percent


def finalists(
    ranked: Sequence[tuple[str, Speed, bool]],
    most: int = MOST_FINALISTS,
    *,
    over_all: Mapping[str, float] | None = None,
    fallback: str | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Who is measured in full, the fastest first, and why the others are not. Of those that cannot be told from the
    fastest at the batch size that counts, those come first that gain the most over all sizes (`over_all`, by id).

    `ranked`: (id, speed, safe). `safe` says that its accuracy is beyond doubt (the same arithmetic, or well inside of
    the limit): the fastest safe one always goes on, so that a gate that fails late does not leave the job with nothing;
    it costs no full measurement where the faster one is confirmed (`sparing`). `fallback` does where nobody is safe:
    one flip among two hundred samples is enough for an interval that reaches over a limit of 1 %.
    The others were timed beside them already: a third that is as fast is nothing lost.
    """
    order = sorted(ranked, key=lambda r: -r[1].ratio)
    if not order:
        return [], {}
    leader, best = order[0][0], order[0][1]
    if over_all is not None:
        tied = [r for r in order if can_win(r[1], best.low) and r[1].ratio >= TIE * best.ratio]
        order = sorted(tied, key=lambda r: -over_all[r[0]]) + [r for r in order if r not in tied]
    chosen = [cid for cid, speed, _ in order if can_win(speed, best.low)][:most]
    safe = next((cid for cid, _, sure in order if sure), fallback)
    if safe is not None and safe not in chosen:
        chosen.append(safe)
    reasons = {cid: _not_chosen(speed, leader, best) for cid, speed, _ in order if cid not in chosen}
    return chosen, reasons


def _not_chosen(speed: Speed, best: str, best_speed: Speed) -> str:
    if not can_win(speed, best_speed.low):
        return dropped_as_slow(speed, best, best_speed)
    return (
        f"short timing: {speed.ratio:.2f}x [{speed.low:.2f}, {speed.high:.2f}], about as fast as {best} with "
        f"{best_speed.ratio:.2f}x: the {MOST_FINALISTS} fastest are measured in full"
    )
