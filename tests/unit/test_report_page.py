"""The report's page: each headline with its batch size, metric and what it is compared with."""

from __future__ import annotations

from app.jobs.report_page import report_page

FINAL = {
    "speedup": "2.0x",
    "speedup_ci": [1.9, 2.1],
    "latency_ms": 0.05,
    "original_latency_ms": 0.1,
    "bound": {"p50_ms": 0.03},
    "batch_size": 4,
    "accuracy_loss_percent": 0.25,
    "accuracy_metric": "top1",
    "accuracy_basis": "labels",
    "accuracy_value": 0.9575,
    "original_accuracy_value": 0.96,
    "accuracy_samples": 400,
}


def test_every_headline_says_of_what_it_is() -> None:
    accuracy = {"loss_percent": 0.25, "metric": "top1", "value": 0.9575, "baseline_value": 0.96, "samples": 400}
    page = report_page(
        {"final_metrics": FINAL, "candidates": [{"id": "a", "name": "a", "accuracy": accuracy}]}, "job_1"
    )
    for words in (
        "speed-up, 95 % [1.9, 2.1]",
        "at batch size 4",
        "The original takes 0.1 ms; both called as infer.py calls.",
        "With inputs and outputs bound before, the engine takes 0.03 ms.",
        "top1 is 95.75 %, the original's 96 %, on 400 samples, by labels.",
        "0.25 (top1 95.75 %, the original 96 %, 400 samples)",
    ):
        assert words in page


def test_what_is_gained_is_no_negative_loss() -> None:
    page = report_page({"final_metrics": {**FINAL, "accuracy_loss_percent": -0.188}}, "job_1")
    assert "<b>0.188</b>points of accuracy gained" in page


def test_a_profile_that_measures_the_profiler_says_so() -> None:
    layers = [{"name": "gelu", "op_type": "Gelu", "ms": 0.4, "share": 0.8}]
    told = report_page({"profile": {"layers": layers, "distorted": "the layers take <more>"}}, "job_1")
    assert "Not to be relied on: the layers take &lt;more&gt;." in told
    assert "Not to be relied on" not in report_page({"profile": {"layers": layers, "distorted": None}}, "job_1")
    assert "Where the time goes" not in report_page({"profile": {"layers": None, "distorted": None}}, "job_1")


def test_the_kinds_of_bundles_and_why_one_is_missing() -> None:
    tried = {"requests": 96, "executions": 40}
    bundles = {"triton": {"backend": "python", "notes": ["<why>"], "tried": tried}, "kserve": {"reason": "no server"}}
    page = report_page({"bundles": bundles}, "job_1")
    for words in ("Other bundles", "<td>triton<td>python", "&lt;why&gt;", "requests: 96, executions: 40", "no server"):
        assert words in page
    assert "Other bundles" not in report_page({}, "job_1")


def test_the_page_answers_three_questions_in_order() -> None:
    report = {
        "final_metrics": FINAL,
        "checks": [{"name": "p99_latency_ms", "value": 17264.3, "limit": 20000.0, "passed": True}],
        "recommendations": ["Serve it with batches of 8."],
        "environment": {"hardware": {"memory_bytes": 25276510208, "isa": ["avx2", "vnni"], "gpu": None}},
        "method": {"aa": {"1": {"ratio": 1.02}}, "raw_samples": [{"name": "samples.npz", "size_bytes": 6035}]},
    }
    page = report_page(report, "job_1")
    places = [page.index(words) for words in ("What did I gain?", "Can I trust it?", "What next?")]
    assert places == sorted(places)
    assert "17,260" in page
    assert "<td>p99 latency, ms<td class=n>17,260" in page
    assert "<dt>memory bytes<dd>25.3 GB" in page
    assert "<dt>ratio<dd>1.02" in page, "what lies deeper stands below its name, and is no dump"
    assert "e+0" not in page
    assert "{&#x27;" not in page
    assert "gpu" not in page, "what there is nothing of is left out"


def test_what_disturbed_the_machine_is_told_once() -> None:
    why = "batch 1: 0 of 10 rounds of the original were undisturbed"
    told = [{"id": n, "name": n, "status": "kept", "reason": f"no speed-up is claimed: {why}"} for n in "abc"]
    warning = f"No speed-up is claimed, the original ships: {why}."
    page = report_page({"candidates": told, "disturbance": {"reason": why}, "warnings": [warning]}, "job_1")
    assert page.count(why) == 1
    assert page.count("no speed-up is claimed, as said above") >= 3


