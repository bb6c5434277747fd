"""The report as a self-contained page: no script, no request to anywhere, every value escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

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
_MAX_ROWS = 200
_COMPATIBILITY = {
    "backend": "backend",
    "accepted": "takes the model",
    "how": "found out by",
    "refused_count": "refused",
    "changes": "what to change",
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
_Json = Mapping[str, Any]


def report_page(report: _Json, job_id: str) -> str:
    """HTML of a report. Parts that the report does not have are left out."""
    analysis, final = _object(report, "analysis"), _object(report, "final_metrics")
    parts = [
        f"<h1>{_text(analysis.get('model', job_id))}</h1>",
        f"<p class=sub>{_text(analysis.get('hardware'))} · job {_text(job_id)}</p>",
        _warnings(report),
        _tiles(final),
        _measured_at(final),
        _beside_the_original(final),
        _section("Latency (p50, lower is better)", _latencies(report)),
        _section("Speed-up over the original, with its 95 % interval", _speedups(report)),
        _section("At every shape", _rows(report.get("shapes"), _SHAPES, 16)),
        _section("Candidates", _candidates(report)),
        _section("Checks", _checks(report)),
        _section("What each part gained, measured by leaving it out", _applied(report)),
        _section("The search, in the order of trying", _search(report)),
        _section("Deployment", _deployment(report)),
        _section("Layers that quantization hurts most", _rows(report.get("sensitivity"), _SENSITIVITY, 10)),
        _section("Where the time goes", _profile(_object(report, "profile"))),
        _section("Backends that did not run here", _rows(report.get("compatibility"), _COMPATIBILITY, 8)),
        _section("Recommendations", _list(report.get("recommendations"))),
        _section("Method", _facts(_object(report, "method"))),
        _section("Environment", _facts(_object(report, "environment"))),
    ]
    title = _text(analysis.get("model", job_id))
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def _text(value: Any) -> str:
    """Any JSON value as escaped text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_text(k)}: {_text(v)}" for k, v in list(value.items())[:_MAX_ROWS])
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value[:_MAX_ROWS])
    return escape(str(value)[:2000], quote=True)


def _object(report: _Json, name: str) -> _Json:
    value = report.get(name)
    return value if isinstance(value, Mapping) else {}


def _objects(value: Any) -> list[_Json]:
    if isinstance(value, Mapping):
        value = [
            {"name": name, **item} if isinstance(item, Mapping) else {"name": name} for name, item in value.items()
        ]
    return [item for item in value[:_MAX_ROWS] if isinstance(item, Mapping)] if isinstance(value, list) else []


def _section(title: str, body: str) -> str:
    return f"<h2>{_text(title)}</h2>{body}" if body else ""


def _tiles(final: _Json) -> str:
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
        wanted["accuracy_loss_percent"] = f"points of accuracy lost, {_text(verdict)}"
    if final.get("speedup_ci"):
        wanted["speedup"] = f"speed-up, 95 %{_interval(final['speedup_ci'])}"
    tiles = "".join(f"<div class=tile><b>{_text(final[n])}</b>{wanted[n]}</div>" for n in there)
    if not tiles:
        return ""
    shown = "ok" if verdict == "proven" else "no"
    why = final.get("accuracy_verdict_reason")
    sentence = f"<p class={shown}>Accuracy {_text(why)}</p>" if verdict is not None and why else ""
    return f"<div class=tiles>{tiles}</div>{sentence}"


def _warnings(report: _Json) -> str:
    """Before anything else: what makes the figures below worthless."""
    found = report.get("warnings")
    lines = found[:_MAX_ROWS] if isinstance(found, list) else []
    return "".join(f"<p class=no role=alert><b>{_text(line)}</b></p>" for line in lines)


def _measured_at(final: _Json) -> str:
    """Where the headline's figures were measured."""
    batch, shape = final.get("batch_size"), final.get("shape")
    if batch is None and not shape:
        return ""
    where = f"at batch size {_text(batch)}"
    if isinstance(shape, Mapping):
        where += ", with " + ", ".join(f"{_text(name)} [{_text(dims)}]" for name, dims in shape.items())
    fewer = [
        f"{_text(name)}, axis {axis}: {_text(bound[0] or 0)} to {_text(bound[1] or 'any')}"
        for name, bounds in _object(final, "accepts").items()
        for axis, bound in enumerate(bounds if isinstance(bounds, list) else [])
        if isinstance(bound, list) and len(bound) == 2
    ]
    takes = f" The bundle takes fewer sizes than the original: {'; '.join(fewer)}." if fewer else ""
    return f"<p class=sub>Measured {where}.{takes}</p>"


