"""A job's traffic: what is refused at submission, what the report says, and the page."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from app.domain.spec import OptimizationSpec
from app.domain.traffic import Traffic, gaps, without_gaps
from app.errors import AppError
from app.jobs.traffic_admission import fit_traffic
from app.jobs.traffic_page import traffic as page
from workers.measure.load.patterns import Facts, patterns
from workers.pipeline.budget import Budget
from workers.pipeline.load import gain, headline, served, serving_of, traffic_report
from workers.pipeline.outcome import Explanation

SLO = {"p99_latency_ms": 20}
INPUTS = [{"name": "x", "dtype": "float32", "shape": ["batch", 3, "length"]}]
FIXED = [{"name": "x", "dtype": "float32", "shape": [4, 3, 8]}]


def refused(**told: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        OptimizationSpec.model_validate({"model_id": "m", "traffic": {"slo": SLO, **told}})
    return str(caught.value)


def spec(**told: Any) -> OptimizationSpec:
    shapes = told.pop("shapes", None)
    return OptimizationSpec.model_validate({"model_id": "m", "traffic": {"slo": SLO, **told}, "shapes": shapes})


# Bad input


def test_a_trace_out_of_order_names_the_arrival() -> None:
    trace = [0.1 * i for i in range(30)]
    trace[12] = 0.05
    assert "arrival 12 (0.05 s) comes before arrival 11" in refused(arrival="trace", trace=trace)


def test_a_trace_with_a_gap_is_refused_kept_or_closed() -> None:
    trace = [0.1 * i for i in range(30)] + [100 + 0.1 * i for i in range(30)]
    why = refused(arrival="trace", trace=trace)
    assert "a gap of 97.1 s before arrival 30" in why
    assert "trace_gaps keep" in why
    for told in ("keep", "close"):
        assert spec(arrival="trace", trace=trace, trace_gaps=told).traffic is not None
    closed = without_gaps(trace)
    assert closed[-1] == pytest.approx(5.9, rel=0.01)
    assert closed == sorted(closed)
    assert not [*gaps(closed)]


def test_a_trace_that_comes_in_bursts_has_no_gap() -> None:
    trace = [second + 0.001 * i for second in range(20) for i in range(5)]
    assert spec(arrival="trace", trace=trace).traffic is not None


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"batch_mix": {"1": 0.5, "4": 0.4}}, "shares sum to 0.9, not to 1"),
        ({"shape_mix": [{"dims": {"x": [1, 3, 8]}, "share": 0.5}]}, "shares sum to 0.5, not to 1"),
        ({"batch_mix": {"0": 1.0}}, "greater than or equal to 1"),
        ({"rate_per_second": 0}, "greater than 0"),
        ({"arrival": "trace"}, "give a trace with arrival trace"),
        ({"trace": [0.1 * i for i in range(30)]}, "give a trace with arrival trace"),
        ({"arrival": "trace", "trace": [5.0] * 30}, "has no duration"),
        ({"arrival": "trace", "trace": [0.0, 1.0]}, "at least 20 items"),
        ({"arrival": "trace", "trace": [float("nan")] * 30}, "finite number"),
        ({"slo": {"p99_latency_ms": 20, "timeout_ms": 10}}, "callers would leave before the limit"),
        ({"slo": {}}, "Field required"),
    ],
)
def test_what_says_no_traffic_is_refused(told: dict[str, Any], words: str) -> None:
    assert words in refused(**told)


def test_shares_are_meant_well() -> None:
    assert spec(batch_mix={"1": 0.33, "2": 0.33, "4": 0.34}).traffic is not None


def test_a_spec_comes_back_as_it_was_stored() -> None:
    told = spec(rate_per_second=5, batch_mix={"1": 0.5, "8": 0.5})
    assert OptimizationSpec.model_validate(told.model_dump(mode="json")) == told
    assert OptimizationSpec.model_validate({"model_id": "m"}).traffic is None


# Beside the model


@pytest.mark.parametrize(
    ("told", "inputs", "pointer", "words"),
    [
        ({"batch_mix": {"8": 1.0}}, FIXED, "/traffic/batch_mix/8", "takes batches of 4 only, not of 8"),
        (
            {"batch_mix": {"8": 1.0}, "shapes": {"x": {"min": [1, 3, 8], "opt": [2, 3, 8], "max": [4, 3, 16]}}},
            INPUTS,
            "/traffic/batch_mix/8",
            "takes batches of 1 to 4, not of 8",
        ),
        ({"shape_mix": [{"dims": {"y": [1, 3, 8]}, "share": 1}]}, INPUTS, "/traffic/shape_mix/0/dims", "is missing"),
        ({"shape_mix": [{"dims": {"x": [1, 3]}, "share": 1}]}, INPUTS, "/traffic/shape_mix/0/dims/x", "rank 2"),
        ({"shape_mix": [{"dims": {"x": [1, 4, 8]}, "share": 1}]}, INPUTS, "/traffic/shape_mix/0/dims/x", "fixed at 3"),
        (
            {
                "shape_mix": [{"dims": {"x": [1, 3, 64]}, "share": 1}],
                "shapes": {"x": {"min": [1, 3, 8], "opt": [2, 3, 8], "max": [4, 3, 16]}},
            },
            INPUTS,
            "/traffic/shape_mix/0/dims/x",
            "axis 2: 64 is outside of the wanted shapes (8 to 16)",
        ),
    ],
)
def test_traffic_that_the_model_does_not_take(
    told: dict[str, Any], inputs: list[dict[str, Any]], pointer: str, words: str
) -> None:
    with pytest.raises(AppError) as caught:
        fit_traffic(spec(**told), inputs)
    assert caught.value.code == "invalid_request"
    assert any(e.pointer == pointer and words in e.message for e in caught.value.errors), caught.value.errors


def test_batches_that_are_only_a_default_are_fitted() -> None:
    fitted = fit_traffic(spec(), FIXED)
    assert fitted.traffic is not None
    assert fitted.traffic.batch_mix == {4: 1.0}
    assert fit_traffic(spec(), INPUTS) == spec()
    assert fit_traffic(OptimizationSpec(model_id="m"), FIXED).traffic is None


# What is told


POINT = {
    "rate": 160.0,
    "verdict": "keeps",
    "proven": True,
    "requests": 650,
    "over": 1,
    "p50_ms": 6.1,
    "p99_ms": 15.5,
    "p99_bound_ms": 17.0,
    "queue_mean_ms": 1.5,
    "compute_mean_ms": 4.5,
    "batches": {"1": 0.6, "4": 0.4},
    "answered_per_second": 159.0,
    "cut": False,
    "ended": {"ok": 650, "rejected": 0, "timed_out": 0, "failed": 0},
    "waiting": {"mean": 1.0, "most": 4, "grows": False},
}
GOODPUT = {"rate": 163.2, "interval": [163.2, 171.0], "proven": True, "confirmed": True, "reason": None}
TRIED = {"yields_per_second": 200.0, "batch_ms": 4.0, "goodput_seen": 150.0, "decision": "the best"}
DATA: dict[str, Any] = {
    "traffic": {"rate_per_second": 400.0, "p99_limit_ms": 20.0, "arrivals": "a Poisson process"},
    "engine": {
        "setup": {"instances": 1, "threads": None, "max_batch": 8, "max_delay_ms": 0.0},
        "goodput": GOODPUT,
        "at_rate": None,
        "beyond": {**POINT, "rate": 212.0, "p99_ms": 200.0, "waiting": {"mean": 50.0, "most": 99, "grows": True}},
        "memory_mb": 100.0,
        "start_seconds": 0.5,
        "curve": [{**POINT, "rate": 80.0, "p99_ms": 9.0}, POINT, {**POINT, "rate": 175.0, "p99_ms": None}],
    },
    "original": {
        "setup": {"instances": 1, "threads": None, "max_batch": 1, "max_delay_ms": 0.0},
        "goodput": {**GOODPUT, "rate": 41.0, "interval": [41.0, 48.0]},
        "curve": [{**POINT, "rate": 41.0}],
    },
    "served": None,
    "original_served": None,
    "serving": {
        "settings": {"instances": 1, "max_batch": 8, "reason": None},
        "brought": [
            {
                "setting": "max_batch",
                "value": 8,
                "instead": 1,
                "goodput_with": 165.0,
                "goodput_without": 70.0,
                "ratio": 2.36,
            }
        ],
        "kept_start": None,
    },
    "tried": [
        {"instances": 1, "threads": None, "max_batch": 1, "max_delay_ms": 0.0, **TRIED},
        {"instances": 2, "threads": 1, "max_batch": 1, "max_delay_ms": 0.0, **TRIED, "yields_per_second": 90.0},
        {"instances": 1, "threads": None, "max_batch": 8, "max_delay_ms": 0.0, **TRIED, "yields_per_second": 500.0},
    ],
    "padding": {"sizes": {}, "refused": {"ids": "output mean changes when it is filled up <b>"}},
    "static": {
        "setup": {"instances": 1, "threads": None, "max_batch": 8, "max_delay_ms": 10.0},
        "goodput": {**GOODPUT, "rate": 120.0},
        "curve": [{**POINT, "rate": 100.0, "p99_ms": 14.0}, {**POINT, "rate": 120.0, "p99_ms": 19.0}],
    },
    "http": {"setup": {}, "goodput": {**GOODPUT, "rate": 150.0}, "alone_p50_ms": 3.5, "memory_mb": 140.0, "curve": []},
    "generator": {"cpu_us_per_request": 40.0, "late": {"p99_ms": 0.1}},
    "method": {"load": "open loop"},
    "conditions": {},
    "reasons": {},
}


def found(data: dict[str, Any] | None = DATA, reasons: dict[str, str] | None = None, **told: Any) -> Any:
    load = None if data is None else SimpleNamespace(data=data)
    export = SimpleNamespace(data={"inputs": [{"name": "x"}], "outputs": [{"name": "y"}]})
    explanation = Explanation(load=load, reasons=reasons or {})  # type: ignore[arg-type]
    return SimpleNamespace(
        spec=spec(**told),
        explanation=explanation,
        export=export,
        hardware={"memory_bytes": 16e9},
        case=SimpleNamespace(cores=2),
    )


def test_the_headline_of_a_report() -> None:
    report = traffic_report(found())
    assert report is not None
    assert report.headline == "at p99 ≤ 20 ms: 41/s → 163/s on this machine"
    assert report.gain == {"ratio": 3.98, "low": 3.4, "high": 4.171}
    assert (report.served, report.nearest_rate, report.machines) == (False, 163.2, 3)
    assert "the nearest rate that it serves is 163/s" in report.reasons["served"]


def test_headlines_of_what_is_not_known() -> None:
    unproven = {**GOODPUT, "proven": False}
    assert headline("l", GOODPUT, {}) == "at l: 163/s on this machine (the original was not measured)"
    assert headline("l", GOODPUT, {**GOODPUT, "rate": 0.0}) == "at l: none → 163/s on this machine"
    assert headline("l", GOODPUT, {**unproven, "rate": 4.0}) == "at l: about 4/s → 163/s on this machine"
    assert headline("l", {**GOODPUT, "rate": 0.0, "reason": "one caller alone waits 30 ms"}, {}).endswith("waits 30 ms")
    assert gain(GOODPUT, {}) is None
    endless = {**GOODPUT, "interval": [163.2, None]}
    assert gain(endless, GOODPUT) == {"ratio": None, "low": 0.954, "high": None}
    assert gain(endless, endless) is None
    assert gain(GOODPUT, {**unproven, "rate": 4.0}) is None
    assert headline("l", endless, {}).startswith("at l: at least 163/s")


def test_whether_the_wanted_rate_is_served() -> None:
    assert served(None, 100.0, GOODPUT) is True
    assert served(None, 166.0, GOODPUT) is None
    assert served(None, 180.0, GOODPUT) is False
    assert served(False, 100.0, GOODPUT) is False
    assert served(None, None, GOODPUT) is None
    unproven = {**GOODPUT, "proven": False}
    assert [served(None, wanted, unproven) for wanted in (100.0, 180.0)] == [None, None], (
        "so few requests prove nothing"
    )
    assert served(True, 100.0, unproven) is True, "proven at that very rate"
    nobody = {"rate": 0.0, "interval": [0.0, None], "proven": False}
    assert served(None, 1.0, nobody) is False, "one caller alone waits too long"
    assert served(None, 1.0, {**nobody, "interval": [0.0, 0.5]}) is None


def test_what_was_not_proven_counts_no_machines() -> None:
    data = copy.deepcopy(DATA)
    data["engine"]["goodput"]["proven"] = False
    report = traffic_report(found(data))
    assert report is not None
    assert (report.served, report.nearest_rate, report.machines) == (None, None, None)
    assert report.reasons["served"] == "400/s was not proven either way; what keeps 20 ms is about 163/s"


def test_traffic_that_was_not_measured_has_its_reason() -> None:
    report = traffic_report(found(None, {"traffic": "not measured: the engine takes no batch of 8"}))
    assert report is not None
    assert report.reasons == {"traffic": "not measured: the engine takes no batch of 8"}
    assert "takes no batch of 8" in report.headline
    none = found(None)
    none.spec = OptimizationSpec(model_id="m")
    assert traffic_report(none) is None


def test_the_tuned_settings_fill_the_deployment() -> None:
    told = serving_of(found().explanation)
    assert told is not None
    assert told["settings"]["max_batch"] == 8
    assert (told["goodput"], told["p99_limit_ms"]) == (163.2, 20.0)
    assert told["brought"][0]["setting"] == "max_batch"
    assert told["batches_formed"] == [], "nothing was seen at the very rate"
    at_rate = copy.deepcopy(DATA)
    at_rate["engine"]["curve"].append({**POINT, "rate": 163.2})
    assert (serving_of(found(at_rate).explanation) or {})["batches_formed"] == [1, 4]
    assert (told["goodput_proven"], told["goodput_over_http_proven"]) == (True, True)
    assert (told["memory_mb"], told["memory_of"]) == (140.0, "server"), "of the server that ships, not of its instances"
    within = serving_of(found({**DATA, "http": None}).explanation)
    assert within is not None
    assert (within["memory_mb"], within["memory_of"]) == (100.0, "instances")
    assert serving_of(found(None).explanation) is None


def test_ways_to_serve_follow_from_the_figures() -> None:
    rows = {row["pattern"]: row for row in patterns(DATA, Facts(16_000.0, 2, ["x", "y"]))}
    fits = {name: row["fits"] for name, row in rows.items()}
    assert fits == {
        "single instance, one by one": False,
        "several instances": False,
        "dynamic batching": True,
        "static batching": False,
        "ensemble": None,
        "model parallel": False,
        "continuous batching": False,
    }
    assert "2.36 × the rate without" in rows["dynamic batching"]["why"]
    assert "several yield 90/s at most, one yields 500/s" in rows["several instances"]["why"]
    assert "batches as they form 163.2/s" in rows["static batching"]["why"]
    for apart, words in ((True, "an ensemble of them"), (False, "one engine of the whole chain")):
        of_two = patterns(DATA, Facts(16_000.0, 2, ["x", "y"], models=2, apart=apart))
        (row,) = (row for row in of_two if row["pattern"] == "ensemble")
        assert (row["fits"], words in row["why"]) == (apart, True)
    generative = patterns(DATA, Facts(110.0, 2, ["ids", "past_key_values.0.key"]))
    assert [row["fits"] for row in generative if row["pattern"] in ("model parallel", "continuous batching")] == [
        True,
        True,
    ]


def test_the_page_shows_latency_against_rate_with_the_limit() -> None:
    report = traffic_report(found())
    assert report is not None
    shown = page(report.model_dump(mode="json"))
    for words in (
        "at p99 ≤ 20 ms: 41/s → 163/s on this machine",
        "The wanted 400/s is not served within the limit.",
        "It takes 3 machines like this one, each at 163.2/s.",
        "3.98 times the original's rate [3.4, 4.171].",
        "the limit, 20 ms",
        "By the bundle's serve.py over HTTP: 150/s; one caller alone waits 3.5 ms (p50).",
        "the queue grows",
        "Requests of unlike sizes share no batch: output mean changes when it is filled up &lt;b&gt;.",
        "<polyline",
        "batches that formed",
        "What each setting brought",
        "Ways to serve it",
        "the engine, static batches: p99, p50 dashed",
        "Points of the engine with static batches, of 8, waited for up to 10.0 ms (short looks)",
        "goodput 120, goodput dynamic 163.2",
        "yields with several 90, yields with one 500, instances 1",
        "takes 40.0 µs of a core for a request",
    ):
        assert words in shown, words
    assert shown.count("<polyline") == 6, "p50 and p99 of the original, of batches as they form, and of static ones"
    assert page({}) == ""


def test_a_page_of_hostile_values_is_escaped() -> None:
    data = copy.deepcopy(DATA)
    data["tried"][0]["decision"] = "<script>"
    data["reasons"] = {"<b>": "<i>"}
    report = traffic_report(found(data))
    assert report is not None
    shown = page(report.model_dump(mode="json"))
    assert "<script>" not in shown
    assert "<i>" not in shown
    assert "<b>:" not in shown


def test_time_is_kept_for_the_traffic_and_given_back() -> None:
    now = [0.0]
    budget = Budget(600.0, clock=lambda: now[0])
    before = budget.end
    budget.keep_for_traffic()
    assert budget.end == pytest.approx(before - 0.35 * 570)
    assert budget.search_until <= budget.end
    budget.give_back()
    assert budget.end == before
    small = Budget(20.0, clock=lambda: now[0])
    small.keep_for_traffic()
    assert small.kept == 0


def test_a_job_that_is_taken_up_late_keeps_nothing_for_traffic() -> None:
    """It would be over before it began: a worker killed in its last stage cost a job of 120 s with traffic."""
    budget = Budget(120, spent=96.0)
    budget.keep_for_traffic()
    assert budget.kept == 0
    assert not budget.over(budget.end)


def test_a_traffic_s_own_defaults() -> None:
    told = Traffic.model_validate({"slo": SLO})
    assert (told.arrival, told.batch_mix, told.shape_mix, told.trace_gaps) == ("poisson", {1: 1.0}, None, "refuse")
