"""Advice that follows from this job's figures, and only from them."""

from __future__ import annotations

from workers.pipeline.optimize import Optimization
from workers.pipeline.select import ratio_of


def recommend(found: Optimization) -> list[str]:
    """Sentences a person can act on."""
    batch = found.verdict.primary_batch
    advice: list[str] = []
    if found.verdict.picked == "baseline":
        tried = [f"{r.plan.name}: {'; '.join(r.tried.reasons)}" for r in found.runs]
        because = " — ".join(tried) or "there was nothing to try"
        advice.append(f"Keep the original: nothing that was tried is faster within the limits ({because}).")
    for run in found.runs:
        at = ((run.tried.figures or {}).get("batches") or {}).get(batch)
        ratio = ratio_of(found.spec, at) if at else None
        if ratio is None or ratio["low"] <= 1.0 or run.plan.id == found.verdict.picked:
            continue
        accuracy = run.tried.accuracy or {}
        loss = accuracy.get("loss_percent")
        if accuracy.get("source") == "synthetic" and not run.plan.lossless:
            advice.append(
                f"Give validation data: {run.plan.name} ran {ratio['ratio']:.2f}x as fast, and only data can show "
                "whether it keeps the accuracy."
            )
        elif loss is not None and loss > found.spec.validation.max_accuracy_loss_percent:
            advice.append(
                f"{run.plan.name} ran {ratio['ratio']:.2f}x as fast but loses {loss:.2f} % ({accuracy.get('metric')}, "
                f"{accuracy.get('samples')} samples); allow that loss to get it."
            )
    for skipped in found.plan.skipped:
        if "calibration data" in skipped.reason:
            advice.append("Give calibration data (some hundred typical samples): static int8 could then be tried.")
    accuracy = (found.picked.tried.accuracy if found.picked else None) or {}
    carries = accuracy.get("enough_samples_for")
    if carries is not None and carries > found.spec.validation.max_accuracy_loss_percent:
        advice.append(
            f"{accuracy.get('samples')} validation samples can show a loss of {carries:.2g} % at best; give more to "
            f"hold a limit of {found.spec.validation.max_accuracy_loss_percent} %."
        )
    if found.benchmark.data.get("noisy"):
        advice.append(
            "The machine was noisy (the baseline differed from itself): measure again on a quiet one, with another "
            "`benchmark.min_seconds` (the same job again would answer from the cache)."
        )
    if found.budget_exhausted:
        advice.append(
            f"The budget of {found.spec.budget_seconds} s ran out before all candidates were tried: raise it."
        )
    return advice
