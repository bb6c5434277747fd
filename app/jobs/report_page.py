"""The report as a self-contained page: no script, no request to anywhere, every value escaped."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.figures import metric
from app.jobs.by_batch_page import by_batch
from app.jobs.chain_page import chain
from app.jobs.comparison_page import comparison_body
from app.jobs.page_parts import (
    MAX_ROWS,
    Json,
    as_number,
    bullets,
    facts_table,
    folded,
    interval_text,
    objects,
    part_of,
    rows_table,
    scrolling,
    section,
    shapes_text,
    table,
    text,
)
from app.jobs.report_plots import configurations, latencies, pareto, speedups, waterfall
from app.jobs.traffic_page import traffic
from app.jobs.training_page import training

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox"
)
_STYLE = Path(__file__).parents[1] / "web" / "static" / "report.css"  # that of the pages
_CHECKS = {
    "accuracy_loss_percent": "accuracy lost, points",
    "p99_latency_ms": "p99 latency, ms",
    "throughput_qps": "throughput, samples/s",
    "min_throughput_qps": "throughput, samples/s",
    "memory_mb": "memory, MB",
    "max_memory_mb": "memory, MB",
    "size_mb": "size on disk, MB",
    "max_size_mb": "size on disk, MB",
}
_COMPATIBILITY = {
    "backend": "backend",
    "accepted": "takes the model",
    "how": "found out by",
    "refused_count": "refused",
    "changes": "what to change",
}
_BUNDLES = {
    "name": "kind",
    "backend": "run by",
    "notes": "notes",
    "tried": "tried in this worker's server",
    "reason": "why there is none",
}
_SENSITIVITY = {"name": "node", "op_type": "operator", "error": "error of the outputs"}
_LAYERS = {"name": "layer", "op_type": "operator", "ms": "ms", "share": "share of the time"}
_SWEEP = {
    "batch": "batch size",
    "instances": "instances",
    "threads": "threads each",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "throughput_qps": "samples/s",
    "memory_mb": "MB of memory",
    "reason": "note",
}
_SHAPES = {
    "label": "shape",
    "dims": "inputs",
    "original_ms": "the original, ms",
    "latency_ms": "the engine, ms",
    "speedup": "speed-up",
    "speedup_ci": "95 % interval",
    "in_use": "in use",
    "holds": "not slower",
    "answers": "answers",
    "reason": "note",
}


def report_page(report: Json, job_id: str) -> str:
    """HTML of a report. Parts that the report does not have are left out."""
    title = text(part_of(report, "analysis").get("model", job_id))
    head = f"<h1>{title}</h1><p class=sub>job {text(job_id)}</p>"
    return _page(title, head + report_body(report))


def report_body(report: Json) -> str:
    """What stands below the title, in three parts: what it gained, whether to trust it, what to do next."""
    final = part_of(report, "final_metrics")
    gained = [
        _tiles(final),
        _measured_at(final),
        _beside_the_original(final),
        section("Latency (p50, lower is better)", latencies(report)),
        section("Speed-up over the original, with its 95 % interval", speedups(report)),
        section("Which engine answers which batch", by_batch(part_of(report, "by_batch"))),
        section("The chain", chain(part_of(report, "chain"))),
        section("At every shape", rows_table(report.get("shapes"), _SHAPES, 16)),
        section("Speed, accuracy and size", pareto(report)),
        section("What each part gained, measured by leaving it out", waterfall(report) + _applied(report)),
    ]
    trust = [
        section("Checks", _checks(report)),
        section("Candidates", _candidates(report)),
        section("The search, in the order of trying", _search(report)),
        section("Training", training(report)),
        section("Layers that quantization hurts most", rows_table(report.get("sensitivity"), _SENSITIVITY, 10)),
        section("Where the time goes", _profile(part_of(report, "profile"))),
        folded("Method", facts_table(part_of(report, "method"))),
        folded("Environment", facts_table(part_of(report, "environment"))),
    ]
    then = [
        section("Recommendations", bullets(report.get("recommendations"))),
        section("Under the job's traffic", traffic(part_of(report, "traffic"))),
        section("Deployment", _deployment(report)),
        section("Other bundles (GET /v1/engines/…/bundle?kind=)", rows_table(report.get("bundles"), _BUNDLES, 8)),
        section("Backends that did not run here", rows_table(report.get("compatibility"), _COMPATIBILITY, 8)),
    ]
    hardware = part_of(report, "analysis").get("hardware")
    parts = [
        f"<p class=sub>Measured on {text(hardware)}</p>" if hardware else "",
        _warnings(report),
        section("What did I gain?", "".join(gained), 2),
        section("Can I trust it?", "".join(trust), 2),
        section("What next?", "".join(then), 2),
    ]
    return "".join(parts)


def comparison_page(report: Json, job_id: str) -> str:
    """HTML of a report that compares targets."""
    title = f"Targets compared · job {text(job_id)}"
    return _page(title, f"<h1>{title}</h1>{comparison_body(report)}")


@functools.cache
def _style() -> str:
    return _STYLE.read_text()


def _page(title: str, body: str) -> str:
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    whole = f"<body><main class=report>{body}</main></body>"
    return f"<!doctype html><html lang=en><head>{head}<style>{_style()}</style></head>{whole}</html>"


def _tiles(final: Json) -> str:
    wanted = {
        "speedup": "speed-up",
        "latency_ms": "ms p50",
        "throughput_qps": "per second",
        "accuracy_loss_percent": "points of accuracy lost",
        "size_mb": "MB on disk",
        "memory_mb": "MB of memory",
        "gpu_memory_mb": "MB of the GPU's memory",
    }
    there = [n for n in wanted if n in final and (n != "gpu_memory_mb" or final[n] is not None)]
    verdict = final.get("accuracy_verdict")
    if verdict is not None:
        wanted["accuracy_loss_percent"] = f"points of accuracy lost, {text(verdict)}"
    if final.get("speedup_ci"):
        wanted["speedup"] = f"speed-up, 95 %{interval_text(final['speedup_ci'])}"
    loss = as_number(final.get("accuracy_loss_percent"))
    if loss is not None and loss < 0:
        wanted["accuracy_loss_percent"] = wanted["accuracy_loss_percent"].replace("lost", "gained")
        final = {**final, "accuracy_loss_percent": -loss}
    tiles = "".join(f"<div class=tile><b>{text(final[n])}</b>{wanted[n]}</div>" for n in there)
    if not tiles:
        return ""
    shown = "ok" if verdict == "proven" else "no"
    why = final.get("accuracy_verdict_reason")
    sentence = f"<p class={shown}>Accuracy {text(why)}</p>" if verdict is not None and why else ""
    return f"<div class=tiles>{tiles}</div>{sentence}"


def _warnings(report: Json) -> str:
    """Before anything else: what makes the figures below worthless."""
    found = report.get("warnings")
    lines = found[:MAX_ROWS] if isinstance(found, list) else []
    return "".join(f"<p class=no role=alert><b>{text(line)}</b></p>" for line in lines)


def _measured_at(final: Json) -> str:
    """Where the headline's figures were measured."""
    batch, shape = final.get("batch_size"), final.get("shape")
    if batch is None and not shape:
        return ""
    where = f"at batch size {text(batch)}"
    if isinstance(shape, Mapping):
        where += f", with {shapes_text(shape)}"
    fewer = [
        f"{text(name)}, axis {axis}: {text(bound[0] or 0)} to {text(bound[1] or 'any')}"
        for name, bounds in part_of(final, "accepts").items()
        for axis, bound in enumerate(bounds if isinstance(bounds, list) else [])
        if isinstance(bound, list) and len(bound) == 2
    ]
    takes = f" The bundle takes fewer sizes than the original: {'; '.join(fewer)}." if fewer else ""
    return f"<p class=sub>Measured {where}.{takes}</p>"


