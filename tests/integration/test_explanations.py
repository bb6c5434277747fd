"""Evidence before explanation: a job whose engine is proven keeps it, whatever happens while it is explained."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.factories.deployment import deployment
from tests.factories.pace import paced
from workers.kernel import backends

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job with real data, on a worker on which everything that explains dies."""
    folder = tmp_path_factory.mktemp("explanations")
    with deployment(folder / "home") as served, served.client() as client:
        served.start("tests.factories.crashing_explanations")
        served.wait_ready()
        model = client.upload_model(DIGITS / "model.onnx", "digits")
        data = client.upload_dataset(DIGITS / "validation.npz", "digits")
        spec = {
            "model_id": model["id"],
            "calibration": {"dataset_id": data["id"]},
            "validation": {"dataset_id": data["id"], "max_accuracy_loss_percent": 5.0},
            "precisions": ["fp32", "int8"],
            "target": {"backends": ["onnxruntime"]},
            "benchmark": {"batch_sizes": [1], "min_seconds": 0.3},
            "budget_seconds": paced(45),
            "traffic": {"rate_per_second": 20, "slo": {"p99_latency_ms": 200}},
        }
        job, events = client.submit(spec), []
        ended = client.wait(job["id"], on_event=events.append, check=False)
        assert ended["status"] == "succeeded", (ended["error"], served.worker_log()[-4000:])
        engine = client.engine(ended["engine_ids"][0])
        bundle = client.download_bundle(engine["id"], folder / "bundle.zip")
        again = client.submit({name: value for name, value in spec.items() if name != "traffic"})
        client.wait(again["id"])
        return {
            "job": ended,
            "events": events,
            "report": client.report(job["id"]),
            "engine": engine,
            "bundle": bundle,
            "again": client.report(again["id"]),
        }


def test_the_engine_ships_and_the_report_says_what_is_missing(job: dict[str, Any]) -> None:
    report = job["report"]
    reasons = report["not_explained"]
    assert "GPU has no memory" in reasons["deployment"]
    assert "profile" in reasons
    assert report["profile"] is None
    assert "GPU has no memory" in report["deployment_config"]["reasons"]["choice"]
    assert report["final_metrics"]["latency_ms"] > 0
    if report["picked"] != "baseline":  # on a machine too busy to tell, there is nothing to leave out
        applied = report["optimizations_applied"]
        assert applied
        assert all(part["impact"] is None and part["reason"] for part in applied)


def test_the_bundle_that_ships_is_measured_under_the_traffic(job: dict[str, Any]) -> None:
    """Also where all other explanations are missing."""
    told, config = job["report"]["traffic"], job["report"]["deployment_config"]
    assert told["headline"].startswith("at p99 ≤ 200 ms: ")
    assert "traffic" not in job["report"]["not_explained"]
    engine = told["engine"]
    assert engine["alone_p50_ms"] > 0
    assert engine["setup"]["instances"] >= 1
    assert all(t["decision"] for t in told["tried"])
    assert config["serving"]["settings"]["max_batch"] == engine["setup"]["max_batch"]
    assert {row["pattern"] for row in told["patterns"]} >= {"several instances", "dynamic batching", "static batching"}
    assert told["method"]["load"].startswith("open loop")


def test_the_bundle_that_is_downloaded_is_served_as_the_report_says(job: dict[str, Any]) -> None:
    config = job["report"]["deployment_config"]
    with zipfile.ZipFile(job["bundle"]) as archive:
        shipped = json.loads(archive.read("serving.json"))
    if "serving" in config["reasons"]:  # on a machine so busy that nothing was left of the budget
        assert "the budget had" in config["reasons"]["serving"]
    else:
        assert shipped == config["serving"]["settings"]


def test_the_package_was_made_before_anything_was_explained(job: dict[str, Any]) -> None:
    names = [s["name"] for s in job["job"]["stages"]]
    explaining = [names.index(n) for n in ("sweep", "profile")]
    assert names.index("package") < min(explaining)


def test_the_bundle_holds_the_engine_that_was_proven(job: dict[str, Any]) -> None:
    assert job["engine"]["backend"] in backends()
    with zipfile.ZipFile(job["bundle"]) as archive:
        digests = {hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    assert job["engine"]["sha256"] in digests


def test_progress_never_runs_backwards_and_tells_an_expected_end(job: dict[str, Any]) -> None:
    told = [e.data for e in job["events"] if e.data.get("progress") is not None]
    progress = [t["progress"] for t in told]
    assert progress == sorted(progress)
    assert any(t.get("expected_end") for t in told)
    assert job["job"]["expected_end"] is None  # it has ended


def test_figures_from_the_cache_say_when_and_where_they_were_measured(job: dict[str, Any]) -> None:
    first, again = job["report"], job["again"]
    assert first["environment"]["measured"]["cached"] is False
    if again["environment"]["measured"]["cached"]:  # a measurement that claims nothing is no other job's to use
        assert again["environment"]["measured"]["at"] == first["environment"]["measured"]["at"]
        assert again["baseline"]["measured_at"] == first["baseline"]["measured_at"]
    exports = [next(s for s in r["stages"] if s["name"] == "export") for r in (first, again)]
    assert exports[0]["made_at"] == exports[1]["made_at"]
    assert exports[1]["cached"]
    assert exports[1]["made_by"]
