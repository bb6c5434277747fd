"""A `.pt2` through the service with training: its weights learn, come out as ONNX again, and are judged as others."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories import programs
from tests.factories.deployment import deployment, kill, wait_for_stage

pytestmark = [
    pytest.mark.timeout(290),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra `torch`"),
    pytest.mark.filterwarnings("ignore"),
]

IMAGE = {"input": ("float32", ("batch", 1, 8, 8))}


def test_weights_are_trained_judged_and_reported(tmp_path: Path) -> None:
    """Though its worker is killed meanwhile."""
    model = programs.save(programs.brittle(), tmp_path / "net.pt2", IMAGE, {"batch": (1, 64)})
    chance = np.random.default_rng(0)
    for name, count in (("training", 160), ("judging", 240)):
        np.savez(tmp_path / f"{name}.npz", input=chance.standard_normal((count, 1, 8, 8), dtype=np.float32))
    with deployment(tmp_path / "home", {"WORKER_STAGE_TIMEOUT_S": "100"}) as deployed:
        deployed.start_api()
        worker, db = deployed.start_hurried_worker(), deployed.database()
        deployed.wait_ready()
        with deployed.client() as client:
            spec: dict[str, Any] = {
                "model_id": client.upload_model(model)["id"],
                "calibration": {"dataset_id": client.upload_dataset(tmp_path / "training.npz")["id"]},
                "validation": {
                    "dataset_id": client.upload_dataset(tmp_path / "judging.npz")["id"],
                    "metric": "normalized_error",
                },
                "quantization": {
                    "win_back": False,
                    "training": {"mode": "always", "epochs": 8, "learning_rate": 5e-4, "max_seconds": 60},
                },
                "benchmark": {"batch_sizes": [1], "min_seconds": 0.1},
                "target": {"backends": ["onnxruntime"]},
                "precisions": ["int8"],
                "budget_seconds": 600,  # a busy machine takes its time over what takes seconds
            }
            job_id = client.submit(spec)["id"]
            if wait_for_stage(db, job_id, {"train"}, 200) is not None:
                kill(worker)
                deployed.start_hurried_worker()
            job = client.wait(job_id)
            db.close()
            assert job["status"] == "succeeded", deployed.logs()
            assert job["spec"]["quantization"]["training"]["max_seconds"] == 60
            found = {c["id"]: c for c in client.report(job_id)["candidates"]}
    plain, trained = found["ort-int8-static"], found["ort-int8-static.trained"]
    assert "train" in trained["details"], (trained["reason"], trained["search"])
    done = trained["details"]["train"]["training"]
    assert done["loss"] < done["loss_before"]
    assert [e["step"] for e in done["curve"]][:2] == [0, 5]
    assert trained["details"]["quantize"]["calibration"]["learned"] > 5
    assert trained["accuracy"]["loss_percent"] < plain["accuracy"]["loss_percent"], (trained, plain)
    assert trained["accuracy"]["samples"] > 0
    assert "quantization-aware training" in trained["recipe"]
