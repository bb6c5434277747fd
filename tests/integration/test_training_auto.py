"""Whole jobs with `training.mode: auto`: trained where nothing else keeps the limit and the budget holds it, never
elsewhere, and never twice; and a training that is cancelled over HTTP."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from anneal_client import Client
from tests.factories import programs
from tests.factories.deployment import Deployment, deployment, descendants, gone

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra `torch`"),
    # Many minutes, and a busy machine claims nothing, so that nothing that was trained ships.
    pytest.mark.skipif("ANNEAL_QUIET" not in os.environ, reason="ANNEAL_QUIET=1, on a machine that does nothing else"),
    pytest.mark.filterwarnings("ignore"),
]

IMAGE = {"input": ("float32", ("batch", 3, 16, 16))}
TRAINED = "ort-int8-static.trained"


@dataclass
class Service:
    """With two models of one architecture: `brittle` loses in int8 whatever is calibrated and half of it kept, `good`
    does not."""

    deployed: Deployment
    client: Client
    models: dict[str, str]
    training: str
    judging: str

    def submit(self, model: str, budget: int = 1500, **training: Any) -> str:
        """The id of the job."""
        spec = {
            "model_id": self.models[model],
            "calibration": {"dataset_id": self.training},
            "validation": {"dataset_id": self.judging, "metric": "cosine", "max_accuracy_loss_percent": 1.0},
            "quantization": {"training": {"epochs": 4, "max_seconds": 600, **training}},
            "benchmark": {"batch_sizes": [1], "min_seconds": 0.2, "allow_noisy": True},
            "target": {"backends": ["onnxruntime"]},
            "precisions": ["fp32", "int8"],
            "engines_per_bundle": 1,
            "budget_seconds": budget,  # a busy machine takes its time over what takes seconds
        }
        return str(self.client.submit(spec)["id"])

    def done(self, model: str, budget: int = 1500, **training: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The job and its report."""
        job: dict[str, Any] = dict(self.client.wait(self.submit(model, budget, **training)))
        assert job["status"] == "succeeded", self.deployed.logs()
        return job, dict(self.client.report(job["id"]))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("auto")
    chance = np.random.default_rng(0)
    for name, count in (("training", 320), ("judging", 400)):
        np.savez(folder / f"{name}.npz", input=chance.standard_normal((count, 3, 16, 16), dtype=np.float32))
    with deployment(folder / "home", {"WORKER_STAGE_TIMEOUT_S": "1000"}) as deployed, deployed.client() as client:
        deployed.start_hurried_worker()
        deployed.wait_ready()
        models = {}
        for name in ("good", "brittle"):
            net = programs.convolutions(unlike=name == "brittle")
            path = programs.save(net, folder / f"{name}.pt2", IMAGE, {"batch": (1, 64)})
            models[name] = client.upload_model(path)["id"]
        sets = [client.upload_dataset(folder / f"{name}.npz")["id"] for name in ("training", "judging")]
        yield Service(deployed, client, models, *sets)


def _trainings(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [stage for stage in job["stages"] if stage["name"] == "train"]


def _speedup(report: dict[str, Any]) -> float:
    found = next((c for c in report["candidates"] if c["id"] == report["picked"]), None)
    return 1.0 if found is None else float(found["batches"]["1"]["speedup"]["ratio"])


def test_a_brittle_model_ships_trained_where_a_slower_engine_shipped(service: Service) -> None:
    """Unless the machine is too busy to claim anything: then the original ships, and the trained one is kept."""
    job, report = service.done("brittle", mode="auto")
    found = {c["id"]: c for c in report["candidates"]}
    kept = {cid: c for cid, c in found.items() if c["status"] in ("picked", "kept") and c["precision"] == "int8"}
    assert kept, [(c["id"], c["reason"]) for c in report["candidates"]]
    assert all(cid.startswith(TRAINED) for cid in kept), "or with other runtime options"
    assert all(c["accuracy"]["loss_percent"] <= 1.0 for c in kept.values())
    assert found["ort-int8-static"]["accuracy"]["loss_percent"] > 1.0
    assert found[TRAINED]["details"]["train"]["training"]["channels_equalized"] > 0
    assert not any(stage["cached"] for stage in _trainings(job))
    without, other = service.done("brittle", mode="off")
    assert not _trainings(without)
    assert not [c for c in other["candidates"] if c["status"] in ("picked", "kept") and c["precision"] == "int8"]
    if report["picked"] != "baseline":
        assert report["picked"] in kept
        assert _speedup(report) > _speedup(other)


def test_the_same_job_again_is_trained_from_the_cache(service: Service) -> None:
    service.done("brittle", mode="auto")
    again, report = service.done("brittle", mode="auto")
    assert _trainings(again)
    assert all(stage["cached"] for stage in _trainings(again))
    assert {c["id"] for c in report["candidates"]} >= {TRAINED}


def test_a_budget_that_does_not_hold_it_says_so_before_it_begins(service: Service) -> None:
    job, report = service.done("brittle", mode="auto", epochs=1000, max_seconds=30_000)
    assert not _trainings(job)
    told = [e for c in report["candidates"] for e in c["search"] if e["decision"] == "not trained"]
    assert told
    assert "expected to take" in told[0]["reason"]


def test_a_good_model_is_never_trained(service: Service) -> None:
    job, report = service.done("good", mode="auto")
    assert not _trainings(job)
    assert not [c["id"] for c in report["candidates"] if "trained" in c["id"]]
    assert not [e for c in report["candidates"] for e in c["search"] if "train" in str(e)]


def test_a_training_is_cancelled_over_http_within_ten_seconds(service: Service) -> None:
    """In the midst of its steps; its process is gone, nothing of it is stored, and the worker takes the next job."""
    job_id = service.submit("good", 3000, mode="always", epochs=100, max_seconds=3000)
    url = f"{service.deployed.url}/v1/jobs/{job_id}"
    seen: list[str] = []
    for event in service.client.events(job_id):
        message = str(event.data.get("message", ""))
        seen.append(f"{event.type} {event.data.get('stage')} {message}")
        if message.startswith("step "):
            break
        assert not event.terminal, seen[-20:]
    (worker,) = [p for p in service.deployed.processes if "tests.factories.hurried" in p.args]
    family: list[psutil.Process] = [p for p in descendants(worker) if p.name() == "anneal-stage"]
    assert family
    began = time.monotonic()
    answer = httpx.post(f"{url}/cancel")
    assert answer.status_code == 202
    while (status := httpx.get(url).json()["status"]) != "cancelled":
        assert status == "running"
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    assert gone(family, timeout_s=10 - (time.monotonic() - began))
    assert time.monotonic() - began < 10
    assert httpx.get(f"{url}/report").status_code == 404
    assert worker.poll() is None
    service.done("good", mode="off")
