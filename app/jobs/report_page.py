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
h1{font-size:1.5rem;margin-bottom:0}h2{font-size:1.1rem;margin-top:2rem;border-bottom:1px solid var(--line)}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.sub{opacity:.7}.ok{color:var(--good)}.no{color:var(--bad)}
.tiles{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
.tile{border:1px solid var(--line);border-radius:.5rem;padding:.6rem 1rem}.tile b{display:block;font-size:1.3rem}
svg text{font:12px system-ui,sans-serif;fill:currentColor}
"""
_MAX_ROWS = 200
_Json = Mapping[str, Any]


def report_page(report: _Json, job_id: str) -> str:
    """HTML of a report. Parts that the report does not have are left out."""
    analysis, final = _object(report, "analysis"), _object(report, "final_metrics")
    parts = [
        f"<h1>{_text(analysis.get('model', job_id))}</h1>",
        f"<p class=sub>{_text(analysis.get('hardware'))} · job {_text(job_id)}</p>",
        _tiles(final),
        _section("Latency of the candidates (p50, lower is better)", _bars(report)),
        _section("Candidates", _candidates(report)),
        _section("Checks", _checks(report)),
        _section("What was done", _pairs(report.get("optimizations_applied"), "name", "impact")),
        _section("Deployment", _facts(_object(report, "deployment_config"))),
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
    tiles = "".join(
        f"<div class=tile><b>{_text(value)}</b>{_text(name.replace('_', ' '))}</div>"
        for name, value in final.items()
        if not isinstance(value, Mapping | list)
    )
    return f"<div class=tiles>{tiles}</div>" if tiles else ""


def _latency(candidate: _Json) -> float | None:
    """The first p50 that the candidate has, in ms; its measurements stand per batch size."""
    found = _find_number(candidate, ("p50_ms", "latency_ms", "p50"), depth=4)
    return found if found is not None and found >= 0 else None


def _find_number(value: Any, names: Sequence[str], depth: int) -> float | None:
    if depth == 0:
        return None
    if isinstance(value, Mapping):
        for name in names:
            number = value.get(name)
            if isinstance(number, int | float) and not isinstance(number, bool):
                return float(number)
        children = list(value.values())
    elif isinstance(value, list):
        children = value
    else:
        return None
    for child in children[:_MAX_ROWS]:
        number = _find_number(child, names, depth - 1)
        if number is not None:
            return number
    return None


def _label(candidate: _Json) -> str:
    words = [str(candidate[k]) for k in ("backend", "precision", "recipe") if candidate.get(k)]
    return " · ".join(words) or str(candidate.get("id") or candidate.get("name") or "candidate")


def _bars(report: _Json) -> str:
    rows: list[tuple[str, float, str]] = []
    baseline = _latency(_object(report, "baseline"))
    if baseline is not None:
        rows.append(("baseline", baseline, "var(--base)"))
    for candidate in _objects(report.get("candidates")):
        latency = _latency(candidate)
        if latency is not None:
            rows.append((_label(candidate), latency, "var(--bar)"))
    if not rows:
        return ""
    longest = max(value for _, value, _ in rows) or 1.0
    height = 26 * len(rows)
    marks = []
    for i, (label, value, colour) in enumerate(rows):
        y = 26 * i
        width = 360 * value / longest
        marks.append(f"<text x=0 y={y + 17}>{_text(label[:40])}</text>")
        marks.append(f"<rect x=270 y={y + 4} width={width:.1f} height=18 rx=3 fill='{colour}'/>")
        marks.append(f"<text x={276 + width:.1f} y={y + 17}>{value:.4g} ms</text>")
    return f"<svg viewBox='0 0 720 {height}' width='100%' role=img aria-label='Latency bars'>{''.join(marks)}</svg>"


def _candidates(report: _Json) -> str:
    candidates = _objects(report.get("candidates"))
    if not candidates:
        return ""
    hidden = {"latency", "benchmark", "samples", "batches", "notes", "runtime", "stages"}
    names = [
        name
        for name in dict.fromkeys(key for candidate in candidates for key in candidate)
        if name not in hidden and not any(isinstance(c.get(name), Mapping | list) for c in candidates)
    ]
    return _table(names[:10], [[candidate.get(name) for name in names[:10]] for candidate in candidates])


def _checks(report: _Json) -> str:
    rows = ""
    for check in _objects(report.get("checks")):
        passed = check.get("passed")
        verdict = "<span class=ok>passed</span>" if passed is True else "<span class=no>failed</span>"
        if passed is None:
            verdict = "–"
        value, limit = _text(check.get("value")), _text(check.get("limit"))
        rows += f"<tr><td>{_text(check.get('name'))}<td class=n>{value}<td class=n>{limit}<td>{verdict}"
    return f"<table><tr><th>check<th class=n>value<th class=n>limit<th>verdict{rows}</table>" if rows else ""


def _pairs(value: Any, left: str, right: str) -> str:
    return _table([left, right], [[item.get(left), item.get(right)] for item in _objects(value)])


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
