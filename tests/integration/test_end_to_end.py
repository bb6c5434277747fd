"""The main job through HTTP with real processes: the embedded default, and PostgreSQL, Redis and S3 by settings."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
import redis

from tests.conftest import new_bucket
from tests.factories.deployment import Deployment, deployment
from tests.factories.pace import paced
from tests.servers import new_database

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module", params=["embedded", "servers"])
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    extra: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        if request.param == "servers":
            broker: str = request.getfixturevalue("redis_url")
            with redis.Redis.from_url(broker) as client:
                client.flushall()
            extra = {
                "DATABASE_URL": stack.enter_context(new_database(request.getfixturevalue("postgres_url"))),
                "BROKER_URL": broker,
                **new_bucket(request.getfixturevalue("s3_server")).variables,
            }
        found = stack.enter_context(deployment(tmp_path_factory.mktemp("end_to_end") / "home", extra))
        found.start_worker()
        found.wait_ready()
        yield found


def _spec(client: Any, *, min_seconds: float, budget: int) -> dict[str, Any]:
    # In parts, over an upload session: on S3 the parts go to presigned URLs.
    model = client.upload_model(DIGITS / "model.onnx", "digits", parts_above=0)
    calibration = client.upload_dataset(DIGITS / "calibration.npz")
    validation = client.upload_dataset(DIGITS / "validation.npz")
    return {
        "model_id": model["id"],
        "calibration": {"dataset_id": calibration["id"]},
        "validation": {"dataset_id": validation["id"], "max_accuracy_loss_percent": 1.0},
        "benchmark": {"batch_sizes": [1, 8], "min_seconds": min_seconds},
        "engines_per_bundle": 1,  # `test_two_engines` has the other kind
        "target": {"backends": ["onnxruntime"]},
        "budget_seconds": paced(budget),
    }


@dataclass
class Ended:
    """The main job at its end, and the kinds of what was told on the way."""

    spec: dict[str, Any]
    job: dict[str, Any]
    seen: list[str]


@pytest.fixture(scope="module")
def ended(deployed: Deployment) -> Ended:
    seen: list[str] = []
    with deployed.client() as client:
        spec = _spec(client, min_seconds=0.1, budget=80)
        headers = {**deployed.headers, "X-Request-ID": "trace-me-through"}
        job = httpx.post(f"{deployed.url}/v1/jobs", json=spec, headers=headers).json()
        return Ended(spec, client.wait(job["id"], on_event=lambda e: seen.append(e.type)), seen)


def test_from_an_uploaded_model_to_a_proven_engine(deployed: Deployment, ended: Ended, tmp_path: Path) -> None:
    job = ended.job
    with deployed.client() as client:
        assert {"state", "stage"} <= set(ended.seen)
        assert job["progress"] == 1.0
        stages = [s["name"] for s in job["stages"]]
        assert {"export", "simplify", "quantize", "build", "validate", "benchmark", "sweep", "package"} <= set(stages)
        report = client.report(job["id"])
        _check_report(report)
        _check_manifest(client.manifest(job["id"]), report)
        (engine_id,) = job["engine_ids"]
        engine = client.engine(engine_id)
        path = client.download_engine(engine_id, tmp_path / "engine.onnx")
        assert hashlib.sha256(path.read_bytes()).hexdigest() == engine["sha256"]
        _check_accuracy(path, report)
        _check_bundle(client.download_bundle(engine_id, tmp_path / "bundle.zip"), tmp_path / "bundle", path)
        _check_told(json.loads((tmp_path / "bundle/manifest.json").read_text()), report)


def test_the_same_job_again(deployed: Deployment, ended: Ended) -> None:
    with deployed.client() as client:
        again = client.wait(client.submit(ended.spec)["id"])
        made = {s["name"] for s in again["stages"] if not s["cached"]}
        # Measured anew, a search may go another way, and quantize what the first one did not.
        assert "export" not in made, "what is made of the same bytes is not made again"
        if not made & {"benchmark", "sweep"}:  # a measurement that claims nothing is no other job's to use
            assert made == {"package"}, "the same job again computes nothing; its bundle tells whose it is"
            engines = [client.engine(job["engine_ids"][0])["sha256"] for job in (ended.job, again)]
            assert engines[0] == engines[1]


def _check_report(report: dict[str, Any]) -> None:
    for block in ("analysis", "optimizations_applied", "final_metrics", "deployment_config", "recommendations"):
        assert block in report
    candidates = {c["id"]: c for c in report["candidates"]}
    assert {"ort-fp32", "ort-int8-static"} <= set(candidates)
    assert candidates["ort-int8-static"]["details"]["quantize"]["qdq_by_op"]["Conv"] > 0
    assert candidates["ort-fp32"]["details"]["simplify"]["fusions"]["conv+bn"] > 0
    assert all(c["reason"] for c in report["candidates"])
    for figures in [report["baseline"], *report["candidates"]]:
        for batch in figures["batches"].values():
            assert batch["samples"] > 0
            assert batch["p999_ms"] is None or batch["samples"] >= 6636
            assert (batch["p99_ms"] is None) == ("p99_ms" in batch["reasons"])
    assert report["method"]["aa"]
    final = report["final_metrics"]
    assert final["accuracy_verdict"] in ("proven", "unproven")
    assert final["accuracy_verdict"] in final["accuracy_verdict_reason"]
    spared = {n for n, c in candidates.items() if "keeps the limit on the confirming samples" in c["reason"]}
    confirmed = [n for n in report["search"]["finalists"] if n not in spared]  # by a faster one that was confirmed
    assert confirmed
    for name in confirmed:
        judged, searched = candidates[name]["accuracy"], candidates[name]["accuracy_in_search"]
        assert (judged["part"], searched["part"]) == ("confirm", "select"), "on samples that nobody chose by"
        assert judged["samples"] > searched["samples"] > 0
    if report["picked"] == "baseline":
        assert final["speedup"] == "1.0x"
    else:
        assert final["speedup_ci"][0] > 1.0
        assert final["accuracy_loss_percent"] <= 1.0
    assert all(check["passed"] for check in report["checks"])


def _check_manifest(manifest: dict[str, Any], report: dict[str, Any]) -> None:
    assert manifest["job_id"] == report["job_id"]
    assert manifest["hardware_fingerprint"]
    for stage in manifest["stages"]:
        assert len(stage["key"]) == 64
        for files in [*stage["inputs"].values(), *stage["outputs"].values()]:
            assert all(len(f["sha256"]) == 64 for f in files)


def _check_accuracy(engine: Path, report: dict[str, Any]) -> None:
    """On the downloaded bytes, here: as accurate as agreed."""
    data = np.load(DIGITS / "validation.npz")
    scores = {}
    for name, path in (("original", DIGITS / "model.onnx"), ("engine", engine)):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (logits, *_) = session.run(None, {session.get_inputs()[0].name: data["image"]})
        scores[name] = float((logits.argmax(axis=1) == data["labels"]).mean())
    loss = 100 * (scores["original"] - scores["engine"])
    assert loss <= 1.0
    assert report["final_metrics"]["accuracy_loss_percent"] == pytest.approx(loss, abs=0.2)


def _check_told(told: dict[str, Any], report: dict[str, Any]) -> None:
    """The bundle's manifest says what the report says, and of which bytes."""
    assert told["job"]["id"] == report["job_id"]
    assert report["final_metrics"].items() <= told["figures"].items()
    assert told["figures"]["original_accuracy_value"] > 0.9
    digest = {n: hashlib.sha256((DIGITS / n).read_bytes()).hexdigest() for n in ("model.onnx", "calibration.npz")}
    assert told["model"]["sha256"] == digest["model.onnx"]
    assert told["data"]["calibration"][0]["sha256"] == digest["calibration.npz"]
    assert told["data"]["validation"][0]["sha256"] != digest["calibration.npz"]
    deployment = {k: v for k, v in report["deployment_config"].items() if k != "sweep"}
    # A machine that is slow has no time left to make the bundle once more, with what was measured after it.
    assert told["deployment"] == deployment or "not known when the bundle was made" in told["deployment"]["reason"]
    assert deployment["instances"] >= 1


