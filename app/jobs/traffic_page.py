"""The report's page on a job's traffic: latency against rate with the limit, the engine beside the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.jobs.page_parts import Json, as_number, bullets, hint, interval_text, objects, part_of, rows_table, svg, text

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 760, 260, 56, 34
_MOST_LIMITS = 2.5  # × the limit: where the picture ends; what lies above stands at its upper edge
_LEAST_REQUESTS = 40  # of a point that is listed
_DRAWN_REQUESTS = 100  # of one that is drawn: so many have a p99
_TRIED = {
    "instances": "instances",
    "threads": "threads each",
    "max_batch": "largest batch",
    "max_delay_ms": "delay, ms",
    "padded": "filled up to common sizes",
    "preferred": "sizes not waited for",
    "yields_per_second": "yields at most, requests/s",
    "batch_ms": "a batch takes, ms",
    "goodput_seen": "within the limit (short look), requests/s",
    "decision": "",
}
_BROUGHT = {
    "setting": "setting",
    "value": "tuned",
    "instead": "instead",
    "goodput_with": "requests/s within the limit (short look)",
    "goodput_without": "requests/s within the limit without it (short look)",
    "ratio": "times as many with it",
    "reason": "",
}
_PATTERNS = {"pattern": "pattern", "fits": "fits", "why": "why", "told": "figures"}
_POINTS = {
    "rate": "requests/s",
    "verdict": "the limit",
    "requests": "requests",
    "over": "not within it",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "p99_bound_ms": "p99 is below, ms (95 %)",
    "queue_mean_ms": "in the queue, ms",
    "compute_mean_ms": "a batch computes, ms",
    "batches": "batches that formed (samples: share)",
    "answered_per_second": "answers/s",
}


def traffic(found: Json) -> str:
    """HTML; empty where the job told no traffic."""
    if not found:
        return ""
    engine, original, http = (part_of(found, side) for side in ("engine", "original", "http"))
    limit = as_number(part_of(found, "traffic").get("p99_limit_ms"))
    return "".join(
        [
            f"<p><b>{text(found.get('headline'))}</b></p>",
            _sentences(found),
            _cost(part_of(found, "cost")),
            _cold_start(part_of(found, "cold_start")),
            _picture(found, limit),
            _under("Points of the engine, as it is served", rows_table(_shown(engine), _POINTS, 24)),
            _under("Points of the original, with its own default settings", rows_table(_shown(original), _POINTS, 24)),
            _static(part_of(found, "static")),
            _under("Points of the bundle's serve.py, over HTTP", rows_table(_shown(http), _POINTS, 24)),
            _under("What each setting brought", rows_table(found.get("brought"), _BROUGHT, 8)),
            _under("Settings that were tried", rows_table(found.get("tried"), _TRIED, 40)),
            _under("Ways to serve it", rows_table(_ways(found.get("patterns")), _PATTERNS, 12)),
            _asides(found),
        ]
    )


def _under(title: str, body: str) -> str:
    return f"<h4>{text(title)}</h4>{body}" if body else ""


def _static(static: Json) -> str:
    """Beside the engine's own points, whose batches are those that form while instances are busy."""
    setup = part_of(static, "setup")
    how = f"of {setup.get('max_batch')}, waited for up to {setup.get('max_delay_ms')} ms (short looks)"
    return _under(f"Points of the engine with static batches, {how}", rows_table(_shown(static), _POINTS, 24))


def _ways(patterns: Any) -> list[Json]:
    """With the figures that each goes by, in words."""
    return [
        {**row, "told": ", ".join(f"{name.replace('_', ' ')} {_shortly(value)}" for name, value in told)}
        for row in objects(patterns)
        for told in [[(name, value) for name, value in part_of(row, "figures").items() if value not in (None, [])]]
    ]


