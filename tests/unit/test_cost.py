"""What serving costs within a job's limit, on one machine and on several: what is refused, what is told, the pages."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from app.db.orm import Job, Worker
from app.domain.job_state import Trigger
from app.domain.spec import Cost, OptimizationSpec
from app.errors import AppError
from app.jobs.comparison import compare
from app.jobs.family import Child, fate, progress_of, stages_of
from app.jobs.report_page import comparison_page
from app.jobs.target_admission import per_target
from app.jobs.traffic_page import traffic as page
from workers.pipeline.cost import limit_cost

LIMIT = "p99 ≤ 20 ms"
PRICE = Cost(price_per_hour=0.36, currency="EUR")
TRAFFIC = {"slo": {"p99_latency_ms": 20}}


def _data(rate: float, high: float | None, *, samples: float = 1.0, **goodput: Any) -> dict[str, Any]:
    told = {"rate": rate, "interval": [rate, high], "proven": True, "reason": None, **goodput}
    return {
        "traffic": {"samples_per_request": samples},
        "engine": {"goodput": told},
        "original": {"goodput": {**told, "rate": 25.0}},
    }


# One machine


def test_the_cost_is_that_of_the_highest_rate_within_the_limit() -> None:
    cost = limit_cost(PRICE, LIMIT, _data(100.0, 125.0), 250.0, "")
    assert cost is not None
    assert (cost.per_million_requests, cost.currency, cost.proven) == (1.0, "EUR", True)
    assert cost.per_million_requests_interval == [0.8, 1.0]
    assert cost.per_million_samples == 1.0
    assert cost.original_per_million_requests == 4.0
    assert (cost.machines, cost.per_hour) == (3, 1.08)


def test_requests_of_several_samples_have_two_costs() -> None:
    cost = limit_cost(PRICE, LIMIT, _data(100.0, None, samples=4.0), None, "")
    assert cost is not None
    assert (cost.per_million_requests, cost.per_million_samples) == (1.0, 0.25)
    assert cost.per_million_requests_interval == [None, 1.0]
    assert cost.per_million_samples_interval == [None, 0.25]
    assert cost.machines is None


def test_no_cost_is_claimed_where_no_rate_is_known() -> None:
    assert limit_cost(None, LIMIT, _data(100.0, 125.0), None, "") is None
    for data, why in ((None, "no time"), (_data(0.0, 5.0, reason="one caller alone waits 30 ms"), "waits 30 ms")):
        cost = limit_cost(PRICE, LIMIT, data, 250.0, "no time")
        assert cost is not None
        assert cost.per_million_requests is None
        assert why in (cost.reason or "")
    shown = page({"cost": cost.model_dump()})
    assert "no cost is claimed within p99 ≤ 20 ms: one caller alone waits 30 ms" in shown


def test_the_page_tells_cost_and_cold_start() -> None:
    cost = limit_cost(PRICE, LIMIT, _data(100.0, 125.0, samples=4.0, proven=False), 250.0, "")
    assert cost is not None
    cold = {"from_zero_seconds": 1.5, "unpack_seconds": 0.1, "archive_mb": 7, "alive_seconds": 0.3, "ready_seconds": 1}
    shown = page({"cost": cost.model_dump(), "cold_start": cold})
    assert "cost about <b>1 EUR</b> [0.8, 1], of the original about 4; a million samples, 4 in a request, 0.25" in shown
    assert "the wanted rate takes about 3 machines, 1.08 per hour" in shown
    assert "From nothing to the first answer: 1.5 s" in shown


# What names several


def _targets(*told: Any, **spec: Any) -> OptimizationSpec:
    return OptimizationSpec.model_validate({"model_id": "m", "traffic": TRAFFIC, "targets": list(told), **spec})


def _priced(hardware: str, price: float = 1.0, **told: Any) -> dict[str, Any]:
    return {"hardware": hardware, "price_per_hour": price, **told}


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([], "at least 1 item"),
        ([_priced(f"m{i}") for i in range(9)], "at most 8 items"),
        ([_priced("a"), _priced("b"), _priced("a", 2)], "names 'a' twice"),
        ([_priced("a", 0)], "greater than 0"),
        ([_priced("a", -1)], "greater than 0"),
        ([_priced("a", float("nan"))], "finite number"),
        ([_priced("a", float("inf"))], "finite number"),
        ([_priced("a", currency="EUR"), _priced("b")], "prices in EUR and USD"),
        ([_priced("a", currency="euro")], "String should match"),
        ([_priced("")], "at least 1 character"),
        ([{"hardware": "a"}], "Field required"),
    ],
)
def test_targets_that_cannot_be_compared_are_refused(targets: list[Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        _targets(*targets)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"traffic": None}, "give traffic, with its slo"),
        ({"cost": {"price_per_hour": 1}}, "either cost or targets"),
        ({"target": {"hardware": "a"}}, "either one target's hardware or targets"),
        ({"target": {"compute_capability": "8.9"}}, "either one target's hardware or targets"),
    ],
)
def test_what_contradicts_several_targets_is_refused(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        _targets(_priced("a"), **spec)


def _worker(hardware: str, capability: str | None = None, precisions: tuple[str, ...] = ("fp32",)) -> Worker:
    device = "cpu" if capability is None else "cuda"
    told = {"id": hardware, "gpu": None if capability is None else {"compute_capability": capability}}
    backend = {"name": f"ort-{device}", "devices": [device], "precisions": list(precisions)}
    seen = datetime(2026, 11, 29, tzinfo=UTC)
    queue = f"anneal.hw.{hardware}"
    return Worker(id=hardware, hardware=told, backends=[backend], formats=["onnx"], queues=[queue], last_seen_at=seen)


LIVE = [_worker("cpu-a"), _worker("cpu-b"), _worker("gpu-l4", "8.9"), _worker("gpu-h100", "9.0", ("fp32", "fp8"))]


def test_each_target_gets_a_job_with_its_own_price() -> None:
    spec = _targets(
        _priced("cpu-a", 0.1), _priced("8.9", 0.7), _priced("gpu-h100", 3), webhook={"url": "http://x.example/h"}
    )
    children = per_target(spec, "onnx", LIVE)
    assert [c.target.hardware for c, _ in children] == ["cpu-a", "gpu-l4", "gpu-h100"]
    assert [c.cost.price_per_hour for c, _ in children if c.cost] == [0.1, 0.7, 3]
    assert [q.name for _, q in children] == ["anneal.hw.cpu-a", "anneal.hw.gpu-l4", "anneal.hw.gpu-h100"]
    assert all(c.targets is None and c.webhook is None and c.traffic == spec.traffic for c, _ in children)
    assert all(OptimizationSpec.model_validate(c.model_dump(mode="json")) == c for c, _ in children)


@pytest.mark.parametrize(
    ("targets", "spec", "pointer", "words"),
    [
        ([_priced("cpu-a"), _priced("cpu-z")], {}, "/targets/1/hardware", "no worker with hardware 'cpu-z' is live"),
        ([_priced("cpu")], {}, "/targets/0/hardware", "several machines, 'cpu-a', 'cpu-b': name one"),
        ([_priced("gpu-l4"), _priced("8.9")], {}, "/targets/1/hardware", "stands there already"),
        ([_priced("7.5")], {}, "/targets/0/hardware", "no worker with hardware '7.5' is live"),
        (
            [_priced("gpu-h100"), _priced("gpu-l4")],
            {"precisions": ["fp8"]},
            "/targets/1/hardware",
            "gpu-l4: No worker can do what the job asks: .*'fp8'",
        ),
    ],
)
def test_targets_without_a_live_worker_are_refused(
    targets: list[Any], spec: dict[str, Any], pointer: str, words: str
) -> None:
    with pytest.raises(AppError, match=words) as caught:
        per_target(_targets(*targets, **spec), "onnx", LIVE)
    assert (caught.value.code, caught.value.status) == ("unavailable_target", 422)
    assert [error.pointer for error in caught.value.errors] == [pointer]
    assert caught.value.extra["offered"]["hardware"]
    assert all(hardware in caught.value.detail for hardware in caught.value.extra["offered"]["hardware"])


# What becomes of it


def _child(status: str, *engines: str, error: dict[str, Any] | None = None) -> Child:
    return Child(f"job_{status}", status, "cpu-a", engines, error, None, None)


@pytest.mark.parametrize(
    ("statuses", "cancelled", "trigger"),
    [
        (["succeeded", "running"], False, None),
        (["queued", "queued"], True, None),
        (["succeeded", "succeeded"], False, Trigger.COMPLETE),
        (["failed", "succeeded"], False, Trigger.COMPLETE),
        (["cancelled", "succeeded"], False, Trigger.COMPLETE),
        (["cancelled", "succeeded"], True, Trigger.CANCEL),
        (["succeeded", "succeeded"], True, Trigger.COMPLETE),
        (["cancelled", "cancelled"], False, Trigger.CANCEL),
        (["failed", "failed"], False, Trigger.FAIL),
        (["failed", "cancelled"], False, Trigger.FAIL),
    ],
)
def test_what_becomes_of_a_job_by_those_of_its_targets(
    statuses: list[str], cancelled: bool, trigger: Trigger | None
) -> None:
    children = [_child(s, "eng_1", error={"code": "x", "detail": "why"} if s == "failed" else None) for s in statuses]
    end = fate(children, cancel_requested=cancelled)
    assert (end and end[0]) == trigger
    assert [s["status"] for s in stages_of(children)] == statuses
    assert progress_of(children) == sum(s not in ("queued", "running") for s in statuses) / len(statuses)
    if trigger is Trigger.FAIL:
        assert end is not None
        assert end[1]["error"]["code"] == "no_target_succeeded"
        assert "cpu-a: failed, why" in end[1]["error"]["detail"]


# The comparison


def _job(job_id: str, status: str, spec: OptimizationSpec, error: Any = None) -> Job:
    return Job(id=job_id, status=status, spec=spec.model_dump(mode="json"), error=error, engine_ids=[f"eng_{job_id}"])


def _compared(*rates: tuple[float, float | None] | None, price: tuple[float, ...] = (0.36, 0.72), **told: Any) -> Any:
    spec = _targets(*(_priced(f"m{i}", p) for i, p in enumerate(price)), traffic={**TRAFFIC, **told})
    children, reports = [], {}
    for i, rate in enumerate(rates):
        own = spec.model_copy(update={"target": spec.target.model_copy(update={"hardware": f"m{i}"})})
        cost = Cost(price_per_hour=price[i])
        own = own.model_copy(update={"cost": cost, "targets": None})
        error = {"detail": "its worker was lost"} if rate is None else None
        children.append(_job(str(i), "succeeded" if rate else "failed", own, error))
        if rate is not None:
            data = _data(*rate)
            found = limit_cost(cost, LIMIT, data, told.get("rate_per_second"), "")
            assert found is not None
            traffic = {"cost": found.model_dump(), "engine": data["engine"], "cold_start": {"from_zero_seconds": 1.25}}
            reports[str(i)] = {"traffic": traffic, "final_metrics": {"speedup": "2.0x"}}
    return compare(_job("p", "succeeded", spec), children, reports)


def test_the_cheapest_is_named_where_it_can_be_told() -> None:
    found = _compared((100.0, 104.0), (500.0, 520.0), rate_per_second=450.0)
    assert (found.cheapest, found.told_apart) == ("m1", True)
    assert [t.hardware for t in found.targets] == ["m1", "m0"]
    assert [t.per_million_requests for t in found.targets] == [0.4, 1.0]
    assert found.cheapest_for_rate == "m1"
    assert found.headline == "at p99 ≤ 20 ms: m1 is the cheapest (USD per million requests: m1 0.4, m0 1)"
    # In whole machines, another one can cost less than the one with the lowest cost per request.
    assert _compared((100.0, 104.0), (500.0, 520.0), rate_per_second=90.0).cheapest_for_rate == "m0"


@pytest.mark.parametrize("other", [(190.0, 210.0), (150.0, None)])
def test_costs_that_cannot_be_told_apart_are_called_so(other: tuple[float, float | None]) -> None:
    found = _compared((100.0, 104.0), other)
    assert (found.cheapest, found.told_apart) == ("m0", False)
    assert "m0 looks the cheapest, and cannot be told from m1" in found.headline


def test_a_target_without_a_cost_keeps_its_reason() -> None:
    found = _compared((100.0, 104.0), None)
    assert (found.cheapest, found.told_apart, found.missing) == ("m0", None, ["m1"])
    assert found.targets[1].reason == "its worker was lost"
    assert found.targets[1].rank is None
    assert found.headline.endswith("m0 is the only one with a known cost (USD per million requests: m0 1); "
                                   "no cost is known on m1")  # fmt: skip
    none = _compared(None, None)
    assert none.cheapest is None
    assert "no cost is known on any target (m0: its worker was lost)" in none.headline


def test_the_page_of_a_comparison_is_escaped_and_complete() -> None:
    found = _compared((100.0, 104.0), (190.0, 210.0), None, price=(0.36, 0.72, 1.0), rate_per_second=90.0)
    report = found.model_dump(mode="json")
    report["targets"][2]["reason"] = "<script>alert(1)</script>"
    shown = comparison_page(report, "job_1")
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    for told in ("m0 looks the cheapest", "1 [0.9615, 1]", "may be as cheap", "in whole machines", "1.25"):
        assert told in shown, told
    assert comparison_page({}, "job_1").startswith("<!doctype html>")
