"""The figures of what ships, at the batch size that the objective is judged at: what report, bundle and API tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.domain.report import FinalMetrics
from workers.kernel import TensorSpec
from workers.measure.shapes import axis_sizes, free_axes
from workers.pipeline.checks import LOSS, same_bytes
from workers.pipeline.outcome import Proof
from workers.pipeline.select import Tried
from workers.pipeline.shape_rules import accepted, narrowest, not_kept
from workers.search.objective import BASELINE, ratio_of


def winner(proof: Proof) -> Tried:
    """Who ships; the baseline also where nothing does."""
    return proof.picked.tried if proof.picked else proof.baseline


def final_metrics(proof: Proof) -> FinalMetrics:
    """Needs a proof in which something ships."""
    batch, shipped = proof.verdict.primary_batch, winner(proof)
    assert shipped.figures is not None
    at = shipped.figures["batches"][batch]
    is_original = shipped.id == BASELINE
    ratio = None if is_original else ratio_of(proof.spec, at)
    accuracy = shipped.accuracy or {}
    judged = _judged(proof) if is_original else accuracy
    value = judged.get("baseline_value" if is_original else "value")
    reasons = {}
    if is_original:
        reasons["speedup"] = "no candidate was faster with confidence within the limits; the original ships untouched"
        if proof.verdict.unclaimed:
            reasons["speedup"] = f"no speed-up is claimed, and the original ships: {proof.verdict.unclaimed}"
        elsewhere = [f"{r.plan.name} {why}" for r in proof.runs for why in not_kept(proof.spec, r.tried.figures or {})]
        if elsewhere:
            reasons["shapes"] = f"the original ships for all shapes: {'; '.join(elsewhere)}"
    if proof.verdict.smaller:
        reasons["speedup"] = (
            "not faster with confidence: it ships because the original is over a limit of size or memory"
        )
    if shipped.figures.get("peak_memory_mb") is None:
        reasons["memory_mb"] = "not measured"
    if not is_original and proof.verdict.unclaimed:
        reasons["speedup"] = f"unproven, shipped because the job allows it: {proof.verdict.unclaimed}"
    if not is_original:
        beside = not_kept(proof.spec, shipped.figures, in_use=False)
        if beside:
            reasons["shapes"] = f"not where neither data nor job are: {'; '.join(beside)}"
    bounded = accepts(proof)
    if bounded:
        reasons["accepts"] = (
            "the bundle takes fewer sizes than the original: beyond them the engine was not seen to answer as that does"
        )
    return FinalMetrics(
        latency_ms=rounded(latency_ms(shipped, batch)),
        original_latency_ms=rounded(latency_ms(proof.baseline, batch)),
        bound=bound(at),
        throughput_qps=rounded(at.get("throughput_qps"), 2),
        accuracy_loss_percent=0.0 if is_original else rounded(accuracy.get("loss_percent")),
        memory_mb=rounded(shipped.figures.get("peak_memory_mb"), 1),
        gpu_memory_mb=rounded(shipped.figures.get("gpu_memory_mb"), 1),
        speedup=_speedup(ratio) if ratio else "1.0x",
        speedup_ci=[round(ratio["low"], 4), round(ratio["high"], 4)] if ratio else None,
        speedup_proven=None if is_original else proof.verdict.unclaimed is None and not proof.verdict.smaller,
        size_mb=mb(shipped.figures["size_bytes"]),
        batch_size=int(batch),
        shape=(proof.benchmark.data.get("shape") or {}).get("dims"),
        accepts=bounded,
        accuracy_metric=judged.get("metric"),
        accuracy_basis=judged.get("kind"),
        accuracy_value=rounded(value, 6),
        original_accuracy_value=rounded(judged.get("baseline_value"), 6),
        accuracy_loss_ci=accuracy.get("loss_ci"),
        accuracy_samples=judged.get("samples"),
        **_verdict(shipped),
        reasons=reasons,
    )


def _verdict(shipped: Tried) -> dict[str, Any]:
    """Whether the loss of what ships is proven, in a word and a sentence."""
    check = same_bytes() if shipped.id == BASELINE else next(c for c in shipped.checks if c.name == LOSS)
    return {
        "accuracy_verdict": "proven" if check.proven else "unproven",
        "accuracy_verdict_reason": check.reason,
        "accuracy_loss_bound_percent": rounded(check.bound),
        "accuracy_confidence": check.confidence,
    }


def accepts(proof: Proof) -> dict[str, list[list[int | None] | None]]:
    """The sizes that the bundle takes: input → for each axis [least, most], or None where any will do. Empty where it
    takes whatever the original does. An engine that was not judged at other shapes takes those in use."""
    if proof.picked is None:
        return {}
    shipped = proof.picked.tried
    inputs = [TensorSpec(i["name"], i["dtype"], tuple(i["shape"])) for i in proof.export.data["inputs"]]
    free = free_axes(inputs)
    if not free:
        return {}
    judged = [t for t in (shipped, *shipped.served.values()) if t.shapes is not None]
    limit = proof.spec.validation.max_accuracy_loss_percent
    bounds = narrowest([accepted(t.shapes, t.accuracy, limit) for t in judged])
    if not judged:
        at = [proof.benchmark.data.get("shape"), *((shipped.figures or {}).get("shapes") or ())]
        used = [axis_sizes(inputs, a["dims"]) for a in at if a and a["in_use"] and "failed" not in a]
        bounds = {name: [min(u[name] for u in used), max(u[name] for u in used)] for name in free if used}
    found: dict[str, list[list[int | None] | None]] = {}
    for name, bound in bounds.items():
        for tensor, axis in free[name]:
            rank = next(len(spec.shape) for spec in inputs if spec.name == tensor)
            found.setdefault(tensor, [None] * rank)[axis] = bound
    return found


def _judged(proof: Proof) -> Mapping[str, Any]:
    """What the original was seen to do beside any candidate."""
    known = (r.tried.accuracy for r in proof.runs if r.tried.accuracy)
    return next((a for a in known if a.get("baseline_value") is not None), {})


def bound(at: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of one batch size: the cheaper call that stands beside what decides, where it was timed."""
    found = at.get("bound")
    return None if not found else {k: found.get(k) for k in ("p50_ms", "speedup")}


def latency_ms(tried: Tried, batch: str) -> float | None:
    """p50 in ms at this batch size, or the mean where the samples do not carry a median."""
    at = (tried.figures or {}).get("batches", {}).get(batch, {})
    value = at.get("p50_ms") if at.get("p50_ms") is not None else at.get("mean_ms")
    return None if value is None else float(value)


def mb(size_bytes: int | None) -> float | None:
    """Decimal megabytes, as file managers and api.md's example count."""
    return None if size_bytes is None else round(size_bytes / 1e6, 3)


def rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(float(value), digits)


def _speedup(ratio: Mapping[str, Any]) -> str:
    """One digit where that says it, two where a small gain would look like none."""
    value = float(ratio["ratio"])
    return f"{value:.1f}x" if round(value, 1) > 1.1 else f"{value:.2f}x"
