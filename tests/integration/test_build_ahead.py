"""Build here, run there: a CPU worker with the real TensorRT for RTX builds for a job that waits for a GPU; a worker
that stands for that GPU finds the plans made, proves and measures them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anneal_client import Client, InvalidRequest
from tests.factories import onnx_models as models
from tests.factories.deployment import Deployment, deployment, kill
from tests.factories.pace import paced

TARGET = {"compute_capability": "8.9", "backends": ["tensorrt-rtx"]}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Deployment]:
    with deployment(tmp_path / "home") as found:
        yield found


def submit(client: Client, folder: Path, seed: int, **changes: Any) -> dict[str, Any]:
    model = models.save(models.mlp(features=16, hidden=32, classes=4, seed=seed), folder / f"net{seed}.onnx")
    spec = {
        "model_id": client.upload_model(model)["id"],
        "target": TARGET,
        "precisions": ["fp32"],
        "validation": {"max_accuracy_loss_percent": 100},
        "benchmark": {"batch_sizes": [1], "min_seconds": 0.1},
        "budget_seconds": paced(20),
    }
    return client.submit({**spec, **changes})


def builds(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {s["candidate"]: s for s in job["stages"] if s["name"] == "build"}


def wait_until(client: Client, job_id: str, done: Any, timeout_s: float = 60) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        job = client.job(job_id)
        if done(job):
            return job
        time.sleep(0.05)
    raise TimeoutError(job)


def test_built_here_proven_there_and_a_lost_builder_costs_nothing(served: Deployment, tmp_path: Path) -> None:
    builder = served.start("tests.factories.tensorrt_rtx_builder")
    served.wait_ready()
    with served.client() as client:
        (worker,) = client.capabilities()["workers"]
        assert "fp8" in worker["builds"]["tensorrt-rtx"]["8.9"]
        assert "fp8" not in worker["builds"]["tensorrt-rtx"]["8.6"]
        assert "tensorrt-rtx" not in {b["name"] for b in worker["backends"]}, "it runs nothing of it"
        for target, precisions in (({"compute_capability": "9.0"}, None), ({"compute_capability": "8.6"}, ["fp8"])):
            with pytest.raises(InvalidRequest) as caught:
                submit(client, tmp_path, 0, target=target, precisions=precisions)
            assert caught.value.code == "unavailable_target"

        asked = submit(client, tmp_path, 1)
        assert asked["stages"][0]["status"] == "waiting"
        assert "GPU of compute capability 8.9" in asked["stages"][0]["detail"]
        assert asked["spec"]["target"]["device"] == "cuda"
        waits = wait_until(client, asked["id"], lambda j: len(builds(j)) == 2)
        assert {c: s["status"] for c, s in builds(waits).items()} == {"rtx-tf32": "succeeded", "rtx-fp32": "running"}
        assert waits["stages"][0] == asked["stages"][0], "it still waits"
        assert (waits["status"], waits["progress"], waits["stage"]) == ("queued", 0, None)
        assert not {s["name"] for s in waits["stages"]} & {"validate", "benchmark", "package"}
        assert not waits["engine_ids"], "nothing unmeasured ships"
        kill(builder)

        served.start("tests.factories.tensorrt_rtx_worker")
        job = client.wait(asked["id"])
        assert job["status"] == "succeeded"
        found = builds(job)
        assert (found["rtx-tf32"]["cached"], found["rtx-fp32"]["cached"]) == (True, False), "none is built twice"
        measured = {c["id"]: c for c in client.report(job["id"])["candidates"]}
        for candidate in ("rtx-tf32", "rtx-fp32"):
            assert measured[candidate]["batches"]["1"]["samples"] > 0, measured[candidate]["reason"]
        plans = {f["sha256"] for s in client.manifest(job["id"])["stages"] if s["stage"] == "build" for f in _files(s)}
        (written,) = (served.home / "cache" / "standin-plans").glob("*.onnx")
        assert written.stem in plans, "the plan that was measured is the real builder's"


def _files(stage: dict[str, Any]) -> list[dict[str, Any]]:
    return [f for files in stage["outputs"].values() for f in files]
