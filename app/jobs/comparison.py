"""Compares what a job's traffic costs on its targets: made of the reports of their jobs whenever it is asked for, so
that it holds nothing that they do not. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.db.orm import Job
from app.domain.comparison import ComparedTarget, Comparison
from app.domain.job_state import JobStatus
from app.jobs.page_parts import part_of

Json = Mapping[str, Any]
_NO_REPORT = "its job has no report"


def compare(parent: Job, children: Sequence[Job], reports: Mapping[str, Json]) -> Comparison:
    """`reports`: of those children that have one, by their job's id."""
    traffic = parent.spec["traffic"]
    found = [_target(child, reports.get(child.id)) for child in children]
    known = sorted((t for t in found if t.per_million_requests is not None), key=_cost)
    for rank, target in enumerate(known, 1):
        target.rank, target.cheapest_too = rank, rank == 1 or _meets(known[0], target)
    unknown = [t for t in found if t.per_million_requests is None]
    wanted, limit = traffic.get("rate_per_second"), f"p99 ≤ {traffic['slo']['p99_latency_ms']:g} ms"
    currency = str(parent.spec["targets"][0]["currency"])
    priced = [t for t in known if t.per_hour is not None]
    return Comparison(
        job_id=parent.id,
        status=parent.status,
        headline=f"at {limit}: {_headline(known, unknown, currency)}",
        limit=limit,
        currency=currency,
        rate_per_second=wanted,
        cheapest=known[0].hardware if known else None,
        told_apart=not any(t.cheapest_too for t in known[1:]) if len(known) > 1 else None,
        cheapest_for_rate=min(priced, key=lambda t: t.per_hour or 0.0).hardware if priced else None,
        missing=[t.hardware for t in unknown],
        targets=[*known, *unknown],
    )


def _target(child: Job, report: Json | None) -> ComparedTarget:
    spec = child.spec
    told = ComparedTarget(
        hardware=str(spec["target"]["hardware"]),
        job_id=child.id,
        status=child.status,
        price_per_hour=spec["cost"]["price_per_hour"],
        engine_ids=list(child.engine_ids),
    )
    if report is None:
        told.reason = _why(child)
        return told
    traffic = part_of(report, "traffic")
    cost, engine = part_of(traffic, "cost"), part_of(traffic, "engine")
    for name in (
        "per_million_requests",
        "per_million_requests_interval",
        "per_million_samples",
        "original_per_million_requests",
        "original_proven",
        "goodput",
        "proven",
        "machines",
        "per_hour",
    ):
        setattr(told, name, cost.get(name))
    told.goodput_interval = part_of(engine, "goodput").get("interval")
    told.cold_start = traffic.get("cold_start")
    told.speedup = part_of(report, "final_metrics").get("speedup")
    if told.per_million_requests is None:
        told.reason = cost.get("reason") or _why(child)
    return told


def _why(child: Job) -> str:
    if child.status == JobStatus.FAILED:
        return str((child.error or {}).get("detail") or "its job failed")
    return _NO_REPORT if child.status == JobStatus.SUCCEEDED else f"its job is {child.status}"


def _cost(target: ComparedTarget) -> float:
    return target.per_million_requests or 0.0


def _meets(cheapest: ComparedTarget, other: ComparedTarget) -> bool:
    """Whether the other's cost may be as low: its rate was not seen to end, or the intervals meet, or one of the two
    rates is not proven to keep the limit."""
    low = (other.per_million_requests_interval or [None])[0]
    return low is None or low <= _cost(cheapest) or not (cheapest.proven and other.proven)


def _headline(known: Sequence[ComparedTarget], unknown: Sequence[ComparedTarget], currency: str) -> str:
    if not known:
        return (
            f"no cost is known on any target ({unknown[0].hardware}: {unknown[0].reason})" if unknown else "no target"
        )
    costs = ", ".join(f"{t.hardware} {'' if t.proven else 'about '}{t.per_million_requests:.4g}" for t in known)
    alike = [t.hardware for t in known[1:] if t.cheapest_too]
    if len(known) == 1:
        claim = f"{known[0].hardware} is the only one with a known cost"
    elif alike:
        claim = f"{known[0].hardware} looks the cheapest, and cannot be told from {', '.join(alike)}"
    else:
        claim = f"{known[0].hardware} is the cheapest"
    missing = f"; no cost is known on {', '.join(t.hardware for t in unknown)}" if unknown else ""
    return f"{claim} ({currency} per million requests: {costs}){missing}"
