"""Makes the report and the manifest from what a job found out. Every figure in them was measured in this job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.domain.report import (
    Analysis,
    AppliedOptimization,
    CandidateReport,
    Report,
    SearchReport,
    ShapeReport,
    StageReport,
)
from workers.kernel import stages
from workers.pipeline.by_batch import by_batch
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.chain_report import chain_report, chain_told
from workers.pipeline.checks import same_bytes
from workers.pipeline.deployment import deployment_of
from workers.pipeline.final import final_metrics, winner
from workers.pipeline.final import latency_ms as _latency
from workers.pipeline.final import mb as _mb
from workers.pipeline.final import rounded as _rounded
from workers.pipeline.load import traffic_report
from workers.pipeline.outcome import Ablated, Optimization, nodes_kept
from workers.pipeline.pairs import PairRun
from workers.pipeline.recommend import recommend
from workers.pipeline.select import pareto
from workers.pipeline.shape_rules import shape_table
from workers.pipeline.stage_calls import Outcome
from workers.search.objective import BASELINE


def make_report(found: Optimization, calls: Sequence[Outcome], stages: Sequence[Mapping[str, Any]]) -> Report:
    """`stages`: the job's stages as clients see them."""
    assert found.baseline.figures is not None
    batch = found.verdict.primary_batch
    structure = found.export.data["structure"]
    shipped = found.verdict.picked is not None
    return Report(
        analysis=Analysis(
            model=found.name,
            original_size_mb=_mb(found.export.data.get("size_bytes") or sum(m.size_bytes for m in found.models)),
            original_latency_ms=_rounded(_latency(found.baseline, batch)),
            hardware=str(found.hardware.get("cpu_model") or found.hardware.get("id")),
            parameters=found.export.data.get("parameters"),
            opset=found.export.data.get("opset"),
            kind=structure["kind"],
            ops=structure["ops"],
            notes=list(found.export.data.get("notes", [])),
        ),
        optimizations_applied=_applied(found, batch),
        final_metrics=final_metrics(found) if shipped else None,
        deployment_config=deployment_of(found, found.explanation) if shipped else None,
        recommendations=recommend(found),
        warnings=found.warnings,
        job_id=found.job.id,
        picked=found.verdict.picked,
        candidates=[_candidate(found, run) for run in found.runs],
        skipped=[{"name": s.name, "reason": s.reason} for s in found.plan.skipped],
        baseline=_baseline(found),
        checks=_checks(found),
        pareto=pareto(found.baseline, [(r.tried, r.figures) for r in found.runs], batch),
        environment=_environment(found, calls),
        method={
            "benchmark": found.benchmark.data.get("method", {}),
            "accuracy": _accuracy_method(found),
            "aa": found.benchmark.data["aa"],
            "gate": (
                "An engine ships only if the lower end of the 95 % interval of its speed-up is above 1.0, beyond the "
                "A/A noise, and its accuracy gate holds on the file that ships; else the untouched baseline ships."
            ),
            "raw_samples": found.benchmark.outputs["samples"].to_json() if "samples" in found.benchmark.outputs else [],
        },
        stages=[_stage(entry, calls) for entry in stages if entry["status"] == "succeeded"],
        noisy=bool(found.benchmark.data.get("noisy")),
        claim=found.verdict.unclaimed is None,
        disturbance=found.benchmark.data.get("disturbance"),
        budget_exhausted=found.search.exhausted or bool(found.benchmark.data.get("shortened")),
        search=_search(found),
        nodes_kept=nodes_kept(found.picked),
        profile=dict(found.explanation.profile.data) if found.explanation.profile else None,
        traffic=traffic_report(found),
        not_explained=dict(found.explanation.reasons),
        compatibility=[dict(told) for told in found.compatibility],
        bundles=dict(found.package.data["kinds"]) if found.package else {},
        sensitivity=_sensitivity(found),
        shapes=[ShapeReport(**row) for row in _shapes(found, batch)],
        by_batch=by_batch(found),
        chain=chain_report(found),
    )


def _environment(found: Optimization, calls: Sequence[Outcome]) -> dict[str, Any]:
    """The machine that the figures were measured on: another worker's, where they come from an earlier job."""
    made = found.benchmark.made
    return {
        "hardware": made.get("hardware") or dict(found.hardware),
        "measured": {"at": made.get("at"), "worker": made.get("worker"), "cached": found.benchmark.cached},
        "conditions": found.benchmark.data.get("conditions", {}),
        "versions": _versions(calls),
    }


