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
        "top1 is 0.9575, the original's 0.96, on 400 samples, by labels.",
        "0.25 (top1 0.9575, the original 0.96, 400 samples)",
    ):
        assert words in page


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
