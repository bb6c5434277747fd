"""The report as a self-contained page: no script, no request to anywhere, every value escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from app.jobs.by_batch_page import by_batch
from app.jobs.comparison_page import comparison_body
from app.jobs.page_parts import (
    MAX_ROWS,
    Json,
    as_number,
    bullets,
    facts_table,
    interval_text,
    objects,
    part_of,
    rows_table,
    section,
    svg,
    table,
    text,
)
from app.jobs.traffic_page import traffic

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox"
)
_STYLE = """
:root{color-scheme:light dark;--line:#8884;--bar:#3b7dd8;--base:#8a8f98;--bad:#c0392b;--good:#2e8b57}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:0}
h3{font-size:.9rem;opacity:.7;margin:1rem 0 .2rem}
h2{font-size:1.1rem;margin-top:2rem;border-bottom:1px solid var(--line)}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.sub{opacity:.7}.ok{color:var(--good)}.no{color:var(--bad)}
.tiles{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
.tile{border:1px solid var(--line);border-radius:.5rem;padding:.6rem 1rem}.tile b{display:block;font-size:1.3rem}
svg text{font:12px system-ui,sans-serif;fill:currentColor}
"""
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
    "reason": "",
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
    "reason": "",
}


def report_page(report: Json, job_id: str) -> str:
    """HTML of a report. Parts that the report does not have are left out."""
    analysis, final = part_of(report, "analysis"), part_of(report, "final_metrics")
    parts = [
        f"<h1>{text(analysis.get('model', job_id))}</h1>",
        f"<p class=sub>{text(analysis.get('hardware'))} · job {text(job_id)}</p>",
        _warnings(report),
        _tiles(final),
        _measured_at(final),
        _beside_the_original(final),
        section("Latency (p50, lower is better)", _latencies(report)),
        section("Speed-up over the original, with its 95 % interval", _speedups(report)),
        section("Which engine answers which batch", by_batch(part_of(report, "by_batch"))),
        section("At every shape", rows_table(report.get("shapes"), _SHAPES, 16)),
        section("Candidates", _candidates(report)),
        section("Checks", _checks(report)),
        section("What each part gained, measured by leaving it out", _applied(report)),
        section("The search, in the order of trying", _search(report)),
        section("Under the job's traffic", traffic(part_of(report, "traffic"))),
        section("Deployment", _deployment(report)),
        section("Other bundles (GET /v1/engines/…/bundle?kind=)", rows_table(report.get("bundles"), _BUNDLES, 8)),
        section("Layers that quantization hurts most", rows_table(report.get("sensitivity"), _SENSITIVITY, 10)),
        section("Where the time goes", _profile(part_of(report, "profile"))),
        section("Backends that did not run here", rows_table(report.get("compatibility"), _COMPATIBILITY, 8)),
        section("Recommendations", bullets(report.get("recommendations"))),
        section("Method", facts_table(part_of(report, "method"))),
        section("Environment", facts_table(part_of(report, "environment"))),
    ]
    return _page(text(analysis.get("model", job_id)), "".join(parts))


def comparison_page(report: Json, job_id: str) -> str:
    """HTML of a report that compares targets."""
    title = f"Targets compared · job {text(job_id)}"
    return _page(title, f"<h1>{title}</h1>{comparison_body(report)}")


def _page(title: str, body: str) -> str:
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    return f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>"


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
        where += ", with " + ", ".join(f"{text(name)} [{text(dims)}]" for name, dims in shape.items())
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
        ours, theirs = text(final.get("accuracy_value")), text(final["original_accuracy_value"])
        of = f"{text(final.get('accuracy_metric'))} is {ours}, the original's {theirs}"
        told.append(f"{of}, on {text(final.get('accuracy_samples'))} samples, by {text(final.get('accuracy_basis'))}.")
    return f"<p class=sub>{' '.join(told)}</p>" if told else ""


def _profile(profile: Json) -> str:
    distorted = profile.get("distorted")
    warning = f"<p class=no>Not to be relied on: {text(distorted)}.</p>" if distorted else ""
    rows = rows_table(profile.get("layers"), _LAYERS, 12)
    return warning + rows if rows else ""


def _configurations(report: Json) -> list[Json]:
    """The baseline, then the candidates that were measured in full; the others stand in the search's table."""
    baseline = part_of(report, "baseline")
    return [*([{"name": "the original", **baseline}] if baseline else []), *_measured(report)]


def _measured(report: Json) -> list[Json]:
    return [c for c in objects(report.get("candidates")) if c.get("measured", "full") == "full"]


def _batch_sizes(configurations: Sequence[Json]) -> list[str]:
    sizes = {str(size) for c in configurations for size in part_of(c, "batches")}
    return sorted(sizes, key=lambda size: (len(size), size))[:16]


def _at(configuration: Json, size: str) -> Json:
    return part_of(part_of(configuration, "batches"), size)


def _colour(configuration: Json) -> str:
    if configuration.get("status") == "picked":
        return "var(--good)"
    return "var(--base)" if configuration.get("id") == "baseline" else "var(--bar)"


def _latencies(report: Json) -> str:
    """One bar chart per batch size."""
    configurations = _configurations(report)
    charts = ""
    for size in _batch_sizes(configurations):
        rows = [(c, as_number(_at(c, size).get("p50_ms"))) for c in configurations]
        known = [(c, value) for c, value in rows if value is not None]
        if known:
            longest = max(value for _, value in known) or 1.0
            marks = "".join(
                f"<text x=0 y={26 * i + 17}>{text(str(c.get('name'))[:40])}</text>"
                f"<rect x=270 y={26 * i + 4} width={330 * value / longest:.1f} height=18 rx=3 fill='{_colour(c)}'/>"
                f"<text x={276 + 330 * value / longest:.1f} y={26 * i + 17}>{value:.4g} ms</text>"
                for i, (c, value) in enumerate(known)
            )
            charts += f"<h3>batch size {text(size)}</h3>{svg(26 * len(known), f'p50 at batch size {size}', marks)}"
    return charts


def _speedups(report: Json) -> str:
    """Speed-up over the original with its 95 % interval: a dot and a whisker per candidate and batch size."""
    rows = []
    candidates = _measured(report)
    for candidate in candidates:
        for size in _batch_sizes(candidates):
            speedup = part_of(_at(candidate, size), "speedup")
            low, ratio, high = (as_number(speedup.get(k)) for k in ("low", "ratio", "high"))
            if low is not None and ratio is not None and high is not None:
                rows.append((f"{str(candidate.get('name'))[:32]}, b={size}", low, ratio, high, _colour(candidate)))
    if not rows:
        return ""
    most = min(max(1.2, *(high for _, _, _, high, _ in rows)), 20.0)

    def x(value: float) -> float:
        return 270 + 330 * min(value, most) / most

    height = 26 * len(rows)
    marks = f"<line x1={x(1):.1f} x2={x(1):.1f} y1=0 y2={height} stroke='currentColor' stroke-dasharray='3 3'/>"
    for i, (label, low, ratio, high, colour) in enumerate(rows):
        y = 26 * i + 13
        marks += (
            f"<text x=0 y={y + 4}>{text(label)}</text>"
            f"<line x1={x(low):.1f} x2={x(high):.1f} y1={y} y2={y} stroke='{colour}' stroke-width=3 />"
            f"<circle cx={x(ratio):.1f} cy={y} r=5 fill='{colour}'/>"
            f"<text x=612 y={y + 4}>{ratio:.2f}x [{low:.2f}, {high:.2f}]</text>"
        )
    return svg(height, "speed-up over the original with its 95 % interval", marks)


def _candidates(report: Json) -> str:
    rows = []
    for c in _configurations(report):
        accuracy = part_of(c, "accuracy")
        loss, samples = accuracy.get("loss_percent"), accuracy.get("samples")
        shown = None
        if loss is not None:
            metric, values = text(accuracy.get("metric")), ""
            if accuracy.get("baseline_value") is not None:
                values = f" {text(accuracy.get('value'))}, the original {text(accuracy['baseline_value'])}"
            shown = f"{text(loss)} ({metric}{values}, {text(samples)} samples)"
        verdict = "the baseline" if c.get("id") == "baseline" else f"{text(c.get('status'))}: {c.get('reason')}"
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
        rows += (
            f"<tr><td>{text(check.get('name'))}<td class=n>{value}<td class=n>{bound}<td class=n>{limit}<td>{verdict}"
        )
        rows += f"<td>{why}"
    head = "<tr><th>check<th class=n>value<th class=n>not excluded, up to<th class=n>limit<th>verdict<th>"
    return f"<table>{head}{rows}</table>" if rows else ""


def _applied(report: Json) -> str:
    rows = []
    for item in objects(report.get("optimizations_applied")):
        ratio, cost = item.get("latency_ratio"), item.get("accuracy_cost_percent")
        shown = None if ratio is None else f"{text(ratio)}{interval_text(item.get('latency_ratio_ci'))}"
        lost = None if cost is None else f"{text(cost)}{interval_text(item.get('accuracy_cost_ci'))}"
        note = item.get("reason") or item.get("compared_with") or ""
        rows.append([item.get("name"), item.get("impact"), shown, lost, note])
    names = ["part", "impact", "latency with it over without [95 %]", "points of accuracy it costs [95 %]", ""]
    return table(names, rows)


def _search(report: Json) -> str:
    """Everything that was considered, with the figure it went on or fell by."""
    rows = []
    for c in objects(report.get("candidates")):
        timed = [s for s in objects(c.get("search")) if s.get("decision") == "timed"]
        ratio = None if not timed else f"{text(timed[-1].get('ratio'))}x"
        rows.append(
            [c.get("name"), ratio, part_of(c, "accuracy").get("loss_percent"), c.get("status"), c.get("reason")]
        )
    return table(["configuration", "short timing", "points lost", "", "why"], rows)


def _deployment(report: Json) -> str:
    config = part_of(report, "deployment_config")
    facts = {name: value for name, value in config.items() if name != "sweep"}
    return facts_table(facts) + rows_table(config.get("sweep"), _SWEEP, MAX_ROWS)