def _beside_the_original(final: _Json) -> str:
    """What the tiles leave out: the original's figures, and the cheaper call."""
    told = []
    if final.get("original_latency_ms") is not None:
        told.append(f"The original takes {_text(final['original_latency_ms'])} ms; both called as infer.py calls.")
    bound = _object(final, "bound")
    if bound.get("p50_ms") is not None:
        told.append(f"With inputs and outputs bound before, the engine takes {_text(bound['p50_ms'])} ms.")
    if final.get("original_accuracy_value") is not None:
        ours, theirs = _text(final.get("accuracy_value")), _text(final["original_accuracy_value"])
        of = f"{_text(final.get('accuracy_metric'))} is {ours}, the original's {theirs}"
        told.append(
            f"{of}, on {_text(final.get('accuracy_samples'))} samples, by {_text(final.get('accuracy_basis'))}."
        )
    return f"<p class=sub>{' '.join(told)}</p>" if told else ""


def _profile(profile: _Json) -> str:
    distorted = profile.get("distorted")
    warning = f"<p class=no>Not to be relied on: {_text(distorted)}.</p>" if distorted else ""
    rows = _rows(profile.get("layers"), _LAYERS, 12)
    return warning + rows if rows else ""


def _configurations(report: _Json) -> list[_Json]:
    """The baseline, then the candidates that were measured in full; the others stand in the search's table."""
    baseline = _object(report, "baseline")
    return [*([{"name": "the original", **baseline}] if baseline else []), *_measured(report)]


def _measured(report: _Json) -> list[_Json]:
    return [c for c in _objects(report.get("candidates")) if c.get("measured", "full") == "full"]


def _batch_sizes(configurations: Sequence[_Json]) -> list[str]:
    sizes = {str(size) for c in configurations for size in _object(c, "batches")}
    return sorted(sizes, key=lambda size: (len(size), size))[:16]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _at(configuration: _Json, size: str) -> _Json:
    return _object(_object(configuration, "batches"), size)


def _colour(configuration: _Json) -> str:
    if configuration.get("status") == "picked":
        return "var(--good)"
    return "var(--base)" if configuration.get("id") == "baseline" else "var(--bar)"


def _latencies(report: _Json) -> str:
    """One bar chart per batch size."""
    configurations = _configurations(report)
    charts = ""
    for size in _batch_sizes(configurations):
        rows = [(c, _number(_at(c, size).get("p50_ms"))) for c in configurations]
        known = [(c, value) for c, value in rows if value is not None]
        if known:
            longest = max(value for _, value in known) or 1.0
            marks = "".join(
                f"<text x=0 y={26 * i + 17}>{_text(str(c.get('name'))[:40])}</text>"
                f"<rect x=270 y={26 * i + 4} width={330 * value / longest:.1f} height=18 rx=3 fill='{_colour(c)}'/>"
                f"<text x={276 + 330 * value / longest:.1f} y={26 * i + 17}>{value:.4g} ms</text>"
                for i, (c, value) in enumerate(known)
            )
            charts += f"<h3>batch size {_text(size)}</h3>{_svg(26 * len(known), f'p50 at batch size {size}', marks)}"
    return charts


def _speedups(report: _Json) -> str:
    """Speed-up over the original with its 95 % interval: a dot and a whisker per candidate and batch size."""
    rows = []
    candidates = _measured(report)
    for candidate in candidates:
        for size in _batch_sizes(candidates):
            speedup = _object(_at(candidate, size), "speedup")
            low, ratio, high = (_number(speedup.get(k)) for k in ("low", "ratio", "high"))
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
            f"<text x=0 y={y + 4}>{_text(label)}</text>"
            f"<line x1={x(low):.1f} x2={x(high):.1f} y1={y} y2={y} stroke='{colour}' stroke-width=3 />"
            f"<circle cx={x(ratio):.1f} cy={y} r=5 fill='{colour}'/>"
            f"<text x=612 y={y + 4}>{ratio:.2f}x [{low:.2f}, {high:.2f}]</text>"
        )
    return _svg(height, "speed-up over the original with its 95 % interval", marks)


def _svg(height: int, label: str, marks: str) -> str:
    return f"<svg viewBox='0 0 760 {height}' width='100%' role=img aria-label='{_text(label)}'>{marks}</svg>"