def make_manifest(
    found: Optimization, calls: Sequence[Outcome], fingerprint: str, report_sha256: str
) -> dict[str, Any]:
    """Every input, stage key, option, version, fingerprint and output digest: enough to run the job again."""
    return {
        "job_id": found.job.id,
        "spec": found.job.spec,
        "model": {"id": found.model.id, "sha256": found.model.sha256, "format": found.model.format},
        **chain_told(found),
        "hardware": dict(found.hardware),
        "hardware_fingerprint": fingerprint,
        "versions": _versions(calls),
        "picked": found.verdict.picked,
        "stages": [
            {
                "stage": call.stage,
                "key": call.key,
                "inputs": {name: ref.to_json() for name, ref in call.inputs.items()},
                "options": call.options,
                "libraries": call.libraries,
                "outputs": {name: ref.to_json() for name, ref in call.outputs.items()},
                "cached": call.cached,
                "made": call.made,
                "seconds": call.seconds,
            }
            for call in calls
        ],
        "report_sha256": report_sha256,
    }


def _versions(calls: Sequence[Outcome]) -> dict[str, str]:
    """Of every library that had a part in the result."""
    return dict(sorted({name: version for call in calls for name, version in call.libraries.items()}.items()))


def _applied(found: Optimization, batch: str) -> list[AppliedOptimization]:
    """The parts of the shipped engine, each with what it gained and cost: measured against the engine without it."""
    return [_part(found, item, batch) for item in found.explanation.ablation]


def _part(found: Optimization, item: Ablated, batch: str) -> AppliedOptimization:
    steps = found.explained.steps if found.explained else []
    details = next((_details(s) for s in steps if s.stage == item.part.stage), {})
    at = (item.figures or {}).get("batches", {}).get(batch, {})
    against = (at.get("against") or {}).get("speedup")
    reason, compared = item.reason, None
    if against is None:
        failed = (item.figures or {}).get("failed", {}).get("detail")
        reason = reason or (f"not measured: {failed}" if failed else "not measured at this batch size")
    elif item.part.without is not None:
        compared = item.part.reason
    # The benchmark's ratio is p50 of what ships / p50 of the engine without the part: below 1 where the part helps.
    ratio = None if against is None else round(float(against["ratio"]), 4)
    interval = None if against is None else [round(float(against[k]), 4) for k in ("low", "high")]
    return AppliedOptimization(
        name=item.part.name,
        impact=None if ratio is None else _impact(ratio, interval),
        reason=reason,
        latency_ratio=ratio,
        latency_ratio_ci=interval,
        compared_with=compared,
        details=details,
        **_accuracy_cost(found, item),
    )


def _accuracy_cost(found: Optimization, item: Ablated) -> dict[str, Any]:
    # Both on the samples of the search: those that confirm are for the verdict alone.
    shipped, without = found.explained.selected if found.explained else {}, item.accuracy or {}
    loss, lost = shipped.get("loss_percent"), without.get("loss_percent")
    if loss is None or lost is None or shipped.get("metric") != without.get("metric"):
        return {}
    cost = {"accuracy_cost_percent": _rounded(loss - lost), "without_loss_percent": _rounded(lost)}
    ours, theirs = shipped.get("loss_ci"), without.get("loss_ci")
    if not ours or not theirs:
        return cost
    return {**cost, "accuracy_cost_ci": [_rounded(ours[0] - theirs[1]), _rounded(ours[1] - theirs[0])]}


def _impact(ratio: float, interval: list[float] | None) -> str:
    percent = round(100 * (1 - ratio))
    if percent == 0 or (interval is not None and interval[0] <= 1.0 <= interval[1]):
        return "no measurable change"
    return f"{percent}% latency reduction" if percent > 0 else f"{-percent}% latency increase"


def _details(outcome: Outcome) -> dict[str, Any]:
    """What a graph step found out, for the report."""
    return {k: outcome.data[k] for k in stages()[outcome.stage].reported if k in outcome.data}


def _shapes(found: Optimization, batch: str) -> list[dict[str, Any]]:
    shipped, original = winner(found), found.baseline.figures
    assert original is not None
    return shape_table(found.spec, found.benchmark.data, original, shipped.figures or original, batch, shipped.shapes)