def _beside_the_original(final: Json) -> str:
    """What the tiles leave out: the original's figures, and the cheaper call."""
    told = []
    if final.get("original_latency_ms") is not None:
        told.append(f"The original takes {text(final['original_latency_ms'])} ms; both called as infer.py calls.")
    bound = part_of(final, "bound")
    if bound.get("p50_ms") is not None:
        told.append(f"With inputs and outputs bound before, the engine takes {text(bound['p50_ms'])} ms.")
    if final.get("original_accuracy_value") is not None:
        ours, theirs = (_value(final, name) for name in ("accuracy_value", "original_accuracy_value"))
        of = f"{text(final.get('accuracy_metric'))} is {ours}, the original's {theirs}"
        told.append(f"{of}, on {text(final.get('accuracy_samples'))} samples, by {text(final.get('accuracy_basis'))}.")
    return f"<p class=sub>{' '.join(told)}</p>" if told else ""


def _value(found: Json, name: str, kind: str = "accuracy_metric") -> str:
    """A value of the metric that stands beside it."""
    value, which = as_number(found.get(name)), found.get(kind)
    return text(found.get(name)) if value is None else text(metric(str(which), value))


def _profile(profile: Json) -> str:
    distorted = profile.get("distorted")
    warning = f"<p class=no>Not to be relied on: {text(distorted)}.</p>" if distorted else ""
    rows = rows_table(profile.get("layers"), _LAYERS, 12)
    return warning + rows if rows else ""