def _shortly(value: Any) -> str:
    number = as_number(value)
    if number is not None:
        return f"{number:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sentences(found: Json) -> str:
    told, wanted = [], part_of(found, "traffic").get("rate_per_second")
    if wanted is not None:
        answer = {True: "is served within the limit", False: "is not served within the limit"}.get(
            found.get("served") if isinstance(found.get("served"), bool) else None,  # type: ignore[arg-type]
            "is not proven to be served within the limit, nor not to be",
        )
        told.append(f"The wanted {text(wanted)}/s {answer}.")
    if found.get("served") is False and found.get("machines") is not None:
        told.append(
            f"It takes {text(found['machines'])} machines like this one, each at {text(found['nearest_rate'])}/s."
        )
    gain = part_of(found, "gain")
    if gain:
        ends = f"[{text(gain.get('low'))}, {text(gain.get('high'))}]"
        ratio = gain.get("ratio")
        told.append(
            f"{text(ratio)} times the original's rate {ends}."
            if ratio is not None
            else f"Times the original's rate: {ends}."
        )
    http = part_of(found, "http")
    if http:
        rate = part_of(http, "goodput").get("rate")
        alone = text(http.get("alone_p50_ms"))
        told.append(f"By the bundle's serve.py over HTTP: {text(rate)}/s; one caller alone waits {alone} ms (p50).")
    refused = sorted(set(part_of(part_of(found, "padding"), "refused").values()))
    if refused:
        told.append(f"Requests of unlike sizes share no batch: {text('; '.join(map(str, refused)))}.")
    beyond = part_of(part_of(found, "engine"), "beyond")
    if beyond:
        told.append(_beyond(beyond))
    return f"<p class=sub>{' '.join(told)}</p>" if told else ""


def _cost(cost: Json) -> str:
    """Within the limit; empty where the job told no price."""
    if not cost:
        return ""
    currency, limit = text(cost.get("currency")), text(cost.get("limit"))
    price = f"{text(cost.get('price_per_hour'))} {currency} per hour"
    if cost.get("per_million_requests") is None:
        return f"<p class=sub>At {price}, no cost is claimed within {limit}: {text(cost.get('reason'))}.</p>"
    told = (
        f"At {price}, a million requests within {limit} cost {'' if cost.get('proven') else 'about '}"
        f"<b>{text(cost['per_million_requests'])} {currency}</b>"
        f"{interval_text(cost.get('per_million_requests_interval'))}"
    )
    if cost.get("original_per_million_requests") is not None:
        about = "" if cost.get("original_proven") else "about "
        told += f", of the original {about}{text(cost['original_per_million_requests'])}"
    if cost.get("samples_per_request") not in (None, 1.0):
        each = text(cost["samples_per_request"])
        told += f"; a million samples, {each} in a request, {text(cost.get('per_million_samples'))}"
    if cost.get("per_hour") is not None:
        about = "" if cost.get("proven") else "about "
        told += (
            f"; the wanted rate takes {about}{text(cost.get('machines'))} machines, {text(cost['per_hour'])} per hour"
        )
    return f"<p>{told}.</p>"


def _cold_start(cold: Json) -> str:
    if not cold:
        return ""
    return (
        f"<p class=sub>From nothing to the first answer: {text(cold.get('from_zero_seconds'))} s, of which unpacking "
        f"{text(cold.get('archive_mb'))} MB {text(cold.get('unpack_seconds'))} s, until the server is there "
        f"{text(cold.get('alive_seconds'))} s, until the engine is loaded {text(cold.get('ready_seconds'))} s. "
        f"{text(cold.get('method'))}</p>"
    )


def _beyond(point: Json) -> str:
    """What happens above the rate that is kept."""
    ended, waiting = part_of(point, "ended"), part_of(point, "waiting")
    lost = ", ".join(
        f"{text(ended[k])} {k.replace('_', ' ')}" for k in ("rejected", "timed_out", "failed") if ended.get(k)
    )
    grows = "the queue grows" if waiting.get("grows") else "the queue stays bounded"
    return (
        f"Beyond it, at {text(point.get('rate'))}/s, {grows} (up to {text(waiting.get('most'))} requests wait or run), "
        f"p99 is {text(point.get('p99_ms'))} ms and {text(point.get('answered_per_second'))}/s are answered"
        + (f"; of {text(point.get('requests'))} requests {lost}." if lost else ".")
    )