def _check_bundle(bundle: Path, folder: Path, engine: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder)
    names = {p.name for p in folder.iterdir()}
    assert {"infer.py", "manifest.json", "sample_input.npz", "expected_output.npz", "model.onnx"} <= names
    assert (folder / "model.onnx").read_bytes() == engine.read_bytes()
    assert json.loads((folder / "manifest.json").read_text())["engine"]["backend"] == "onnxruntime"
    done = subprocess.run([sys.executable, "infer.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "difference" in done.stdout


def test_the_request_id_reaches_the_worker_and_the_page_is_readable(deployed: Deployment, ended: Ended) -> None:
    deadline, mine = time.monotonic() + 60, set[str]()
    while not {"job_started", "job_ended"} <= mine and time.monotonic() < deadline:  # logged after the commit
        lines = [json.loads(x) for x in deployed.worker_log().splitlines() if x.startswith("{") and x.endswith("}")]
        mine = {line["event"] for line in lines if line.get("correlation_id") == "trace-me-through"}
        time.sleep(0.2)
    assert {"job_started", "job_ended"} <= mine
    report = f"{deployed.url}/v1/jobs/{ended.job['id']}/report"
    page = httpx.get(report, headers={**deployed.headers, "Accept": "text/html"})
    assert page.status_code == 200
    assert "<svg" in page.text
    assert "static int8" in page.text


def test_without_data_only_engines_that_keep_the_arithmetic_may_ship(deployed: Deployment) -> None:
    with deployed.client() as client:
        model = client.upload_model(DIGITS / "model.onnx")
        spec = {
            "model_id": model["id"],
            "benchmark": {"batch_sizes": [1], "min_seconds": 0.1},
            "budget_seconds": paced(10),
        }
        job = client.wait(client.submit(spec)["id"])
        report = client.report(job["id"])
        again = client.wait(client.submit({**spec, "measure": "again"})["id"])
        cached = {(s["name"], s["cached"]) for s in again["stages"]}
        assert {("export", True), ("build", True), ("benchmark", False)} <= cached
        assert ("benchmark", True) not in cached
    assert report["picked"] in ("baseline", "ort-fp32")
    assert any("calibration data" in s["reason"] for s in report["skipped"])
    assert any("calibration data" in advice for advice in report["recommendations"])


def test_what_nobody_can_meet_fails_with_the_nearest_miss_and_a_report(deployed: Deployment) -> None:
    with deployed.client() as client:
        model = client.upload_model(DIGITS / "model.onnx")
        body = {
            "model_id": model["id"],
            "benchmark": {"batch_sizes": [1], "min_seconds": 0.1},
            "constraints": {"max_size_mb": 0.001},
            "budget_seconds": paced(10),
        }
        job = client.wait(client.submit(body)["id"], check=False)
        assert job["status"] == "failed"
        assert job["error"]["code"] == "no_feasible_candidate"
        assert "size_mb" in job["error"]["detail"]
        assert "size_mb" in job["error"]["remedy"]
        report = client.report(job["id"])
    assert report["picked"] is None
    assert not all(check["passed"] for check in report["checks"])


def test_openvino_from_upload_to_a_bundle_that_runs(deployed: Deployment, tmp_path: Path) -> None:
    with deployed.client() as client:
        spec = _spec(client, min_seconds=0.1, budget=25) | {"target": {"backends": ["openvino"]}}
        job = client.wait(client.submit(spec)["id"])
        report = client.report(job["id"])
        tried = {c["id"] for c in report["candidates"]}
        assert {"ov-fp32", "ov-int8"} <= tried
        assert "quantize_nncf" in [s["name"] for s in job["stages"]]
        assert report["search"]["order"]
        bundle = client.download_bundle(job["engine_ids"][0], tmp_path / "bundle.zip")
    folder = tmp_path / "bundle"
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder)
    done = subprocess.run([sys.executable, "infer.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "difference" in done.stdout
