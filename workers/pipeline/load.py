"""From what a job's traffic showed to the report and the deployment. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from app.domain.report import TrafficReport
from workers.measure.load.judged import KEEPS
from workers.measure.load.patterns import Facts, patterns
from workers.pipeline.cost import limit_cost
from workers.pipeline.outcome import Explanation, Optimization

_Json = Mapping[str, Any]
_COLD = (
    "starts", "alive_seconds", "ready_seconds", "first_answer_seconds", "slowest_seconds", "unpack_seconds",
    "from_zero_seconds", "archive_mb", "unpacked_mb", "method",
)  # fmt: skip


def serving_of(explanation: Explanation) -> dict[str, Any] | None:
    """What `deployment_config["serving"]` says; None where the traffic was not measured."""
    if explanation.load is None:
        return None
    data = explanation.load.data
    goodput, http = _goodput(data["engine"]), _goodput(data["http"])
    server_mb = (data["http"] or {}).get("memory_mb")
    return {
        "settings": data["serving"]["settings"],
        "goodput": goodput.get("rate"),
        "goodput_interval": goodput.get("interval"),
        "goodput_proven": bool(goodput.get("proven")),
        "goodput_over_http": http.get("rate"),
        "goodput_over_http_interval": http.get("interval"),
        "goodput_over_http_proven": bool(http.get("proven")),
        "batches_formed": _formed(data["engine"]),
        "p99_limit_ms": data["traffic"]["p99_limit_ms"],
        "memory_mb": data["engine"]["memory_mb"] if server_mb is None else server_mb,
        "memory_of": "instances" if server_mb is None else "server",
        "start_seconds": data["engine"]["start_seconds"],
        "brought": data["serving"]["brought"],
        "kept_start": data["serving"]["kept_start"],
    }


def _formed(side: _Json) -> list[int]:
    """Sizes of the batches that formed at the rate that is kept, where that was seen last."""
    rate = _goodput(side).get("rate")
    seen = [p for p in side["curve"] if p["rate"] == rate and p["verdict"] == KEEPS]
    return sorted(int(size) for size in (seen[-1].get("batches") or {})) if seen else []


def traffic_report(found: Optimization) -> TrafficReport | None:
    """None where the job tells no traffic."""
    traffic, load = found.spec.traffic, found.explanation.load
    if traffic is None:
        return None
    limit = f"p99 ≤ {traffic.slo.p99_latency_ms:g} ms"
    if load is None:
        why = found.explanation.reasons.get("traffic", "not measured")
        cost = limit_cost(found.spec.cost, limit, None, None, why)
        return TrafficReport(
            headline=f"at {limit}: {why}",
            cost=cost,
            cold_start=_cold(found),
            reasons={"traffic": why, **_cold_reason(found)},
        )
    data = load.data
    ours, theirs = _goodput(data["engine"]), _goodput(data["original"])
    wanted = data["traffic"]["rate_per_second"]
    rate = (ours.get("rate") or 0.0) if ours.get("proven") else 0.0
    return TrafficReport(
        headline=headline(limit, ours, theirs),
        traffic=data["traffic"],
        engine=data["engine"],
        original=data["original"],
        gain=gain(ours, theirs),
        served=served(data["served"], wanted, ours),
        nearest_rate=rate or None,
        machines=math.ceil(wanted / rate) if wanted and rate else None,
        cost=limit_cost(found.spec.cost, limit, data, wanted, "not measured"),
        cold_start=_cold(found),
        tried=data["tried"],
        brought=data["serving"]["brought"],
        padding=data["padding"],
        static=data["static"],
        http=data["http"],
        patterns=patterns(data, _facts(found)),
        generator=data["generator"],
        method=data["method"],
        conditions=data["conditions"],
        reasons={**_reasons(data, wanted, ours), **_cold_reason(found)},
    )


def _cold(found: Optimization) -> dict[str, Any] | None:
    return None if found.explanation.cold is None else {k: found.explanation.cold.data[k] for k in _COLD}


def _cold_reason(found: Optimization) -> dict[str, str]:
    why = found.explanation.reasons.get("cold_start")
    return {} if why is None else {"cold_start": why}


def headline(limit: str, ours: _Json, theirs: _Json) -> str:
    """ "at p99 ≤ 20 ms: 41/s → 163/s on this machine". What was not proven, and what has no known end, says so."""
    if not ours.get("rate"):
        return f"at {limit}: {ours.get('reason') or 'no rate keeps it'}"
    now = f"{_shown(ours)} on this machine"
    if theirs.get("rate") is None:
        return f"at {limit}: {now} (the original was not measured)"
    if not theirs["rate"]:
        return f"at {limit}: none → {now}"
    return f"at {limit}: {_shown(theirs)} → {now}"


def gain(ours: _Json, theirs: _Json) -> dict[str, float | None] | None:
    """Of the highest rates within the limit; both intervals at their worst and best. None where either is not proven;
    of a rate that was not seen to end there is no ratio, only the end that is known."""
    if not (ours.get("rate") and theirs.get("rate") and ours.get("proven") and theirs.get("proven")):
        return None
    (low, high), (least, most) = ours["interval"], theirs["interval"]
    if high is None and most is None:
        return None
    return {
        "ratio": None if high is None or most is None else round(ours["rate"] / theirs["rate"], 3),
        "low": None if most is None else round(low / most, 3),
        "high": None if high is None else round(high / least, 3),
    }


def served(proven: bool | None, wanted: float | None, ours: _Json) -> bool | None:
    """Whether the wanted rate is served within the limit: as measured there, else by the interval where that is proven.
    None is where one caller alone waits too long."""
    if proven is not None or wanted is None or ours.get("rate") is None:
        return proven
    high = (ours.get("interval") or [None, None])[1]
    if not ours.get("proven"):
        return False if ours["rate"] == 0 and high is None else None
    if ours["rate"] >= wanted:
        return True
    return False if high is not None and wanted >= high else None


def _reasons(data: _Json, wanted: float | None, ours: _Json) -> dict[str, str]:
    reasons = dict(data["reasons"])
    if ours.get("reason"):
        reasons["goodput"] = str(ours["reason"])
    if wanted is None:
        return reasons
    answer, limit = served(data["served"], wanted, ours), data["traffic"]["p99_limit_ms"]
    if answer is False:
        reasons["served"] = f"{wanted:g}/s is more than this machine serves within {limit:g} ms"
        if ours.get("rate"):
            reasons["served"] += f"; the nearest rate that it serves is {_shown(ours)}"
    elif answer is None and ours.get("rate"):
        reasons["served"] = f"{wanted:g}/s was not proven either way; what keeps {limit:g} ms is {_shown(ours)}"
    return reasons


def _facts(found: Optimization) -> Facts:
    names = [t["name"] for side in ("inputs", "outputs") for t in found.export.data[side]]
    chain = found.spec.chain
    return Facts(
        memory_mb=_mb(found.hardware.get("memory_bytes")),
        cores=found.case.cores,
        tensors=names,
        models=1 + len(found.spec.links),
        apart=chain is not None and chain.apart and found.picked is not None,
    )


def _goodput(side: _Json | None) -> _Json:
    return (side or {}).get("goodput") or {}


def _shown(goodput: _Json) -> str:
    """What was seen and not proven is "about"; what was not seen to exceed the limit anywhere is "at least"."""
    rate = goodput["rate"]
    known = f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
    told = [*(["at least"] if goodput["interval"][1] is None else []), *([] if goodput.get("proven") else ["about"])]
    return " ".join([*told, known])


def _mb(size: Any) -> float | None:
    return float(size) / 1e6 if isinstance(size, int | float) else None