def _why(report: Json, candidate: Json) -> Any:
    """Why a candidate fell; what disturbed the machine stands in the warning at the top, and not in every row again."""
    reason, told = candidate.get("reason"), part_of(report, "disturbance").get("reason")
    return reason.replace(f": {told}", ", as said above") if isinstance(reason, str) and told else reason


def _candidates(report: Json) -> str:
    rows = []
    for c in configurations(report):
        accuracy = part_of(c, "accuracy")
        loss, samples = accuracy.get("loss_percent"), accuracy.get("samples")
        shown = None
        if loss is not None:
            name, values = text(accuracy.get("metric")), ""
            if accuracy.get("baseline_value") is not None:
                ours, theirs = (_value(accuracy, key, "metric") for key in ("value", "baseline_value"))
                values = f" {ours}, the original {theirs}"
            shown = f"{text(loss)} ({name}{values}, {text(samples)} samples)"
        verdict = "the baseline" if c.get("id") == "baseline" else f"{text(c.get('status'))}: {_why(report, c)}"
        memory, on_gpu = c.get("memory_mb"), c.get("gpu_memory_mb")
        memory = memory if on_gpu is None else f"{text(memory)} and {text(on_gpu)} of the GPU's"
        rows.append([c.get("name"), c.get("precision"), c.get("size_mb"), memory, shown, verdict])
    return table(["configuration", "precision", "MB on disk", "MB of memory", "accuracy loss, points", "verdict"], rows)


def _checks(report: Json) -> str:
    rows = ""
    for check in objects(report.get("checks")):
        passed = check.get("passed")
        verdict = "<span class=ok>passed</span>" if passed is True else "<span class=no>failed</span>"
        if passed is None:
            verdict = "–"
        if check.get("proven") is not None:
            verdict += ", proven" if check.get("proven") else ", <b>unproven</b>"
        value, bound, limit = (text(check.get(k)) for k in ("value", "bound", "limit"))
        why = text(check.get("reason") or "")
        name = str(check.get("name"))
        words = text(_CHECKS.get(name, name.replace("_", " ")))
        figures = "".join(f"<td class=n>{figure}" for figure in (value, bound, limit))
        rows += f"<tr><td>{words}{figures}<td>{verdict}<td>{why}"
    names = ["check", "value", "not excluded, up to", "limit", "verdict", "why"]
    head = "".join(f"<th scope=col{' class=n' if 0 < i < 4 else ''}>{name}" for i, name in enumerate(names))
    return scrolling(f"<thead><tr>{head}<tbody>{rows}", names) if rows else ""


def _applied(report: Json) -> str:
    rows = []
    for item in objects(report.get("optimizations_applied")):
        ratio, cost = item.get("latency_ratio"), item.get("accuracy_cost_percent")
        shown = None if ratio is None else f"{text(ratio)}{interval_text(item.get('latency_ratio_ci'))}"
        lost = None if cost is None else f"{text(cost)}{interval_text(item.get('accuracy_cost_ci'))}"
        note = item.get("reason") or item.get("compared_with") or ""
        rows.append([item.get("name"), item.get("impact"), shown, lost, note])
    names = ["part", "impact", "latency with it over without [95 %]", "points of accuracy it costs [95 %]", "note"]
    return table(names, rows)


def _search(report: Json) -> str:
    """Everything that was considered, with the figure it went on or fell by."""
    candidates = objects(report.get("candidates"))
    rows: list[list[Any]] = []
    several = len({c["made_by"] for c in candidates if c.get("made_by")}) > 1
    for c in candidates:
        timed = [s for s in objects(c.get("search")) if s.get("decision") == "timed"]
        ratio = None if not timed else f"{text(timed[-1].get('ratio'))}x"
        loss, made_by = part_of(c, "accuracy").get("loss_percent"), [c.get("made_by")] if several else []
        rows.append([c.get("name"), ratio, loss, c.get("status"), _why(report, c), *made_by])
    names = ["configuration", "short timing", "points lost", "verdict", "why", *(["made by"] if several else [])]
    return table(names, rows)


def _deployment(report: Json) -> str:
    config = part_of(report, "deployment_config")
    facts = {name: value for name, value in config.items() if name != "sweep"}
    return facts_table(facts) + rows_table(config.get("sweep"), _SWEEP, MAX_ROWS)
