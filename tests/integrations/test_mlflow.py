"""MLflow 3 as its users run it: a tracking server with a registry in SQLite and webhooks. Jobs come into runs, engines
into the registry and out of it again."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integrations.conftest import CLIENT, KEPT, MISSED, Service, asked
from tests.integrations.environments import REPOSITORY, environment
from tests.servers import answers, free_port, running

CHECK = Path(__file__).with_name("mlflow_check.py")
SECRET = "the webhook's secret"

pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True)
class Tracking:
    """`artifacts`: where the server keeps what is logged."""

    url: str
    artifacts: Path
    folder: Path

    def asked(self, *arguments: object) -> dict[str, Any]:
        return asked("mlflow", CHECK, *arguments, variables=self.variables)

    @property
    def variables(self) -> dict[str, str]:
        return {"MLFLOW_TRACKING_URI": self.url, "GIT_PYTHON_REFRESH": "quiet", "MLFLOW_DISABLE_TELEMETRY": "true"}

    def command(self, *arguments: object, **variables: str) -> list[str | Path]:
        """To run Python in MLflow's environment."""
        told = {**self.variables, "PYTHONPATH": str(CLIENT), **variables}
        python = environment("mlflow") / "bin" / "python"
        path = f"PATH={python.parent}:{os.environ['PATH']}"
        return ["/usr/bin/env", path, *(f"{n}={v}" for n, v in told.items()), python, *map(str, arguments)]


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    found = Tracking(f"http://127.0.0.1:{port}", folder / "artifacts", folder)
    options = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", found.artifacts]
    command = found.command(
        *("-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", 1, *options),
        # Webhooks go to public addresses by https unless the operator says otherwise.
        MLFLOW_WEBHOOK_ALLOWED_SCHEMES="http",
        MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS="true",
        MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY="MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=",
        MLFLOW_WEBHOOK_CACHE_TTL="0",
    )
    with running(command, log=folder / "server.log", ready=lambda: answers(port), timeout_s=90):
        yield found


@pytest.fixture(scope="module")
def logged(tracking: Tracking, service: Service) -> dict[str, Any]:
    return tracking.asked("log", service.url, service.model, json.dumps(KEPT), json.dumps(MISSED))


def test_a_job_is_logged_and_its_engine_registered(logged: dict[str, Any]) -> None:
    metrics, params, tags = logged["metrics"], logged["params"], logged["tags"]
    assert logged["files"] == [
        f"anneal/{n}" for n in ("candidates.json", "manifest.json", "report.html", "report.json")
    ]
    assert metrics["anneal/latency_ms"] == pytest.approx(logged["report"]["latency_ms"])
    assert metrics["anneal/speedup"] > 1
    assert metrics["anneal/batch_1/p50_ms"] > 0
    assert params["anneal.target.backends"] == '["toy"]'
    assert tags["anneal.promise"] in ("kept", "unproven"), "unproven where this machine is busy"
    assert (tags["anneal.backend"], tags["team"]) == ("toy", "a")
    assert tags["anneal.engine_sha256"] == logged["engine"]["sha256"]
    assert "speed-up" in logged["description"]


def test_the_engine_comes_out_of_the_registry(logged: dict[str, Any], tracking: Tracking, service: Service) -> None:
    found = tracking.asked("load")
    assert found["flavors"] == ["anneal", "python_function"]
    rows = np.arange(32, dtype=np.float32).reshape(2, 16)
    np.testing.assert_array_equal(np.array(found["output"], np.float32), rows + total_of(service.model))


def total_of(model: Path) -> np.ndarray:
    """What the model adds."""
    import onnx

    total: np.ndarray = sum(onnx.numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer)
    return total


def test_weights_are_stored_once(logged: dict[str, Any], tracking: Tracking, service: Service, tmp_path: Path) -> None:
    with service.deployed.client() as client:
        bundle = client.download_bundle(logged["engine"]["id"], tmp_path / "bundle.zip")
    with zipfile.ZipFile(bundle) as archive:
        weights = hashlib.sha256(archive.read("sum.npy")).hexdigest()
    stored = [p for p in tracking.artifacts.rglob("*") if p.is_file()]
    same = [p for p in stored if hashlib.sha256(p.read_bytes()).hexdigest() == weights]
    assert len(same) == 1, same
    assert not [p for p in stored if p.suffix in (".zip", ".tar")]


def test_mlflow_serves_it_without_the_client(logged: dict[str, Any], tracking: Tracking, service: Service) -> None:
    port = free_port()
    serve = ("-m", "mlflow", "models", "serve", "-m", "models:/sums@fast", "--env-manager", "local")
    command = tracking.command(*serve, "--host", "127.0.0.1", "--port", port, PYTHONPATH="")
    with running(command, log=tracking.folder / "serve.log", ready=lambda: answers(port), timeout_s=90):
        body = json.dumps({"inputs": {"input": [[1.0] * 16]}}).encode()
        asked_for = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked_for, timeout=30) as answer:
            found = json.load(answer)["predictions"]["output"]
    np.testing.assert_array_equal(np.array(found, np.float32), 1 + total_of(service.model)[None])


