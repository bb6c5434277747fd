"""What serving within the job's limit costs on this machine. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from app.domain.report import LimitCost
from app.domain.spec import Cost

_Json = Mapping[str, Any]


def limit_cost(
    cost: Cost | None, limit: str, data: _Json | None, wanted: float | None, missing: str
) -> LimitCost | None:
    """None where the job tells no price. `data`: of the stage `load_test`; None where there is none, and `missing` says
    why: then no cost is claimed, whatever other throughput is known: it would be that of another latency."""
    if cost is None:
        return None
    told = LimitCost(limit=limit, price_per_hour=cost.price_per_hour, currency=cost.currency)
    if data is None:
        told.reason = missing
        return told
    ours, theirs = _goodput(data["engine"]), _goodput(data["original"])
    rate = ours.get("rate")
    if not rate:
        told.reason = str(ours.get("reason") or "no rate keeps the limit")
        return told
    samples = float(data["traffic"].get("samples_per_request") or 1.0)
    low, high = ours["interval"]
    told.goodput, told.proven, told.samples_per_request = rate, bool(ours.get("proven")), samples
    told.per_million_requests = _per_million(cost, rate)
    told.per_million_requests_interval = [_per_million(cost, high), _per_million(cost, low)]
    told.per_million_samples = _per_million(cost, rate * samples)
    told.per_million_samples_interval = [
        _per_million(cost, None if high is None else high * samples),
        told.per_million_samples,
    ]
    told.original_per_million_requests = _per_million(cost, theirs.get("rate"))
    if told.original_per_million_requests is not None:
        told.original_proven = bool(theirs.get("proven"))
    if wanted is not None:
        told.machines = math.ceil(wanted / rate)
        told.per_hour = _shown(told.machines * cost.price_per_hour)
    return told


def _per_million(cost: Cost, rate: float | None) -> float | None:
    return None if not rate else _shown(cost.price_per_hour / (rate * 3600.0) * 1e6)


def _shown(value: float) -> float:
    return float(f"{value:.6g}")


def _goodput(side: _Json | None) -> _Json:
    return (side or {}).get("goodput") or {}
