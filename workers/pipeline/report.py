"""Makes the report and the manifest from what a job found out. Every figure in them was measured in this job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.domain.report import (
    Analysis,
    AppliedOptimization,
    CandidateReport,
    DeploymentConfig,
    FinalMetrics,
    Report,
    StageReport,
)
from workers.pipeline.optimize import CandidateRun, Optimization, baseline_precision
from workers.pipeline.recommend import recommend
from workers.pipeline.runner import Outcome
from workers.pipeline.select import BASELINE, Tried, pareto, ratio_of


def make_report(found: Optimization, calls: list[Outcome]) -> Report:
    assert found.baseline.figures is not None
    batch = found.verdict.primary_batch
    structure = found.export.data["structure"]
    shipped = found.verdict.picked is not None
    return Report(
        analysis=Analysis(
            model=found.model.name,
            original_size_mb=_mb(found.export.data.get("size_bytes") or found.model.size_bytes),
            original_latency_ms=_rounded(_latency(found.baseline, batch)),
            hardware=str(found.hardware.get("cpu_model") or found.hardware.get("id")),
            parameters=found.export.data.get("parameters"),
            opset=found.export.data.get("opset"),
            kind=structure["kind"],
            ops=structure["ops"],
            notes=list(found.export.data.get("notes", [])),
        ),
        optimizations_applied=_applied(found, batch),
        final_metrics=_final(found, batch) if shipped else None,
        deployment_config=_deployment(found, batch) if shipped else None,
        recommendations=recommend(found),
        job_id=found.job.id,
        picked=found.verdict.picked,
        candidates=[_candidate(found, run) for run in found.runs],
        skipped=[{"name": s.name, "reason": s.reason} for s in found.plan.skipped],
        baseline=_baseline(found),
        checks=_checks(found),
        pareto=pareto([found.baseline, *(r.tried for r in found.runs)], batch),
        environment={
            "hardware": dict(found.hardware),
            "conditions": found.benchmark.data.get("conditions", {}),
            "versions": _versions(calls),
        },
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
        stages=[_stage(entry, calls) for entry in found.job.stages if entry["status"] == "succeeded"],
        noisy=bool(found.benchmark.data.get("noisy")),
        budget_exhausted=found.budget_exhausted,
    )


def make_manifest(found: Optimization, calls: list[Outcome], fingerprint: str, report_sha256: str) -> dict[str, Any]:
    """Every input, stage key, option, version, fingerprint and output digest: enough to run the job again."""
    return {
        "job_id": found.job.id,
        "spec": found.job.spec,
        "model": {"id": found.model.id, "sha256": found.model.sha256, "format": found.model.format},
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
                "seconds": call.seconds,
            }
            for call in calls
        ],
        "report_sha256": report_sha256,
    }


def _latency(tried: Tried, batch: str) -> float | None:
    """p50 in ms at this batch size, or the mean where the samples do not carry a median."""
    at = (tried.figures or {}).get("batches", {}).get(batch, {})
    value = at.get("p50_ms") if at.get("p50_ms") is not None else at.get("mean_ms")
    return None if value is None else float(value)


def _winner(found: Optimization) -> Tried:
    return found.picked.tried if found.picked else found.baseline


def _versions(calls: list[Outcome]) -> dict[str, str]:
    """Of every library that had a part in the result."""
    return dict(sorted({name: version for call in calls for name, version in call.libraries.items()}.items()))


def _applied(found: Optimization, batch: str) -> list[AppliedOptimization]:
    """The steps of the shipped engine, each with what it gained: measured between the configuration that ends before it
    and the one that ends with it. Where one of these was not among the candidates, several steps share one figure,
    which stands with the last of them."""
    picked = found.picked
    if picked is None:
        return []
    before, unmeasured = found.baseline, 0
    applied = []
    for i, step in enumerate(picked.plan.steps):
        name, details = _describe(step.stage, step.options, picked.steps[i])
        if i == 0:
            name += ", built offline for this hardware"  # every configuration is built; the baseline is not
        steps = picked.plan.steps[: i + 1]
        upto = next((r.tried for r in found.runs if r.build is not None and r.plan.steps == steps), None)
        ratio = _between(before, upto, batch)
        if ratio is None or upto is None:
            unmeasured += 1
            reason = "not measured apart: the configuration that ends with this step was not measured"
            applied.append(AppliedOptimization(name=name, impact=None, reason=reason, details=details))
            continue
        interval = _interval(found, before, upto, batch)
        shared = f"together with the {unmeasured} step(s) before it" if unmeasured else None
        applied.append(
            AppliedOptimization(
                name=name,
                impact=_impact(ratio, interval),
                reason=shared,
                latency_ratio=ratio,
                latency_ratio_ci=interval,
                details=details,
            )
        )
        before, unmeasured = upto, 0
    return applied


def _between(before: Tried, after: Tried | None, batch: str) -> float | None:
    if after is None:
        return None
    old, new = _latency(before, batch), _latency(after, batch)
    return new / old if old and new else None


def _interval(found: Optimization, before: Tried, after: Tried, batch: str) -> list[float] | None:
    """Known against the baseline only; between two candidates it would need their samples round by round."""
    if before is not found.baseline or after.figures is None:
        return None
    speedup = after.figures["batches"].get(batch, {}).get("speedup")
    return [1 / speedup["high"], 1 / speedup["low"]] if speedup else None


def _impact(ratio: float, interval: list[float] | None) -> str:
    percent = round(100 * (1 - ratio))
    if percent == 0 or (interval is not None and interval[0] <= 1.0 <= interval[1]):
        return "no measurable change"
    return f"{percent}% latency reduction" if percent > 0 else f"{-percent}% latency increase"


def _describe(stage: str, options: Mapping[str, Any], outcome: Outcome) -> tuple[str, dict[str, Any]]:
    data = outcome.data
    if stage == "simplify":
        details = {k: data.get(k) for k in ("nodes_before", "nodes_after", "fusions", "at_load", "fell_back")}
        name = "ONNX simplification and transformer fusions" if options.get("fusions") else "ONNX simplification"
        return name, details
    if stage == "quantize":
        details = {k: data.get(k) for k in ("qdq_by_op", "quantized_nodes", "calibration")}
        return f"quantization ({options['recipe'].replace('_', ' ')})", details
    return stage, {}


def _final(found: Optimization, batch: str) -> FinalMetrics:
    winner = _winner(found)
    assert winner.figures is not None
    at = winner.figures["batches"][batch]
    ratio = ratio_of(found.spec, at) if winner.id != BASELINE else None
    accuracy = winner.accuracy or {}
    reasons = {}
    if winner.id == BASELINE:
        reasons["speedup"] = "no candidate was faster with confidence within the limits; the original ships untouched"
        loss: float | None = 0.0
    else:
        loss = accuracy.get("loss_percent")
    if winner.figures.get("peak_memory_mb") is None:
        reasons["memory_mb"] = "not measured"
    return FinalMetrics(
        latency_ms=_rounded(_latency(winner, batch)),
        throughput_qps=_rounded(at.get("throughput_qps"), 2),
        accuracy_loss_percent=_rounded(loss),
        memory_mb=_rounded(winner.figures.get("peak_memory_mb"), 1),
        speedup=_speedup(ratio) if ratio else "1.0x",
        speedup_ci=[round(ratio["low"], 4), round(ratio["high"], 4)] if ratio else None,
        size_mb=_mb(winner.figures["size_bytes"]),
        batch_size=int(batch),
        accuracy_metric=accuracy.get("metric"),
        accuracy_loss_ci=accuracy.get("loss_ci"),
        accuracy_samples=accuracy.get("samples"),
        reasons=reasons,
    )


def _speedup(ratio: Mapping[str, Any]) -> str:
    """One digit where that says it, two where a small gain would look like none."""
    value = float(ratio["ratio"])
    return f"{value:.1f}x" if round(value, 1) > 1.1 else f"{value:.2f}x"


def _deployment(found: Optimization, batch: str) -> DeploymentConfig:
    picked = found.picked
    runtime = picked.build.data["runtime"] if picked and picked.build else {}
    best = max(
        ((int(b), at) for b, at in (_winner(found).figures or {})["batches"].items()),
        key=lambda item: item[1].get("throughput_qps") or 0,
    )[0]
    return DeploymentConfig(
        batch_size=int(batch) if found.spec.objective == "latency" else best,
        precision=picked.plan.precision if picked else baseline_precision(found),
        dynamic_batching=bool(found.export.data.get("dynamic_batch")),
        instances_per_gpu=None,
        backend=picked.plan.backend if picked else "onnxruntime",
        runtime=runtime,
        reasons={"instances_per_gpu": "measured on a CPU; instances were not varied"},
    )


def _candidate(found: Optimization, run: CandidateRun) -> CandidateReport:
    tried = run.tried
    figures = tried.figures or {}
    is_pick = found.verdict.picked == run.plan.id
    reasons = tried.reasons
    # Kept: sound and within every limit, but not the pick.
    kept = tried.failed is None and all(c.passed for c in tried.checks)
    reason = "the fastest that keeps every limit" if is_pick else "; ".join(reasons) or "another candidate is faster"
    return CandidateReport(
        id=run.plan.id,
        name=run.plan.name,
        backend=run.plan.backend,
        precision=run.plan.precision,
        recipe=run.plan.recipe,
        status="picked" if is_pick else "kept" if kept else "dropped",
        reason=reason,
        batches=figures.get("batches", {}),
        accuracy=dict(tried.accuracy) if tried.accuracy else None,
        size_mb=_mb(figures.get("size_bytes")),
        memory_mb=_rounded(figures.get("peak_memory_mb"), 1),
        cold_start_ms=_rounded(figures.get("cold_start_ms"), 2),
        checks=[c.to_json() for c in tried.checks],
        details={
            s.stage: _describe(s.stage, s.options, s)[1] for s in run.steps if s.stage in ("simplify", "quantize")
        },
        failure=run.failure.public() if run.failure else None,
    )


def _baseline(found: Optimization) -> dict[str, Any]:
    figures = dict(found.baseline.figures or {})
    return {
        "id": BASELINE,
        "name": "the original, ONNX Runtime's defaults",
        "backend": "onnxruntime",
        "precision": baseline_precision(found),
        "size_mb": _mb(figures.get("size_bytes")),
        "memory_mb": _rounded(figures.get("peak_memory_mb"), 1),
        "cold_start_ms": _rounded(figures.get("cold_start_ms"), 2),
        "batches": figures.get("batches", {}),
        "checks": [c.to_json() for c in found.baseline.checks],
    }


def _checks(found: Optimization) -> list[dict[str, Any]]:
    """Of what ships; or, where nothing does, of the nearest miss."""
    if found.verdict.nearest is not None:
        return [c.to_json() for c in found.verdict.nearest[1]]
    winner = _winner(found)
    checks = [c.to_json() for c in winner.checks]
    if winner.id == BASELINE:
        detail = "the shipped bytes are the original's"
        checks.insert(
            0, {"name": "accuracy_loss_percent", "value": 0.0, "limit": None, "passed": True, "reason": detail}
        )
    return checks


def _accuracy_method(found: Optimization) -> dict[str, Any]:
    validated = next((r.tried.accuracy for r in found.runs if r.tried.accuracy), None)
    if validated is None:
        return {"reason": "no candidate came as far as validation"}
    return {k: validated.get(k) for k in ("metric", "kind", "why", "source", "samples", "enough_samples_for")}


def _stage(entry: Mapping[str, Any], calls: list[Outcome]) -> StageReport:
    call = next((c for c in calls if c.key == entry["key"]), None)
    return StageReport(
        name=entry["name"],
        candidate=entry["candidate"],
        cached=entry["cached"],
        seconds=entry["seconds"] or 0.0,
        notes=call.notes if call else [],
    )


def _mb(size_bytes: int | None) -> float | None:  # decimal megabytes, as file managers and api.md's example count
    return None if size_bytes is None else round(size_bytes / 1e6, 3)


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(float(value), digits)