def _shown(side: Json) -> list[Json]:
    return [p for p in objects(side.get("curve")) if (as_number(p.get("requests")) or 0) >= _LEAST_REQUESTS]


def _asides(found: Json) -> str:
    generator, reasons = part_of(found, "generator"), part_of(found, "reasons")
    lines = []
    if generator:
        late = part_of(generator, "late").get("p99_ms")
        lines.append(
            f"The generator itself takes {generator.get('cpu_us_per_request')} µs of a core for a request, and was "
            f"{late} ms late in 1 of 100, measured against nothing that answers."
        )
    lines += [f"{name.replace('_', ' ')}: {why}" for name, why in reasons.items()]
    return bullets(lines)


def _picture(found: Json, limit: float | None) -> str:
    """p99 (full) and p50 (dashed) by rate."""
    sides = [
        (_points(part_of(found, side)), colour, name)
        for side, colour, name in (
            ("original", "var(--base)", "the original"),
            ("engine", "var(--good)", "the engine, batches as they form"),
            ("static", "currentColor", "the engine, static batches"),
        )
    ]
    if limit is None or not any(points for points, _, _ in sides):
        return ""
    most_rate = max(rate for points, _, _ in sides for rate, _, _ in points) * 1.05
    top = _MOST_LIMITS * limit

    def x(rate: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 10) * rate / most_rate

    def y(ms: float) -> float:
        return (_HEIGHT - _BOTTOM) * (1 - min(ms, top) / top) + 4

    marks = (
        f"<line x1={_LEFT} x2={_WIDTH} y1={y(limit):.1f} y2={y(limit):.1f} stroke='var(--bad)' stroke-dasharray='6 4'/>"
        f"<text x={_WIDTH - 210} y={y(limit) - 5:.1f}>the limit, {text(limit)} ms</text>"
        f"<line x1={_LEFT} x2={_WIDTH} y1={y(0):.1f} y2={y(0):.1f} stroke='currentColor'/>"
        f"<text x=0 y={y(top) + 10:.1f}>{text(top)} ms</text><text x=0 y={y(0):.1f}>0</text>"
        f"<text x={_WIDTH - 120} y={_HEIGHT - 4}>{text(most_rate)} requests/s</text>"
    )
    for number, (points, colour, name) in enumerate(sides):
        if not points:
            continue
        for which, dashes in ((2, ""), (1, " stroke-dasharray='2 4'")):
            path = _path([(x(p[0]), y(p[which] if p[which] is not None else top)) for p in points])
            marks += f"<polyline points='{path}' fill=none stroke='{colour}' stroke-width=2{dashes} />"
        for rate, p50, p99 in points:
            at = f"cx={x(rate):.1f} cy={y(p99 if p99 is not None else top):.1f}"
            said = f"{name} at {text(rate)} requests/s: p99 {text(p99)} ms, p50 {text(p50)} ms"
            marks += hint(said, f"<circle {at} r=4 fill='{colour}'/>")
        marks += f"<text x={_LEFT + 8} y={18 + 16 * number} fill='{colour}'>{text(name)}: p99, p50 dashed</text>"
    return svg(_HEIGHT, "latency against rate, with the limit", marks)


def _points(side: Json) -> list[tuple[float, Any, Any]]:
    """(rate, p50, p99) by rate; the runs of one rate as the last of them was. Those cut short say no latency, and those
    of a late generator or a busy machine not the engine's. A p99 that is missing is no answer."""
    found = {}
    for p in _shown(side):
        rate = as_number(p.get("rate"))
        many = (as_number(p.get("requests")) or 0) >= _DRAWN_REQUESTS
        if rate is not None and many and not p.get("cut") and p.get("verdict") not in ("generator_late", "disturbed"):
            found[rate] = (rate, as_number(p.get("p50_ms")), as_number(p.get("p99_ms")))
    return [found[rate] for rate in sorted(found)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