def test_what_is_registered_is_optimized(tracking: Tracking, service: Service) -> None:
    version = tracking.asked("register", "nets", service.model, "champion")["version"]
    found = tracking.asked("registered", service.url, "models:/nets@champion", json.dumps(KEPT))
    assert (found["name"], found["version"]) == ("nets-anneal", "1")
    assert found["source"]["anneal.state"] == "registered"
    assert found["source"]["anneal.engine_version"] == f"models:/nets-anneal/{version}"
    rows = np.arange(32, dtype=np.float32).reshape(2, 16)
    np.testing.assert_array_equal(np.array(found["output"], np.float32), rows + total_of(service.model))


def test_weights_beside_a_model_go_with_it(tracking: Tracking, service: Service, tmp_path: Path) -> None:
    found = tracking.asked("external", service.url, tmp_path)
    assert found["file"] == "model.onnx"
    assert found["size"] < 16 * 64 * 4 < found["uploaded"]["size_bytes"], "the weights lie beside the file"
    assert found["uploaded"]["outputs"][0]["shape"] == ["batch", 64]


def test_what_the_page_tells_to_do_does_it(
    logged: dict[str, Any], tracking: Tracking, service: Service, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", input=np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32))
    page = REPOSITORY / "docs" / "platforms.md"
    job = logged["tags"]["anneal.job_id"]
    found = tracking.asked("documented", service.url, page, job, service.model, json.dumps(KEPT), tmp_path / "data.npz")
    assert (found["blocks"], found["versions"]) == (2, 2)
    rows = np.arange(32, dtype=np.float32).reshape(2, 16)
    np.testing.assert_array_equal(np.array(found["output"], np.float32), rows + total_of(service.model))


@contextmanager
def receiver(tracking: Tracking, service: Service, port: int, *options: object) -> Iterator[Any]:
    """The webhook's receiver, until the context ends or it is killed."""
    spec = tracking.folder / "spec.json"
    spec.write_text(json.dumps(KEPT))
    run = ("-m", "anneal_client.mlflow.webhook", "--anneal", service.url, "--port", port, "--spec", spec, *options)
    command = tracking.command(*run, ANNEAL_WEBHOOK_SECRET=SECRET)
    log = tracking.folder / f"receiver-{time.monotonic_ns()}.log"
    with running(command, log=log, ready=lambda: answers(port), timeout_s=60) as process:
        yield process


def test_an_alias_that_is_set_starts_a_job_and_its_engine_is_registered(tracking: Tracking, service: Service) -> None:
    port = free_port()
    tracking.asked("webhook", f"http://127.0.0.1:{port}/", SECRET, "model_version_alias.created")
    with receiver(tracking, service, port, "--alias", "release", "--set-alias", "ready"):
        version = tracking.asked("register", "hooked", service.model, "release")["version"]
        tags = tracking.asked("version_of", "hooked", version, "registered", 60)["tags"]
        assert tags["anneal.state"] == "registered", tags
        assert tags["anneal.engine_version"] == "models:/hooked-anneal/1"
        # Another alias, another secret, no signature: nothing begins.
        other = tracking.asked("register", "hooked", service.model, "other")["version"]
        assert post(port, {}) == 401
        assert (
            post(port, {"X-MLflow-Signature": "v1,AAAA", "X-MLflow-Timestamp": "1", "X-MLflow-Delivery-Id": "d"}) == 401
        )
        assert "anneal.state" not in tracking.asked("version_of", "hooked", other, "accepted", 1)["tags"]


def post(port: int, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    event = {"entity": "model_version_alias", "action": "created", "data": {"name": "hooked", "version": "1"}}
    connection.request("POST", "/", json.dumps(event), headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_what_was_accepted_is_done_though_the_receiver_dies(tracking: Tracking, service: Service) -> None:
    """A new version starts a job; its engine, a new version too, starts none."""
    port = free_port()
    tracking.asked("webhook", f"http://127.0.0.1:{port}/", SECRET, "model_version.created")
    options = ("--model", "lasting", "--register-as", "lasting")
    with receiver(tracking, service, port, *options) as process:
        version = tracking.asked("register", "lasting", service.model)["version"]
        tracking.asked("version_of", "lasting", version, "accepted,submitted,registered", 30)
        process.kill()
        process.wait()
    with receiver(tracking, service, port, *options):
        tags = tracking.asked("version_of", "lasting", version, "registered", 60)["tags"]
        assert tags["anneal.state"] == "registered", tags
        time.sleep(1.0)  # for the event of the engine's own version to come
    found = tracking.asked("versions", "lasting")["tags"]
    assert sorted("anneal.source" in tags for tags in found) == [False, True]
    assert [tags for tags in found if "anneal.source" in tags and "anneal.state" in tags] == []
