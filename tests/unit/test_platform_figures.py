"""What of a job is told to MLflow, Kubeflow and Airflow."""

from __future__ import annotations

import pytest

from anneal_client.figures import description_of, metrics_of, params_of, promise_of, tags_of

REPORT = {
    "picked": "ort-int8",
    "analysis": {"model": "m", "original_size_mb": 2.5, "hardware": "AMD EPYC"},
    "final_metrics": {
        "latency_ms": 1.5,
        "original_latency_ms": 3.0,
        "throughput_qps": None,
        "accuracy_loss_percent": -0.2,
        "accuracy_loss_ci": [-0.5, 0.1],
        "accuracy_metric": "top-1",
        "accuracy_verdict": "proven",
        "memory_mb": float("nan"),
        "speedup": "2.00x",
        "speedup_ci": [1.9, 2.1],
        "speedup_proven": True,
    },
    "candidates": [
        {"id": "baseline", "batches": {"1": {"p50_ms": 3.0}}},
        {
            "id": "ort-int8",
            "batches": {"1": {"p50_ms": 1.5, "speedup": {"ratio": 2.0, "low": 1.9}}, "8": {"p50_ms": 9}},
        },
    ],
    "warnings": ["it was warm"],
}
JOB = {
    "id": "job_1",
    "status": "succeeded",
    "spec": {
        "objective": "latency",
        "precisions": None,
        "constraints": {"p99_latency_ms": 20.0, "max_size_mb": None},
        "shapes": {"in:0[x]": {"opt": [1, 3]}},
        "quantization": {"keep_nodes": [], "win_back": True},
        "webhook": {"url": "https://example.com/?token=secret"},
    },
}


def test_metrics_are_the_shipped_engines_and_nothing_that_was_not_measured() -> None:
    assert metrics_of(REPORT) == {
        "latency_ms": 1.5,
        "original_latency_ms": 3.0,
        "accuracy_loss_percent": -0.2,
        "accuracy_loss_low": -0.5,
        "accuracy_loss_high": 0.1,
        "original_size_mb": 2.5,
        "speedup": 2.0,
        "speedup_low": 1.9,
        "speedup_high": 2.1,
        "batch_1/p50_ms": 1.5,
        "batch_1/speedup": 2.0,
        "batch_8/p50_ms": 9.0,
    }
    assert metrics_of({}) == {}


def test_parameters_have_names_that_platforms_take_and_no_secret() -> None:
    assert params_of(JOB) == {
        "objective": "latency",
        "constraints.p99_latency_ms": "20.0",
        "shapes.in_0_x_.opt": "[1, 3]",
        "quantization.keep_nodes": "[]",
        "quantization.win_back": "true",
    }
    assert "secret" not in str(params_of(JOB))


@pytest.mark.parametrize(
    ("job", "report", "promise"),
    [
        (JOB, REPORT, "kept"),
        (JOB, {**REPORT, "claim": False}, "unproven"),
        (
            JOB,
            {**REPORT, "checks": [{"name": "accuracy", "passed": None}, {"name": "p99", "passed": False}]},
            "limits_missed",
        ),
        (JOB, {**REPORT, "traffic": {"served": False}}, "limits_missed"),
        (JOB, {"picked": "baseline"}, "nothing_faster"),
        ({"status": "failed", "error": {"code": "no_feasible_candidate"}}, {"picked": None}, "limits_missed"),
        ({"status": "failed", "error": {"code": "invalid_graph"}}, None, "failed"),
        ({"status": "cancelled", "error": None}, None, "failed"),
    ],
)
def test_the_promise(job: dict[str, object], report: dict[str, object] | None, promise: str) -> None:
    assert promise_of(job, report) == promise


def test_tags_and_description() -> None:
    engine = {"id": "eng_1", "sha256": "ab", "backend": "onnxruntime", "precision": "int8", "bundle_sha256": "cd"}
    tags = tags_of(JOB, REPORT, engine)
    assert tags["promise"] == "kept"
    assert (tags["engine_id"], tags["speedup_proven"], tags["hardware"]) == ("eng_1", "true", "AMD EPYC")
    assert tags_of({"id": "j", "status": "failed", "error": {"code": "x"}}, None, None) == {
        "job_id": "j",
        "promise": "failed",
        "error": "x",
    }
    text = description_of(JOB, REPORT)
    assert "speed-up 2.00x (95 %: 1.9 to 2.1)" in text
    assert "top-1: loss -0.2 %, proven" in text
    assert "it was warm" in text
