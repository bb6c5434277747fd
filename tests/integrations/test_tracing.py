"""One trace from a caller's request to the stages of its job, as a collector receives it; a collector that is away."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from app.db.orm import ApiKey
from tests.factories.deployment import Deployment, deployment
from tests.factories.eight_toys_installed import SPEC as EIGHT
from tests.factories.eight_toys_installed import installed
from tests.factories.otlp import Receiver, receiving
from tests.factories.pace import paced
from tests.integration.test_plugin import sum_of_constants
from tests.servers import free_port

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SPEC: dict[str, Any] = {
    "benchmark": {"batch_sizes": [1], "min_seconds": 0.1, "allow_noisy": True},
    "target": {"backends": ["onnxruntime"]},
    "precisions": ["fp32"],
    "budget_seconds": paced(10),
}

pytestmark = pytest.mark.timeout(200)


def submit(found: Deployment, folder: Path, spec: dict[str, Any] = SPEC, **headers: str) -> str:
    with found.client() as client:
        model = client.upload_model(sum_of_constants(folder / "sum.onnx"), "sum")
    headers |= found.headers
    answer = httpx.post(f"{found.url}/v1/jobs", json={"model_id": model["id"], **spec}, headers=headers)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def until(ready: Callable[[], bool], found: Deployment, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, found.logs()
        time.sleep(0.1)


def ended(found: Deployment, job_id: str) -> Callable[[], bool]:
    return lambda: httpx.get(f"{found.url}/v1/jobs/{job_id}").json()["status"] == "succeeded"


def test_a_request_its_job_and_its_stages_are_one_trace(tmp_path: Path) -> None:
    port = free_port()
    with receiving() as receiver:
        told = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "WORKER_METRICS_PORT": str(port)}
        with deployment(tmp_path / "home", told) as found:
            found.start_worker()
            found.wait_ready()
            job_id = submit(found, tmp_path, traceparent=f"00-{TRACE}-{PARENT}-01")
            until(ended(found, job_id), found)
            assert httpx.get(f"{found.url}/v1/jobs/{job_id}").status_code == 200
            metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
            until(lambda: bool(receiver.named("job") and receiver.named("POST /v1/jobs")), found)
    check_trace(receiver, job_id)
    check_metrics(metrics)
    assert {path for path, _ in receiver.requests} == {"/v1/traces"}
    assert {headers["content-type"] for _, headers in receiver.requests} == {"application/x-protobuf"}


def check_trace(receiver: Receiver, job_id: str) -> None:
    (request,) = receiver.named("POST /v1/jobs")
    (job,) = receiver.named("job")
    assert (request["trace_id"], request["parent_id"]) == (TRACE, PARENT), "it goes on below its caller's"
    assert (job["trace_id"], job["parent_id"]) == (TRACE, request["span_id"])
    assert request["resource"]["service.name"] == "anneal-api"
    assert job["resource"]["service.name"] == "anneal-worker"
    assert request["attributes"]["http.response.status_code"] == 202
    attributes = job["attributes"]
    assert (attributes["anneal.job.id"], attributes["anneal.outcome"]) == (job_id, "succeeded")
    assert attributes["anneal.request.id"] == request["attributes"]["anneal.request.id"]
    stages = [span for span in receiver.spans if span["name"].startswith("stage ")]
    assert {"stage export", "stage build", "stage benchmark", "stage package"} <= {span["name"] for span in stages}
    for span in stages:
        assert (span["trace_id"], span["parent_id"]) == (TRACE, job["span_id"])
        assert span["attributes"]["anneal.outcome"] in ("succeeded", "failed")
        assert isinstance(span["attributes"]["anneal.cached"], bool)
    built = next(span for span in stages if span["name"] == "stage build")
    assert built["attributes"]["anneal.backend"] == "onnxruntime"
    polls = [span["name"] for span in receiver.spans if span["name"].startswith("GET")]
    assert polls == [], "polls that nobody traces are not recorded"
    others = [span for span in receiver.spans if span["trace_id"] != TRACE]
    assert {span["name"] for span in others} == {"POST /v1/models"}, "an upload of its own"


def check_metrics(metrics: str) -> None:
    lines = metrics.splitlines()
    assert any(line.startswith('anneal_stage_seconds_count{backend="onnxruntime",stage="build"}') for line in lines)
    (ended,) = [line for line in lines if "anneal_job_attempt_seconds_count{" in line]
    assert 'outcome="succeeded"' in ended
    assert "anneal_job_budget_used_ratio_count 1.0" in lines
    assert "anneal_worker_busy 0.0" in lines


def test_what_helpers_do_belongs_to_the_job(tmp_path: Path) -> None:
    """One job on three workers is one trace, and every line about it says whose key it was submitted with."""
    with receiving() as receiver:
        told = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "PYTHONPATH": str(installed(tmp_path / "site")),
            "TOY_SECONDS": "0.5",
            "ANNEAL_REQUIRE_KEYS": "true",
            "ANNEAL_LOG_JSON": "true",
        }
        with deployment(tmp_path / "home", told) as found:
            found.api_key = found.create_key("test")
            for _ in range(3):
                found.start_worker()
            with found.client() as client:
                found.wait_for(lambda: len(client.capabilities()["workers"]) == 3)
                job_id = submit(found, tmp_path, EIGHT, traceparent=f"00-{TRACE}-{PARENT}-01")
                until(lambda: bool(receiver.named("help")), found)
                client.cancel(job_id)
                client.wait(job_id, check=False)
            until(lambda: bool(receiver.named("job")), found)
            key_id, log = key_of(found), found.worker_log()
    (job,), helps = receiver.named("job"), receiver.named("help")
    for help_ in helps:
        assert (help_["trace_id"], help_["parent_id"]) == (TRACE, job["span_id"])
        assert help_["attributes"]["anneal.job.id"] == job_id
        assert help_["attributes"]["anneal.outcome"] in ("answered", "interrupted", "lease_lost")
        assert help_["resource"]["service.instance.id"] != job["resource"]["service.instance.id"]
    theirs = [span for span in receiver.spans if span["parent_id"] in {help_["span_id"] for help_ in helps}]
    assert "stage toy_slow_fold" in {span["name"] for span in theirs}
    assert {span["trace_id"] for span in theirs} == {TRACE}
    check_lines(log, job_id, key_id)


def key_of(found: Deployment) -> str:
    db = found.database()
    try:
        with db.read() as session:
            return str(session.scalars(select(ApiKey.id)).one())
    finally:
        db.close()


def check_lines(log: str, job_id: str, key_id: str) -> None:
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{") and line.endswith("}")]
    (submitted,) = {line["correlation_id"] for line in lines if line["event"] == "job_started"}
    about = [
        line for line in lines if line["event"] in ("job_started", "job_interrupted", "help_started", "help_ended")
    ]
    assert {"job_started", "help_started", "help_ended"} <= {line["event"] for line in about}
    for line in about:
        assert (line["job_id"], line["correlation_id"]) == (job_id, submitted)
        assert line["event"] == "job_interrupted" or (line["key_id"], bool(line["tenant_id"])) == (key_id, True), line


def test_a_collector_that_is_away_costs_spans_alone(tmp_path: Path) -> None:
    with receiving() as receiver:
        receiver.refuses = True
        told = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
        with deployment(tmp_path / "home", told) as found:
            found.start_worker()
            found.wait_ready()
            until(ended(found, submit(found, tmp_path)), found)
            assert receiver.requests, "it was tried"
            began = time.monotonic()
            found.close()
            assert time.monotonic() - began < 10, "nobody waits for it at the end"
            api, worker = found.processes
            assert (api.returncode, worker.returncode) == (-signal.SIGTERM, 0), found.logs()
