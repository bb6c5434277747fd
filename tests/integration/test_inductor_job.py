"""A `.pt2` through the service: an engine that Torch Inductor compiled is built, judged and timed beside the original;
and a compiler that hangs ends with its stage."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from app.domain.failures import StageFailure
from tests.factories import programs
from tests.factories.deployment import deployment
from tests.factories.pace import paced
from workers.artifacts import EXPORTED_PROGRAM
from workers.hardware import CXX, describe
from workers.installation import KEY_BYTES, Installation
from workers.pipeline.isolated import IsolatedRunner
from workers.pipeline.protocol import Limits, StageRequest

pytestmark = [
    pytest.mark.timeout(290),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra `torch`"),
    pytest.mark.skipif(not any(map(shutil.which, CXX)), reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore"),
]

IMAGE = {"image": ("float32", ("batch", 3, 16, 16))}


def test_a_program_is_compiled_judged_and_timed(tmp_path: Path) -> None:
    model = programs.save(programs.cnn(), tmp_path / "net.pt2", IMAGE, {"batch": (1, 64)})
    samples = np.random.default_rng(0).standard_normal((120, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "data.npz", image=samples)
    precision = "bf16" if "avx512_bf16" in describe()["isa"] or "amx_bf16" in describe()["isa"] else "fp32"
    with deployment(tmp_path / "home", {"WORKER_STAGE_TIMEOUT_S": "200"}) as deployed:
        deployed.start_worker()
        deployed.wait_ready()
        with deployed.client() as client:
            spec = {
                "model_id": client.upload_model(model)["id"],
                "validation": {"dataset_id": client.upload_dataset(tmp_path / "data.npz")["id"]},
                "benchmark": {"batch_sizes": [1], "min_seconds": 0.2},
                "target": {"backends": ["inductor"]},
                "precisions": [precision],
                "budget_seconds": paced(90),
            }
            job = client.wait(client.submit(spec)["id"])
            assert job["status"] == "succeeded", deployed.logs()
            report = client.report(job["id"])
            found = {c["id"]: c for c in report["candidates"]}[f"ti-{precision}"]
            assert found["batches"]["1"]["samples"] > 0, found
            assert found["accuracy"]["samples"] > 0
            assert found["details"]["build"]["fused"] == {"batch_norm": 2}
            (made,) = [s for s in client.manifest(job["id"])["stages"] if s["stage"] == "build"]
            assert "torch" in made["libraries"]
            if report["picked"] == f"ti-{precision}":  # whoever is faster here: its bundle runs by itself
                bundle = client.download_bundle(job["engine_ids"][0], tmp_path / "bundle.zip")
                _check_bundle(bundle, tmp_path / "bundle")


def _check_bundle(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    assert {"model.pt2", "engine.json", "interface.json"} <= {p.name for p in folder.iterdir()}
    assert "torch==" in (folder / "requirements.txt").read_text()
    done = subprocess.run(
        [sys.executable, "infer.py", "--repeat", "2"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_compiler_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage's time limit ends it and what it has started; nothing is left in the home folder."""
    outputs = {"y": ("float32", ("batch", 3))}
    row = {"input": ("float32", ("batch", 8))}
    model = programs.folder(programs.linear(), tmp_path / "model", row, outputs, {"batch": (1, 64)})
    (tmp_path / "bin").mkdir()
    hangs = tmp_path / "bin" / "g++"
    hangs.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/started\nexec sleep 600\n")
    hangs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("work", "out"):
        (tmp_path / name).mkdir()
    options: dict[str, Any] = {"backend": "inductor", "options": {"precision": "fp32"}}
    request = StageRequest(
        "build",
        options,
        {"model": str(model)},
        str(tmp_path / "work"),
        str(tmp_path / "out"),
        {"cxx": "g++", "isa": describe()["isa"]},
        Limits(15, 8 << 30, 1 << 30),
        Installation(b"k" * KEY_BYTES).to_json(),
        {"model": EXPORTED_PROGRAM},
    )
    runner = IsolatedRunner()
    runner.start()
    try:
        with pytest.raises(StageFailure) as caught:
            runner.run(request, on_progress=lambda fraction, message: None, should_stop=lambda: False)
    finally:
        runner.close()
    assert caught.value.code == "timed_out"
    started = [int(line) for line in (tmp_path / "started").read_text().split()]
    assert started
    assert not [pid for pid in started if psutil.pid_exists(pid)]
    json.dumps(caught.value.to_json())
