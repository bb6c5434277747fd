"""The order of the search and its reasons, over scripted measurements: what each candidate would show is a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from app.domain.failures import FailureKind, StageFailure
from tests.factories.search_elsewhere import another_process
from tests.factories.search_script import Clock, Script, Truth
from tests.factories.search_script import candidate as _candidate
from tests.factories.search_script import case as _case
from workers import recipes
from workers.backends.onnxruntime import OnnxRuntimeBackend
from workers.candidates import Candidate, Case, Step
from workers.pipeline.budget import Budget
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.planner import Plan, planned
from workers.search import requantized
from workers.search.calls import Call, Elsewhere, execute
from workers.search.desk import Desk
from workers.search.driver import Found, Search
from workers.search.mending import sensitivity_samples
from workers.search.recording import Recorder, Recording


@pytest.fixture
def search() -> Callable[..., tuple[Found, Script]]:
    def run(truths: dict[str, Truth], *, case: Case | None = None, **script: Any) -> tuple[Found, Script]:
        driven = {k: script.pop(k) for k in ("answer", "recorder") if k in script}
        case = case or _case()
        clock = Clock()
        budget = Budget(float(case.spec.budget_seconds), clock)
        budget.share(30.0, 0)
        evaluator = Script(truths, clock, **script)
        tops = [cid for cid in truths if "." not in cid]
        plan = Plan(tuple(_candidate(c, lossless="fp32" in c, int8="int8" in c) for c in tops), ())
        backends: Any = {"onnxruntime": OnnxRuntimeBackend()}
        found = Search(case, plan, backends, evaluator, budget, **driven).run()  # type: ignore[arg-type]
        evaluator.searched_until = budget.search_until
        return found, evaluator

    return run


def _reason(found: Found, cid: str) -> str:
    return next(r.tried.failed or "" for r in found.runs if r.plan.id == cid)


def _finalists(found: Found) -> list[str]:
    return [r.plan.id for r in found.finalists]


def test_the_fast_and_accurate_goes_on_and_the_slow_is_never_checked(search: Any) -> None:
    found, script = search({"fp32": Truth(1.1), "int8-good": Truth(3.0, loss=0.2), "slow-bf16": Truth(1.2)})
    assert _finalists(found)[0].startswith("int8-good")
    assert script.asked("check") == ["int8-good"]
    assert "cannot reach int8-good" in _reason(found, "slow-bf16")
    assert "cannot reach int8-good" in _reason(found, "fp32")


def test_a_limit_that_every_median_misses_ends_the_search_at_once(search: Any) -> None:
    case = _case(constraints={"p99_latency_ms": 5.0})
    found, script = search({"fp32": Truth(1.1), "int8-good": Truth(2.0)}, case=case, call_ms=20.0)
    assert found.out_of_reach
    assert not found.finalists
    assert not script.asked("check")
    assert "already over the p99 limit" in _reason(found, "int8-good")
    near, _ = search({"int8-good": Truth(3.5)}, case=case, call_ms=20.0)
    assert not near.out_of_reach, "5.7 ms, and other runtime options may bring what is missing"
    original, _ = search({"int8-good": Truth(0.5)}, case=_case(constraints={"p99_latency_ms": 25.0}), call_ms=20.0)
    assert not original.out_of_reach, "the original itself keeps it"


def test_an_engine_over_the_size_limit_is_not_measured(search: Any) -> None:
    case = _case(constraints={"max_size_mb": 0.0009})
    found, script = search({"fp32": Truth(1.1), "int8-good": Truth(2.0, size_bytes=500)}, case=case)
    assert "over the limit" in _reason(found, "fp32")
    assert script.asked("time")[0] == "int8-good"
    assert _finalists(found)[0].startswith("int8-good")
    none, script = search({"fp32": Truth(1.1), "int8-good": Truth(2.0, size_bytes=950)}, case=case)
    assert none.out_of_reach
    assert not script.asked("time")


def test_a_slower_but_smaller_engine_stays_where_size_is_asked_for(search: Any) -> None:
    truths = {"int8-small": Truth(1.2, at_8=0.8, size_bytes=500)}
    found, _ = search(truths)
    assert "slower at batch size 8" in _reason(found, "int8-small")
    found, _ = search(truths, case=_case(constraints={"max_size_mb": 0.0009}))
    assert any(f.startswith("int8-small") for f in _finalists(found))


def test_runtime_options_are_tried_for_the_leaders_on_the_same_accuracy(search: Any) -> None:
    found, script = search({"fp32": Truth(2.0), "fp32.t1": Truth(2.6), "fp32.nospin": Truth(1.9)})
    assert _finalists(found) == ["fp32.t1"]
    assert script.asked("check") == ["fp32"]
    assert "not tried" in _reason(found, "fp32.nospin"), "it seldom wins on cores of one's own"
    variant = next(r for r in found.runs if r.plan.id == "fp32.t1")
    assert variant.tried.accuracy is not None


def test_what_calibrates_is_built_last(search: Any) -> None:
    _, script = search({"int8-good": Truth(3.0, loss=0.2), "fp32": Truth(1.1)})
    assert script.asked("make")[:2] == ["fp32", "int8-good"]


def test_calibration_is_not_begun_where_it_would_leave_no_time_to_measure(search: Any) -> None:
    truths = {"int8-good": Truth(3.0, cost_s=10.0), "fp32": Truth(1.5, cost_s=5.0), "odd-bf16": Truth(1.4, cost_s=5.0)}
    found, script = search(truths, case=_case(budget_seconds=60))
    assert script.asked("make")[:2] == ["fp32", "odd-bf16"]
    assert "left no time" in _reason(found, "int8-good")
    assert _finalists(found)[0].startswith("fp32")


@pytest.mark.parametrize(("cost_s", "first"), [(0.0, "int8-good"), (20.0, "fp32")])
def test_where_time_is_short_something_safe_is_checked_first(search: Any, cost_s: float, first: str) -> None:
    truths = {"int8-good": Truth(3.0, loss=0.2, cost_s=cost_s), "fp32": Truth(1.1, cost_s=cost_s)}
    _, script = search(truths, case=_case(budget_seconds=60))
    assert script.asked("check")[0] == first


def test_a_graph_that_could_not_be_mended_is_not_mended_again(search: Any) -> None:
    lossy = {"int8-a": Truth(3.0, loss=9.0), "int8-b": Truth(2.9, loss=9.0)}
    found, _ = search({**lossy, "fp32": Truth(1.1)}, graphs={"int8-a": "one", "int8-b": "one"})
    mended = {r.plan.id.split(".")[0] for r in found.runs if "." in r.plan.id and not r.plan.unlikely}
    assert "int8-b" not in mended
    notes = next(r.history for r in found.runs if r.plan.id == "int8-b")
    assert any("graph of int8-a" in str(note.get("reason")) for note in notes)


def test_runtime_options_are_not_timed_where_the_time_does_not_hold_it(search: Any) -> None:
    found, script = search({"fp32": Truth(2.0)}, case=_case(budget_seconds=60), timing_s=6.0)
    assert "left no time" in _reason(found, "fp32.t1")
    assert script.asked("time") == ["fp32"]
    assert _finalists(found) == ["fp32"]


def test_an_engine_is_a_finalist_with_the_fastest_of_its_options(search: Any) -> None:
    found, _ = search({"fp32": Truth(1.5), "fp32.t1": Truth(1.52), "odd-bf16": Truth(1.51), "odd-bf16.t1": Truth(1.4)})
    assert _finalists(found) == ["fp32.t1", "odd-bf16"]
    assert "the engine of" in _reason(found, "fp32")
    assert "the engine of" in _reason(found, "odd-bf16.t1")


def test_eight_bits_for_a_gpu_are_mended_too() -> None:
    plain, step = recipes.simplify(), Step("convert", {"recipe": "fp8"})
    eight = planned(Candidate("a", "a", "tensorrt", "fp8", (plain, step)))
    sixteen = planned(Candidate("a", "a", "tensorrt", "fp16", (Step("convert", {"recipe": "fp16"}),)))
    assert requantized.is_quantized(eight)
    assert not requantized.is_quantized(sixteen)
    kept = requantized.kept(eight, ["/fc/MatMul"])
    assert kept.steps[1].options["exclude_nodes"] == ["/fc/MatMul"]


@pytest.mark.parametrize(("samples", "call_ms", "at_once"), [(300, 2.0, True), (4000, 20.0, False), (0, 2.0, False)])
def test_all_samples_judge_at_once_where_that_costs_next_to_nothing(
    search: Any, samples: int, call_ms: float, at_once: bool
) -> None:
    truths = {"fp32": Truth(1.1), "int8-good": Truth(3.0, loss=0.2)}
    _, script = search(truths, judging=samples, call_ms=call_ms)
    assert script.asked("check") == ["int8-good"]
    assert (script.full == ["int8-good"]) is at_once


def test_what_has_no_options_to_tune_is_not_checked_for_what_they_might_gain(
    search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    truths = {"int8-good": Truth(3.0, loss=0.2), "odd-bf16": Truth(2.6)}
    _, script = search(truths)
    assert script.asked("check") == ["int8-good", "odd-bf16"], "another thread count may still make it the fastest"
    monkeypatch.setattr(OnnxRuntimeBackend, "variants", lambda *_: ())
    _, script = search(truths)
    assert script.asked("check") == ["int8-good"]


@pytest.mark.parametrize(("step", "mended"), [("dynamic_int8", True), ("static_int8", False)])
def test_without_calibration_data_dynamic_quantization_is_mended_too(step: str, mended: bool) -> None:
    case = replace(_case(), has_calibration=False)
    graph_step = getattr(recipes, step)(case, ["MatMul"])
    plan = Plan((planned(Candidate("d", "d", "onnxruntime", "int8", (recipes.simplify(), graph_step))),), ())
    truths = {"d": Truth(3.0, loss=4.0), "d.keep1": Truth(2.9, loss=0.5)}
    script = Script(truths, Clock(), nodes=["n0", "n1", "n2", "n3"])
    script.data.calibration = None
    budget = Budget(600.0, script.clock)
    budget.share(30.0, 0)
    found = Search(case, plan, {"onnxruntime": OnnxRuntimeBackend()}, script, budget).run()  # type: ignore[arg-type]
    assert (("stage", "sensitivity") in script.calls) is mended
    assert any(f.startswith("d.keep1") for f in _finalists(found)) is mended


def test_what_loses_too_much_on_all_samples_is_no_finalist(search: Any) -> None:
    wide = Truth(3.0, loss=1.06)  # the limit is in its interval, but further off than a standard error
    found, script = search({"odd-bf16": wide, "fp32": Truth(1.1)})
    assert "odd-bf16" in script.full
    assert "over the limit" in _reason(found, "odd-bf16")
    assert _finalists(found)[0].startswith("fp32")


def test_what_chance_may_have_put_over_the_limit_is_a_finalist_beside_a_safe_one(search: Any) -> None:
    """Samples that nobody chose by decide; if they refute it, the safe one ships."""
    found, _ = search({"odd-bf16": Truth(3.0, loss=1.04), "fp32": Truth(1.1)})
    assert [f.split(".")[0] for f in _finalists(found)] == ["odd-bf16", "fp32"]


def test_a_loss_that_only_all_samples_show_does_not_cost_the_job_its_engine(search: Any) -> None:
    found, script = search({"int8": Truth(3.0, loss=0.0, full_loss=1.5), "fp32": Truth(2.0)})
    assert "int8" in script.full
    assert _finalists(found)[0].startswith("fp32")
    dear, script = search({"int8": Truth(3.0, loss=0.0, full_loss=1.5), "fp32": Truth(2.9)}, check_s=30.0)
    assert "int8" not in script.full, "all samples would take longer than the search has"
    assert {"int8", "fp32"} <= {f.split(".")[0] for f in _finalists(dear)}


def test_engines_that_memory_does_not_hold_at_once_are_timed_in_turn(search: Any) -> None:
    def fails(runs: Sequence[CandidateRun]) -> StageFailure | None:
        return StageFailure("out_of_memory", "too much", FailureKind.MODEL) if len(runs) > 2 else None

    found, _ = search({"fp32": Truth(1.5), "a-bf16": Truth(1.6), "b-bf16": Truth(1.7)}, timing_fails=fails)
    assert _finalists(found)[0].startswith("b-bf16")
    assert all(r.screened for r in found.runs if "." not in r.plan.id)


def test_where_nothing_could_be_timed_the_final_measurement_tells(search: Any) -> None:
    late = StageFailure("timed_out", "too long", FailureKind.MODEL)
    found, _ = search({"int8": Truth(3.0), "fp32": Truth(2.0)}, timing_fails=lambda _: late)
    assert _finalists(found) == ["fp32", "int8"]
    assert all(r.tried.failed is None for r in found.finalists)
    assert found.exhausted


def test_options_that_change_the_arithmetic_are_judged_by_themselves(search: Any) -> None:
    case = replace(_case(), kind="rnn")
    truths = {"fp32": Truth(1.5), "fp32.daz": Truth(2.5, loss=9.0), "fp32.t1": Truth(1.4)}
    found, script = search(truths, case=case)
    assert "fp32.daz" in script.asked("check")
    assert "over the limit" in _reason(found, "fp32.daz")
    assert _finalists(found) == ["fp32"]


def test_the_time_that_slow_calls_take_is_kept_for_the_final_measurement(search: Any) -> None:
    _, quick = search({"fp32": Truth(1.5)})
    _, slow = search({"fp32": Truth(1.5)}, call_ms=2000.0)
    _, fixed = search({"fp32": Truth(1.5)}, call_ms=2000.0, batch=1)
    assert slow.searched_until < fixed.searched_until < quick.searched_until, "a fixed batch is timed at no other size"


def test_what_cannot_be_told_apart_is_told_apart_by_all_batch_sizes(search: Any) -> None:
    found, _ = search({"fp32": Truth(1.5, at_8=1.9), "fp32.t1": Truth(1.51, at_8=1.0)})
    assert _finalists(found) == ["fp32"]


def test_where_checks_are_dear_only_what_is_faster_is_checked(search: Any) -> None:
    truths = {"odd-bf16": Truth(2.0), "fp32": Truth(1.99), "other-bf16": Truth(2.01)}
    found, script = search(truths, case=_case(budget_seconds=60), check_s=4.0)
    assert script.asked("check") == ["other-bf16"]
    assert "hardly holds its check" in _reason(found, "odd-bf16")
    assert found.exhausted
    found, script = search(truths, check_s=4.0)
    assert len(script.asked("check")) == 3


def test_a_second_engine_with_the_same_arithmetic_is_left_out_where_building_takes_long(search: Any) -> None:
    truths = {"fp32-a": Truth(1.1, cost_s=9.0), "fp32-b": Truth(1.2, cost_s=9.0), "bf16": Truth(2.0, cost_s=1.0)}
    found, script = search(truths, case=_case(budget_seconds=60))
    assert script.asked("make")[:2] == ["fp32-a", "bf16"]
    assert "left no time" in _reason(found, "fp32-b")
    found, script = search(truths)
    assert "fp32-b" in script.asked("make")


def test_mending_is_not_begun_where_the_time_does_not_hold_it(search: Any) -> None:
    truths = {"int8-a": Truth(3.0, loss=9.0, cost_s=15.0), "fp32": Truth(1.1)}
    found, _ = search(truths, case=_case(budget_seconds=60))
    assert not [r for r in found.runs if r.plan.id.startswith("int8-a.")]
    assert found.exhausted
    assert _finalists(found)[0].startswith("fp32")


@pytest.mark.parametrize("cheap", [True, False])
def test_where_no_new_calibration_is_needed_mending_is_begun_with_less_time(search: Any, cheap: bool) -> None:
    """Keeping nodes in higher precision is then all that is tried: calibrating otherwise would take too long."""
    truths = {"int8-a": Truth(3.0, loss=4.0, cost_s=27.0), "fp32": Truth(1.1)}
    kept = {f"int8-a.keep{n}": Truth(3.0, loss=0.5) for n in (1, 2)}
    nodes = [f"n{i}" for i in range(8)]
    found, _ = search({**truths, **kept}, case=_case(budget_seconds=90), nodes=nodes, keeping_is_cheap=cheap)
    tried = [r.plan.id for r in found.runs if r.plan.id.startswith("int8-a.")]
    assert ("int8-a.keep1" in tried) is cheap
    assert not [cid for cid in tried if "percentile" in cid or "equalized" in cid]


def test_what_was_mended_goes_by_its_engine_s_speed_where_the_time_does_not_hold_a_timing(search: Any) -> None:
    def no_time_for_the_mended(runs: Sequence[CandidateRun]) -> StageFailure | None:
        late = any(".keep" in r.plan.id for r in runs)
        return StageFailure("timed_out", "no time", FailureKind.INFRASTRUCTURE) if late else None

    truths = {"int8-a": Truth(3.0, loss=4.0), "int8-b": Truth(2.8, loss=4.0), "odd-bf16": Truth(2.0)}
    found, _ = search(
        {**truths, "int8-a.keep2": Truth(2.9, loss=0.5)},
        case=_case(calibration={"dataset_id": "d", "method": "minmax"}, quantization={"win_back": True}),
        nodes=[f"n{i}" for i in range(64)],
        timing_fails=no_time_for_the_mended,
    )
    mended = next(r for r in found.runs if r.plan.id.startswith("int8-a.keep") and r.tried.failed is None)
    assert mended.plan.id in _finalists(found)
    expected = next(note for note in mended.history if note["decision"] == "expected")
    assert expected["ratio"] == pytest.approx(0.95 * 3.0)
    assert not [r for r in found.runs if r.plan.id.startswith("int8-b.keep")], "it could not be faster"


def test_the_sensitivity_asks_for_as_many_samples_as_the_time_holds() -> None:
    asked = [sensitivity_samples(ms, 558.0) for ms in (0.0, 1.0, 200.0, 5000.0)]
    assert asked == [16, 16, 8, 2]


def test_the_same_engine_twice_is_timed_once(search: Any) -> None:
    found, script = search({"fp32": Truth(1.5), "fp32-fused": Truth(1.5)}, twins={"fp32-fused": "fp32"})
    assert "the engine of fp32" in _reason(found, "fp32-fused")
    assert "fp32-fused" not in script.asked("time")


def test_what_is_slower_at_another_batch_size_is_out(search: Any) -> None:
    found, _ = search({"fp32": Truth(1.1), "odd-bf16": Truth(4.0, at_8=0.5)})
    assert "slower at batch size 8" in _reason(found, "odd-bf16")
    assert _finalists(found)[0].startswith("fp32")


def test_a_broken_one_never_goes_on(search: Any) -> None:
    found, _ = search({"fp32": Truth(1.2), "int8-nan": Truth(5.0, broken="NaN for sample 3")})
    assert "NaN for sample 3" in _reason(found, "int8-nan")
    assert all(i.startswith("fp32") for i in _finalists(found))


def test_accuracy_is_won_back_node_by_node(search: Any) -> None:
    truths = {
        "fp32": Truth(1.2),
        "int8": Truth(3.0, loss=8.0),
        "int8.equalized-0.8": Truth(3.0, loss=5.0),
        "int8.equalized-0.5": Truth(3.0, loss=5.0),
        "int8.percentile": Truth(3.0, loss=7.0),
        "int8.entropy": Truth(3.0, loss=9.0),
        "int8.mse": Truth(3.0, loss=6.0),
        "int8.keep1": Truth(2.9, loss=4.0),
        "int8.keep2": Truth(2.8, loss=2.0),
        "int8.keep4": Truth(2.6, loss=0.8),
        "int8.keep3": Truth(2.7, loss=1.5),
    }
    found, script = search(truths, nodes=[f"n{i}" for i in range(12)])
    assert "sensitivity" in script.asked("stage")
    assert _finalists(found)[0].startswith("int8.keep4")
    mended = next(r for r in found.runs if r.plan.id == "int8.keep4")
    assert mended.plan.steps[1].options["exclude_nodes"] == ["n0", "n1", "n2", "n3"]
    assert "int8.keep3" in script.asked("make")  # fewer nodes kept would be faster: it was tried
    assert "over the limit" in _reason(found, "int8")


def test_the_first_way_that_keeps_the_limit_is_enough(search: Any) -> None:
    truths = {"fp32": Truth(1.2), "int8": Truth(3.0, loss=1.5), "int8.equalized-0.8": Truth(3.0, loss=0.5)}
    found, script = search(truths, nodes=["n0"], call_ms=50.0)  # a sensitivity takes a minute
    assert _finalists(found)[0].startswith("int8.equalized-0")
    assert "sensitivity" not in script.asked("stage")


def test_near_the_limit_a_few_nodes_are_kept_before_anything_is_calibrated_anew(search: Any) -> None:
    """Four ways that take a calibration each were tried before, and none helped."""
    truths = {"fp32": Truth(1.2), "int8": Truth(3.0, loss=1.17, cost_s=20.0), "int8.keep1": Truth(2.9, loss=0.6)}
    _, script = search(truths, nodes=[f"n{i}" for i in range(12)], keeping_is_cheap=True)
    assert [cid for cid in script.asked("check") if cid.startswith("int8.")] == ["int8.keep1"]
    assert not [cid for cid in script.asked("make") if "percentile" in cid or "equalized" in cid]


def test_where_no_number_of_nodes_is_enough_other_ranges_are_tried(search: Any) -> None:
    truths = {"fp32": Truth(1.2), "int8": Truth(3.0, loss=1.17), "int8.mse": Truth(3.0, loss=0.9)}
    found, script = search(truths, nodes=[f"n{i}" for i in range(4)], keeping_is_cheap=True)
    assert [cid for cid in script.asked("check") if "keep" in cid] == ["int8.keep1", "int8.keep2"]
    assert _finalists(found)[0].startswith("int8.mse")


def test_of_two_engines_of_one_graph_the_one_that_is_no_faster_is_not_mended(search: Any) -> None:
    truths = {"fp32": Truth(1.2), "int8-a": Truth(3.0, loss=1.5), "int8-b": Truth(2.95, loss=1.5)}
    kept = {f"{cid}.keep1": Truth(2.9, loss=0.5) for cid in ("int8-a", "int8-b")}
    for graphs, mended in (({"int8-a": "one", "int8-b": "one"}, ["int8-a"]), ({}, ["int8-a", "int8-b"])):
        found, script = search({**truths, **kept}, nodes=["n0", "n1"], graphs=graphs, keeping_is_cheap=True)
        assert [cid.split(".")[0] for cid in script.asked("check") if "keep" in cid] == mended
        notes = next(r.history for r in found.runs if r.plan.id == "int8-b")
        assert any("graph of int8-a, which was mended" in str(n.get("reason")) for n in notes) is bool(graphs)


def test_a_number_of_nodes_that_differs_by_little_work_is_not_tried(search: Any) -> None:
    truths = {"fp32": Truth(1.2), "int8": Truth(3.0, loss=3.0)}
    kept = {f"int8.keep{n}": Truth(2.9, loss=0.5) for n in (7, 8)}
    _, script = search({**truths, **kept}, nodes=[f"n{i}" for i in range(128)], keeping_is_cheap=True)
    numbers = [cid for cid in script.asked("check") if "keep" in cid]
    assert numbers == ["int8.keep4", "int8.keep8"], "four nodes are a 32nd of the work, and six save no time"


def test_what_hardly_helps_is_not_tried_and_the_report_says_so(search: Any) -> None:
    """Other ranges take away a quarter of a loss at the most, and this one is nine times the limit."""
    found, script = search({"fp32": Truth(1.2), "int8": Truth(3.0, loss=9.0)}, nodes=["n0", "n1"])
    assert not [cid for cid in script.asked("make") if "percentile" in cid]
    assert "int8.keep1" in script.asked("make")
    notes = next(r.history for r in found.runs if r.plan.id == "int8")
    assert any("hardly expected to bring its loss within the limit" in str(n.get("reason")) for n in notes)


def test_nothing_is_won_back_where_it_would_not_be_the_fastest_or_is_not_wanted(search: Any) -> None:
    truths = {"fp32": Truth(3.2), "int8": Truth(3.0, loss=3.0)}
    _, script = search(truths, nodes=["n0"])
    assert not [c for c in script.asked("make") if c.startswith("int8.")]
    truths = {"fp32": Truth(1.2), "int8": Truth(3.0, loss=3.0)}
    _, script = search(truths, nodes=["n0"], case=_case(quantization={"win_back": False}))
    assert not [c for c in script.asked("make") if c.startswith("int8.")]


def test_without_data_a_change_of_precision_cannot_ship(search: Any) -> None:
    found, _ = search({"fp32": Truth(1.2), "int8": Truth(3.0, loss=0.1)}, source="synthetic")
    assert all(i.startswith("fp32") for i in _finalists(found))
    assert "no validation data" in _reason(found, "int8")


def test_a_candidate_that_cannot_be_built_is_its_own_failure(search: Any) -> None:
    failure = StageFailure("load_failed", "unsupported op Foo", FailureKind.MODEL, "build")
    found, _ = search({"fp32": Truth(1.2), "int8": Truth(make_fails=failure)})
    assert "unsupported op Foo" in _reason(found, "int8")
    assert _finalists(found)


def test_when_the_time_is_over_the_best_so_far_is_what_there_is(search: Any) -> None:
    truths = {"fp32": Truth(1.2, cost_s=50), "int8-a": Truth(2.0, cost_s=50), "int8-b": Truth(3.0, cost_s=50)}
    found, script = search(truths, case=_case(budget_seconds=130))
    assert found.exhausted
    assert "budget of 130 s left no time" in _reason(found, "int8-b")
    assert "int8-b" not in script.asked("make")
    assert found.runs[0].build is not None


def test_the_exhaustive_search_gives_everybody_the_full_method(search: Any) -> None:
    truths = {"fp32": Truth(1.2), "int8": Truth(3.0, loss=5.0)}
    found, script = search(truths, case=_case(search={"strategy": "exhaustive"}))
    assert set(_finalists(found)) == {"fp32", "fp32.t1", "fp32.nospin", "int8", "int8.t1", "int8.nospin"}
    assert len(script.full) == 6
    assert not script.asked("time")


def test_a_loss_that_few_samples_cannot_tell_is_judged_on_all(search: Any) -> None:
    found, script = search({"fp32": Truth(1.2), "int8": Truth(3.0, loss=1.05)}, nodes=["n0"])
    assert script.full[0] == "int8"
    found, script = search({"fp32": Truth(1.2), "int8": Truth(3.0, loss=0.5)}, nodes=["n0"])
    assert script.full == []
    assert _finalists(found)[0].startswith("int8")


def test_a_search_whose_requests_another_process_executes_picks_the_same(search: Any) -> None:
    truths = {"fp32": Truth(1.2), "int8": Truth(3.0, loss=4.0), "int8.keep2": Truth(2.8, loss=0.6)}
    nodes = [f"n{i}" for i in range(8)]
    alone, _ = search(truths, nodes=nodes)
    with another_process(None, {"truths": {k: vars(v) for k, v in truths.items()}, "nodes": nodes}) as send:
        found, _ = search(truths, nodes=nodes, answer=Elsewhere(send, lambda: 0.0))
    assert [r.history for r in found.runs] == [r.history for r in alone.runs]
    assert _finalists(found) == _finalists(alone)
    assert found.finalists[0].plan.id.startswith("int8.keep2")


def test_requests_may_be_answered_by_workers_that_hold_nothing(search: Any) -> None:
    """Each goes as JSON to another worker, which knows the job and nothing of its search; and so does the answer."""
    truths = {"fp32": Truth(1.2), "int8": Truth(3.0, loss=4.0), "int8.keep2": Truth(2.8, loss=0.6)}
    nodes = [f"n{i}" for i in range(8)]
    workers: list[Script] = []

    def send(call: Mapping[str, Any]) -> Any:
        workers.append(Script(truths, Clock(), nodes=nodes))
        desk = Desk(workers[-1])  # type: ignore[arg-type]
        return json.loads(json.dumps(execute(Call.from_json(json.loads(json.dumps(call))), desk.answer)))

    alone, _ = search(truths, nodes=nodes)
    found, script = search(truths, nodes=nodes, answer=Elsewhere(send, lambda: 0.0))
    assert [r.plan.id for r in found.runs] == [r.plan.id for r in alone.runs]
    assert [r.history for r in found.runs] == [r.history for r in alone.runs]
    assert _finalists(found) == _finalists(alone)
    assert found.finalists[0].plan.id.startswith("int8.keep2")
    assert all(r.build is not None and r.tried.accuracy for r in found.finalists)
    assert {kind for kind, _ in script.calls} == {"make"}, "the finalists' engines, which storage has"
    mended = next(w for w in workers if ("check", "int8.keep2") in w.calls)
    assert mended.asked("make") == ["int8", "int8.keep2"], "its calibration is that of what it was made from"


def test_a_search_is_recorded_as_it_was(search: Any) -> None:
    lines: list[str] = []
    truths = {"fp32": Truth(1.2), "int8": Truth(3.0, loss=4.0), "int8.keep2": Truth(2.8, loss=0.6)}
    found, _ = search(truths, nodes=[f"n{i}" for i in range(8)], recorder=Recorder(lines.append))
    steps = [*Recording.read(lines).replay()]
    assert all(now == then for now, then, _ in steps)
    assert list(steps[-1][0].finalists) == _finalists(found)
