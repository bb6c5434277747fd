"""A whole job on a worker whose operator has a tritonserver: its bundle is tried there, and loads again as sent."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.factories import onnx_models as models
from tests.factories.deployment import deployment
from tests.factories.pace import paced
from tests.integrations.tritonserver import tritonserver
from workers.serving.triton_server import CALLS, Example, replayed, running

pytestmark = pytest.mark.timeout(200)


def test_a_job_tries_its_bundle_in_the_operators_server(tmp_path: Path) -> None:
    server = tritonserver()
    with deployment(tmp_path / "home", {"WORKER_TRITONSERVER": str(server)}) as found:
        found.start_worker()
        found.wait_ready()
        with found.client() as client:
            model = client.upload_model(models.save(models.mlp(hidden=64), tmp_path / "net.onnx"), "net")
            spec = {
                "model_id": model["id"],
                "benchmark": {"batch_sizes": [1, 4], "min_seconds": 0.2, "allow_noisy": True},
                "target": {"backends": ["onnxruntime"]},
                "precisions": ["fp32"],
                "budget_seconds": paced(40),
            }
            job = client.wait(client.submit(spec)["id"])
            told = client.report(job["id"])["bundles"]["triton"]
            assert told.get("tried", told).get("requests") == CALLS, told
            (engine,) = job["engine_ids"]
            bundle = client.download_bundle(engine, tmp_path / "bundle.zip")
            models_tar = client.download_bundle(engine, tmp_path / "models.tar", kind="triton")
    with tarfile.open(models_tar) as archive:
        archive.extractall(tmp_path / "models", filter="data")
    arrays = {}
    with zipfile.ZipFile(bundle) as stored:
        for name in ("sample_input.npz", "expected_output.npz"):
            with np.load(io.BytesIO(stored.read(name))) as found_arrays:
                arrays[name] = {key: found_arrays[key] for key in found_arrays.files}
    (folder,) = (tmp_path / "models").iterdir()
    with running(server, tmp_path / "models", tmp_path, 60.0) as ready:
        example = Example(folder.name, arrays["sample_input.npz"], arrays["expected_output.npz"], True, "fp32")
        assert replayed(ready, example)["largest_difference"] < 1e-3