def test_from_the_original_to_the_engine_part_by_part() -> None:
    final = {"original_latency_ms": 10.0, "latency_ms": 4.0}
    parts = [
        {"name": "int8", "impact": "…", "latency_ratio": 0.5},  # without it: 8 ms
        {"name": "<fusion>", "impact": "…", "latency_ratio": 0.8},  # without it: 5 ms
    ]
    page = report_page({"final_metrics": final, "optimizations_applied": parts}, "job_1")
    assert "from the original&#x27;s latency to the engine&#x27;s, part by part" in page
    for told in ("10 ms", "−4 ms", "−1 ms", "together, beyond each alone", "4 ms", "&lt;fusion&gt;"):
        assert told in page
    nothing = report_page({"final_metrics": final, "optimizations_applied": [{"name": "a", "impact": None}]}, "job_1")
    assert "part by part" not in nothing


def test_speed_accuracy_and_size_in_one_picture() -> None:
    baseline = {"id": "baseline", "size_mb": 4.0, "batches": {"1": {"p50_ms": 2.0}}}
    engine = {"id": "a", "name": "<a>", "status": "picked", "size_mb": 1.0, "accuracy": {"loss_percent": 0.2},
              "batches": {"1": {"p50_ms": 1.0}}}  # fmt: skip
    page = report_page({"baseline": baseline, "candidates": [engine], "pareto": ["a"]}, "job_1")
    assert "Speed, accuracy and size" in page
    assert page.count("stroke-width=3 />") == 1
    assert "<li>&lt;a&gt;: 1 ms, 0.2 points, 1 MB" in page
    assert "Speed, accuracy and size" not in report_page({"baseline": baseline}, "job_1")


def test_a_pointer_on_a_mark_gets_the_figures_behind_it() -> None:
    at = {"p50_ms": 1.0, "p99_ms": 1.5, "samples": 1234, "speedup": {"low": 1.9, "ratio": 2.0, "high": 2.1}}
    engine = {"id": "a", "name": "<a>", "status": "picked", "size_mb": 1.0, "accuracy": {"loss_percent": 0.2},
              "batches": {"1": at}}  # fmt: skip
    baseline = {"id": "baseline", "size_mb": 4.0, "batches": {"1": {"p50_ms": 2.0}}}
    curve = [
        {"rate": rate, "requests": 200, "p50_ms": 3.0, "p99_ms": 8.0, "verdict": "within"} for rate in (10.0, 20.0)
    ]
    told = {"traffic": {"p99_limit_ms": 20.0}, "engine": {"curve": curve}, "headline": "h"}
    page = report_page({"baseline": baseline, "candidates": [engine], "traffic": told}, "job_1")
    for words in (
        "&lt;a&gt;: p50 1 ms, p99 1.5 ms, of 1234 calls",
        "&lt;a&gt;, b=1: 2.00x [1.90, 2.10]",
        "&lt;a&gt;: 1 ms, 0.2 points, 1 MB",
        "the engine, batches as they form at 20 requests/s: p99 8 ms, p50 3 ms",
    ):
        assert f"<g><title>{words}</title>" in page, words


def test_tables_and_drawings_scroll_within_themselves() -> None:
    layers = [{"name": "gelu", "op_type": "Gelu", "ms": 0.4, "share": 0.7245}]
    page = report_page({"profile": {"layers": layers}, "final_metrics": FINAL}, "job_1")
    assert page.count("<table>") == page.count("<div class=scroll tabindex=0 role=group") >= 1
    assert "<td>72.45 %" in page


def test_a_training_is_drawn_once_with_what_it_says() -> None:
    curve = [
        {"step": 0, "loss": 0.4, "agreement": 0.8},
        {"step": 10, "loss": 0.02, "train_loss": 0.03, "agreement": 0.99},
    ]
    done = {
        "curve": curve,
        "steps": 10,
        "best_step": 10,
        "samples": 96,
        "held_out": 20,
        "seconds": 3.2,
        "ended": "<done>",
        "backed_off": 2,
    }
    done |= {"loss_before": 0.4, "loss": 0.02, "agreement_before": 0.8, "agreement": 0.99}
    candidates = [{"name": f"c{i}", "details": {"train": {"training": done}, "simplify": {}}} for i in range(2)]
    page = report_page({"candidates": candidates}, "job_1")
    assert page.count("<polyline") == 1
    for words in (
        "c0, c1",
        "10 steps on 96 samples",
        "went from 0.4 to 0.02",
        "80 % to 99 %",
        "because &lt;done&gt;",
        "smaller 2 times",
    ):
        assert words in page
    assert "<h3>Training" not in report_page(
        {"candidates": [{"name": "c", "details": {"train": {"training": {}}}}]}, "job_1"
    )