def _candidate(found: Optimization, run: CandidateRun) -> CandidateReport:
    tried = run.tried
    figures = run.figures
    is_pick = found.verdict.picked == run.plan.id
    reasons = tried.reasons
    # Kept: sound and within every limit, but not the pick.
    both = isinstance(found.picked, PairRun) and run in found.picked.parts
    kept = both or (tried.failed is None and all(c.passed for c in tried.checks))
    reason = "the fastest that keeps every limit" if is_pick else "; ".join(reasons) or "another candidate is faster"
    if both:
        reason = "one of the two engines in the bundle" + (f"; alone: {'; '.join(reasons)}" if reasons else "")
    measured = "full" if tried.figures else "short timing" if run.screened else None
    return CandidateReport(
        id=run.plan.id,
        name=run.plan.name,
        backend=run.plan.backend,
        precision=run.plan.precision,
        recipe=run.recipe,
        status="picked" if is_pick else "kept" if kept else "dropped",
        reason=reason,
        batches=figures.get("batches", {}),
        shapes=figures.get("shapes", []),
        accuracy=dict(tried.accuracy) if tried.accuracy else None,
        accuracy_in_search=dict(run.selected) if run.confirmed else None,
        size_mb=_mb(figures.get("size_bytes")),
        memory_mb=_rounded(figures.get("peak_memory_mb"), 1),
        gpu_memory_mb=_rounded(figures.get("gpu_memory_mb"), 1),
        cold_start_ms=_rounded(figures.get("cold_start_ms"), 2),
        checks=[c.to_json() for c in tried.checks],
        details={s.stage: told for s in run.steps if (told := _details(s)) or not stages()[s.stage].makes_engine},
        failure=run.failure.public() if run.failure else None,
        runtime=run.runtime if run.loadable else dict(run.plan.runtime),
        prior=run.plan.prior,
        measured=measured,
        measured_at=found.benchmark.made.get("at") if tried.figures else run.screened_at,
        made_by=run.build.made.get("worker") if run.build else None,
        nodes_kept=nodes_kept(run),
        search=run.history,
    )


def _search(found: Optimization) -> SearchReport:
    return SearchReport(
        strategy=found.spec.search.strategy,
        budget_seconds=found.spec.budget_seconds,
        spent_seconds=round(found.spent_seconds, 2),
        verdict_seconds=round(found.verdict_seconds, 2),
        order=[r.plan.id for r in found.runs],
        finalists=[r.plan.id for r in found.search.finalists],
        phases=found.search.phases,
        exhausted=found.search.exhausted,
    )


def _sensitivity(found: Optimization) -> list[dict[str, Any]]:
    """Of the quantized model that came nearest to shipping: the nodes whose quantization costs the most."""
    measured = next((r for r in found.runs if r.sensitivity is not None), None)
    return [] if measured is None or measured.sensitivity is None else list(measured.sensitivity.data["nodes"][:50])


def _baseline(found: Optimization) -> dict[str, Any]:
    figures = dict(found.baseline.figures or {})
    return {
        "id": BASELINE,
        "name": "the original, ONNX Runtime's defaults",
        "backend": found.baseline_backend,
        "precision": found.original_precision,
        "size_mb": _mb(figures.get("size_bytes")),
        "memory_mb": _rounded(figures.get("peak_memory_mb"), 1),
        "gpu_memory_mb": _rounded(figures.get("gpu_memory_mb"), 1),
        "cold_start_ms": _rounded(figures.get("cold_start_ms"), 2),
        "measured_at": found.benchmark.made.get("at"),
        "batches": figures.get("batches", {}),
        "checks": [c.to_json() for c in found.baseline.checks],
    }


def _checks(found: Optimization) -> list[dict[str, Any]]:
    """Of what ships; or, where nothing does, of the nearest miss."""
    if found.verdict.nearest is not None:
        return [c.to_json() for c in found.verdict.nearest[1]]
    shipped = winner(found)
    checks = [c.to_json() for c in shipped.checks]
    if shipped.id == BASELINE:
        checks.insert(0, same_bytes().to_json())
    return checks


def _accuracy_method(found: Optimization) -> dict[str, Any]:
    confirmed = [r.confirmed.data for r in found.runs if r.confirmed]
    validated = next((a for a in (*confirmed, *(r.tried.accuracy for r in found.runs)) if a), None)
    if validated is None:
        return {"reason": "no candidate came as far as validation"}
    told = ("metric", "kind", "why", "source", "part", "samples", "enough_samples_for")
    return {
        **{k: validated.get(k) for k in told},
        "confidence": found.spec.validation.confidence,
        "looks": len(confirmed),
        "confidence_of_a_look": validated.get("confidence"),
        "samples_of_the_search": next((r.selected.get("samples") for r in found.runs if r.selected), None),
        "rule": (
            "The search chooses by a third of the samples that judge. The rest is looked at for the finalists alone, "
            "and the error is shared among these looks. Proven: the bound of the loss on them keeps the limit."
        ),
    }


def _stage(entry: Mapping[str, Any], calls: Sequence[Outcome]) -> StageReport:
    call = next((c for c in calls if c.key == entry["key"]), None)
    return StageReport(
        name=entry["name"],
        candidate=entry["candidate"],
        cached=entry["cached"],
        seconds=entry["seconds"] or 0.0,
        notes=call.notes if call else [],
        made_at=call.made.get("at") if call else None,
        made_by=call.made.get("worker") if call else None,
    )
