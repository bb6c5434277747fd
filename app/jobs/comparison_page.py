"""The report of a job that compares targets, as a page."""

from __future__ import annotations

from app.figures import number
from app.jobs.page_parts import Json, as_number, interval_text, objects, part_of, section, svg, table, text

_HEAD = [
    "machine", "price per hour", "per million requests", "of the original", "requests/s within the limit",
    "machines for the rate", "together per hour", "first answer from nothing, s", "speed-up", "job", "",
]  # fmt: skip


def comparison_body(report: Json) -> str:
    """HTML of what stands below the title."""
    targets = objects(report.get("targets"))
    return "".join(
        [
            f"<p><b>{text(report.get('headline'))}</b></p>",
            _for_rate(report),
            section(f"Cost of a million requests within {report.get('limit')}", _bars(report, targets), 2),
            section("Targets", table(_HEAD, [_row(target) for target in targets]), 2),
        ]
    )


def _for_rate(report: Json) -> str:
    if report.get("cheapest_for_rate") is None:
        return ""
    rate, machine = text(report.get("rate_per_second")), text(report["cheapest_for_rate"])
    return f"<p class=sub>For the wanted {rate}/s, in whole machines, {machine} costs the least per hour.</p>"


def _row(target: Json) -> list[object]:
    shown = _cost(target.get("per_million_requests"), target.get("proven"))
    if shown is not None:
        shown += interval_text(target.get("per_million_requests_interval"))
    theirs = _cost(target.get("original_per_million_requests"), target.get("original_proven"))
    why = target.get("reason") or (
        "" if target.get("rank") == 1 or not target.get("cheapest_too") else "may be as cheap"
    )
    cold = part_of(target, "cold_start").get("from_zero_seconds")
    return [
        target.get("hardware"), target.get("price_per_hour"), shown, theirs, target.get("goodput"),
        target.get("machines"), target.get("per_hour"), cold, target.get("speedup"),
        f"{target.get('job_id')}, {target.get('status')}", why,
    ]  # fmt: skip


def _cost(value: object, proven: object) -> str | None:
    return None if value is None else f"{'' if proven else 'about '}{text(value)}"


def _bars(report: Json, targets: list[Json]) -> str:
    known = [(t, cost) for t in targets if (cost := as_number(t.get("per_million_requests"))) is not None]
    if not known:
        return ""
    most = max(cost for _, cost in known) or 1.0
    marks = "".join(
        f"<text x=0 y={26 * i + 17}>{text(str(t.get('hardware'))[:40])}</text>"
        f"<rect x=270 y={26 * i + 4} width={330 * cost / most:.1f} height=18 rx=3 "
        f"fill='{'var(--good)' if t.get('rank') == 1 else 'var(--bar)'}'/>"
        f"<text x={276 + 330 * cost / most:.1f} y={26 * i + 17}>{number(cost)} {text(report.get('currency'))}</text>"
        for i, (t, cost) in enumerate(known)
    )
    return svg(26 * len(known), "cost of a million requests by machine", marks)