def _candidates(report: _Json) -> str:
    rows = []
    for c in _configurations(report):
        accuracy = _object(c, "accuracy")
        loss, samples = accuracy.get("loss_percent"), accuracy.get("samples")
        shown = None
        if loss is not None:
            metric, values = _text(accuracy.get("metric")), ""
            if accuracy.get("baseline_value") is not None:
                values = f" {_text(accuracy.get('value'))}, the original {_text(accuracy['baseline_value'])}"
            shown = f"{_text(loss)} ({metric}{values}, {_text(samples)} samples)"
        verdict = "the baseline" if c.get("id") == "baseline" else f"{_text(c.get('status'))}: {c.get('reason')}"
        memory, on_gpu = c.get("memory_mb"), c.get("gpu_memory_mb")
        memory = memory if on_gpu is None else f"{_text(memory)} and {_text(on_gpu)} of the GPU's"
        rows.append([c.get("name"), c.get("precision"), c.get("size_mb"), memory, shown, verdict])
    return _table(
        ["configuration", "precision", "MB on disk", "MB of memory", "accuracy loss, points", "verdict"], rows
    )


def _checks(report: _Json) -> str:
    rows = ""
    for check in _objects(report.get("checks")):
        passed = check.get("passed")
        verdict = "<span class=ok>passed</span>" if passed is True else "<span class=no>failed</span>"
        if passed is None:
            verdict = "–"
        if check.get("proven") is not None:
            verdict += ", proven" if check.get("proven") else ", <b>unproven</b>"
        value, bound, limit = (_text(check.get(k)) for k in ("value", "bound", "limit"))
        why = _text(check.get("reason") or "")
        rows += (
            f"<tr><td>{_text(check.get('name'))}<td class=n>{value}<td class=n>{bound}<td class=n>{limit}<td>{verdict}"
        )
        rows += f"<td>{why}"
    head = "<tr><th>check<th class=n>value<th class=n>not excluded, up to<th class=n>limit<th>verdict<th>"
    return f"<table>{head}{rows}</table>" if rows else ""


def _interval(value: Any) -> str:
    if not isinstance(value, list) or len(value) != 2:
        return ""
    return f" [{_text(value[0])}, {_text(value[1])}]"


def _applied(report: _Json) -> str:
    rows = []
    for item in _objects(report.get("optimizations_applied")):
        ratio, cost = item.get("latency_ratio"), item.get("accuracy_cost_percent")
        shown = None if ratio is None else f"{_text(ratio)}{_interval(item.get('latency_ratio_ci'))}"
        lost = None if cost is None else f"{_text(cost)}{_interval(item.get('accuracy_cost_ci'))}"
        note = item.get("reason") or item.get("compared_with") or ""
        rows.append([item.get("name"), item.get("impact"), shown, lost, note])
    names = ["part", "impact", "latency with it over without [95 %]", "points of accuracy it costs [95 %]", ""]
    return _table(names, rows)


def _search(report: _Json) -> str:
    """Everything that was considered, with the figure it went on or fell by."""
    rows = []
    for c in _objects(report.get("candidates")):
        timed = [s for s in _objects(c.get("search")) if s.get("decision") == "timed"]
        ratio = None if not timed else f"{_text(timed[-1].get('ratio'))}x"
        rows.append(
            [c.get("name"), ratio, _object(c, "accuracy").get("loss_percent"), c.get("status"), c.get("reason")]
        )
    return _table(["configuration", "short timing", "points lost", "", "why"], rows)


def _deployment(report: _Json) -> str:
    config = _object(report, "deployment_config")
    facts = {name: value for name, value in config.items() if name != "sweep"}
    return _facts(facts) + _rows(config.get("sweep"), _SWEEP, _MAX_ROWS)


def _rows(value: Any, columns: Mapping[str, str], most: int) -> str:
    return _table([*columns.values()], [[item.get(name) for name in columns] for item in _objects(value)[:most]])


def _facts(value: _Json) -> str:
    return _table(["", ""], [[str(name).replace("_", " "), item] for name, item in list(value.items())[:_MAX_ROWS]])


def _list(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return ""
    return "<ul>" + "".join(f"<li>{_text(item)}" for item in value[:_MAX_ROWS]) + "</ul>"


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{_text(name.replace('_', ' '))}" for name in names) if any(names) else ""
    body = ""
    for row in rows:
        cells = (
            f"<td class=n>{_text(v)}" if isinstance(v, int | float) and not isinstance(v, bool) else f"<td>{_text(v)}"
            for v in row
        )
        body += "<tr>" + "".join(cells)
    return f"<table><tr>{head}{body}</table>"
