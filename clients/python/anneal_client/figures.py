"""What of a job is told to other platforms: whether its promise was kept, metrics, parameters, tags. Pure: dicts as the
service answers them, in and out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeGuard

Json = Mapping[str, Any]
Promise = Literal["kept", "unproven", "nothing_faster", "limits_missed", "failed"]

# What MLflow stores, which is the strictest: 6000 characters of a parameter, 8000 of a tag, 250 of a name.
_LONGEST, _LONGEST_NAME = 5000, 250
_UNNAMABLE = re.compile(r"[^\w.\- /]")
_FINAL = (
    "latency_ms",
    "original_latency_ms",
    "throughput_qps",
    "accuracy_loss_percent",
    "accuracy_loss_bound_percent",
    "accuracy_value",
    "original_accuracy_value",
    "memory_mb",
    "gpu_memory_mb",
    "size_mb",
)


def promise_of(job: Json, report: Json | None) -> Promise:
    """What came of the promise: an engine that is faster within the limits (`kept`), or that ships `unproven` from a
    busy machine, as the job allows by `benchmark.allow_noisy`; the original again, since nothing was faster; a limit
    that is not kept; or no answer, since the job failed or was cancelled."""
    if job.get("status") != "succeeded":
        missed = (job.get("error") or {}).get("code") == "no_feasible_candidate"
        return "limits_missed" if missed else "failed"
    report = report or {}
    unserved = (report.get("traffic") or {}).get("served") is False
    if unserved or any(check.get("passed") is False for check in report.get("checks") or ()):
        return "limits_missed"
    if report.get("picked") in (None, "baseline"):
        return "nothing_faster"
    return "unproven" if report.get("claim") is False else "kept"


def ships(promise: Promise) -> bool:
    """Whether there is an engine to use in place of the original."""
    return promise in ("kept", "unproven")


def metrics_of(report: Json) -> dict[str, float]:
    """Figures of the engine that ships: times in ms, sizes in MB, losses in percent of the job's metric. What was not
    measured is left out. `batch_8/p50_ms`: at one of the batch sizes."""
    final = report.get("final_metrics") or {}
    found = {name: final.get(name) for name in _FINAL}
    found["original_size_mb"] = (report.get("analysis") or {}).get("original_size_mb")
    found["speedup"] = _ratio(final.get("speedup"))
    found |= _interval("speedup", final.get("speedup_ci")) | _interval("accuracy_loss", final.get("accuracy_loss_ci"))
    candidates: list[Json] = list(report.get("candidates") or ())
    picked: Json = next((c for c in candidates if c.get("id") == report.get("picked")), {})
    for batch, figures in (picked.get("batches") or {}).items():
        for name in ("p50_ms", "p90_ms", "p99_ms", "throughput_qps"):
            found[f"batch_{batch}/{name}"] = figures.get(name)
        speedup = figures.get("speedup")
        found[f"batch_{batch}/speedup"] = speedup.get("ratio") if isinstance(speedup, Mapping) else speedup
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def params_of(job: Json) -> dict[str, str]:
    """What was asked for, as `FIELD.FIELD`; fields that were left open are left out, and the webhook, whose address may
    hold a secret."""
    spec = {name: value for name, value in (job.get("spec") or {}).items() if name != "webhook"}
    return {_UNNAMABLE.sub("_", name)[:_LONGEST_NAME]: value for name, value in _flat(spec)}


def tags_of(job: Json, report: Json | None, engine: Json | None) -> dict[str, str]:
    """Whose engine it is, what it is, and what of it is proven."""
    final = (report or {}).get("final_metrics") or {}
    engine = engine or {}
    found = {
        "job_id": job.get("id"),
        "promise": promise_of(job, report),
        "objective": (job.get("spec") or {}).get("objective"),
        "hardware": ((report or {}).get("analysis") or {}).get("hardware"),
        "picked": (report or {}).get("picked"),
        "speedup": final.get("speedup"),
        "speedup_proven": final.get("speedup_proven"),
        "accuracy_metric": final.get("accuracy_metric"),
        "accuracy_verdict": final.get("accuracy_verdict"),
        "error": (job.get("error") or {}).get("code"),
        "engine_id": engine.get("id"),
        "engine_sha256": engine.get("sha256"),
        "backend": engine.get("backend"),
        "precision": engine.get("precision"),
        "bundle_sha256": engine.get("bundle_sha256"),
    }
    return {name: _text(value) for name, value in found.items() if value is not None}


def description_of(job: Json, report: Json) -> str:
    """A few lines of Markdown for the registry's page."""
    final = report.get("final_metrics") or {}
    lines = [f"Engine of Anneal's job `{job.get('id')}` for {(report.get('analysis') or {}).get('hardware')}."]
    interval = final.get("speedup_ci")
    between = f" (95 %: {interval[0]:.3g} to {interval[1]:.3g})" if interval else ""
    lines.append(f"- speed-up {final.get('speedup')}{between}, latency {_short(final.get('latency_ms'))} ms")
    if final.get("accuracy_metric") is not None:
        loss = _short(final.get("accuracy_loss_percent"))
        lines.append(f"- {final['accuracy_metric']}: loss {loss} %, {final.get('accuracy_verdict') or 'not judged'}")
    lines += [f"- {text}" for text in report.get("warnings") or ()]
    return "\n".join(lines)


def _flat(spec: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in spec.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None and value != {}:
            yield prefix + name, _text(value)


def _interval(name: str, interval: Any) -> dict[str, Any]:
    low, high = interval if isinstance(interval, list | tuple) and len(interval) == 2 else (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _ratio(text: Any) -> float | None:
    """2.2 of "2.2x"."""
    try:
        return float(str(text).removesuffix("x"))
    except ValueError:
        return None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    return f"{value:.3g}" if _is_number(value) else "–"


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:_LONGEST]
