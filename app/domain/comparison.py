"""The report of a job that compares targets: what its traffic costs on each, by the reports of their jobs."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    # What is made here has no other fields; whoever reads a report is told that a later version may.
    model_config = ConfigDict(extra="forbid", json_schema_extra={"additionalProperties": True})


class ComparedTarget(_Part):
    """One machine. `goodput`: requests per second within the limit, `goodput_interval` [kept, seen to exceed it].
    `per_million_requests` and its interval: as `traffic.cost` of its job's report has them. `rank`: 1 is the cheapest,
    None where no cost is known, and `reason` says why. `cheapest_too`: its cost cannot be told from the lowest.
    `cold_start`: from nothing to the first answer, as its report's `traffic.cold_start`."""

    hardware: str
    job_id: str
    status: str
    price_per_hour: float
    rank: int | None = None
    per_million_requests: float | None = None
    per_million_requests_interval: list[float | None] | None = None
    per_million_samples: float | None = None
    original_per_million_requests: float | None = None
    original_proven: bool | None = None
    goodput: float | None = None
    goodput_interval: list[float | None] | None = None
    proven: bool | None = None
    cheapest_too: bool | None = None
    machines: int | None = None
    per_hour: float | None = None
    cold_start: dict[str, Any] | None = None
    speedup: str | None = None
    engine_ids: list[str] = []
    reason: str | None = None


class Comparison(_Part):
    """`cheapest`: hardware of the lowest cost per million requests within the limit; None where no cost is known.
    `told_apart`: whether every other known cost's interval lies above it; None where there is no other.
    `cheapest_for_rate`: hardware that serves the wanted rate for the least per hour, in whole machines; None where no
    rate is wanted. `missing`: targets without a cost. `targets`: the cheapest first, in the job's order where there is
    no cost."""

    job_id: str
    status: str
    headline: str
    limit: str
    currency: str
    rate_per_second: float | None = None
    cheapest: str | None = None
    told_apart: bool | None = None
    cheapest_for_rate: str | None = None
    missing: list[str] = []
    targets: list[ComparedTarget]
