"""Whole jobs on a GPU: an API and workers as real processes, from the upload to the engine's own `infer.py`."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.factories import architectures, programs
from tests.factories.deployment import Deployment, deployment
from tests.gpu.models import make_case
from tests.servers import temporary_folder
from workers import kernel
from workers.devices.cuda import gpus

# Jobs take minutes there, and the first call of a library much of one.
pytestmark = pytest.mark.timeout(1100)

NAME = "vit"
SIZES = {"hidden": 384, "layers": 6}
# The engine that calibrates is begun only where as much of the time for building is left as the others took: two of
# Inductor's builds, 37 to 66 s each alone on an H200, and ONNX Runtime's engine; twice, with room for a slower machine.
# What is not needed is not used: 273 s for all.
BUDGET_OF_BUILDS_S = 900
# Of half a millisecond, of which most is launching: the original against itself scatters by more than a claim allows.
SMALL = {"batch_sizes": [1, 8], "min_seconds": 0.3, "allow_noisy": True}
# The first load of cuDNN and cuBLAS in a fresh process can take its time.
SETTINGS = {"WORKER_STAGE_TIMEOUT_S": "300", "WORKER_LEASE_S": "20", "WORKER_HEARTBEAT_S": "2"}


@pytest.fixture
def served(ort_cuda: kernel.Backend) -> Iterator[Deployment]:
    """Its home is not below /tmp: calls that load an engine of Inductor's have a /tmp of their own then, which they
    need up to torch 2.12."""
    with temporary_folder("gpu", base=Path("/var/tmp")) as folder, deployment(folder / "home", SETTINGS) as found:
        yield found


def submit(client: Any, folder: Path, seed: int, **fields: Any) -> str:
    """A seeded model and its data, as a job for a GPU."""
    folder.mkdir()
    case = make_case(NAME, folder, architectures.vit(**SIZES, seed=seed))
    return submitted(client, case.model / "model.onnx", next(case.data.iterdir()), **fields)


def submitted(client: Any, path: Path, samples: Path, **fields: Any) -> str:
    model, data = client.upload_model(path), client.upload_dataset(samples)
    fields = {"calibration": {"dataset_id": data["id"]}, **fields}
    job: dict[str, Any] = client.submit(
        {
            "model_id": model["id"],
            "target": {"device": "cuda"},
            "validation": {"dataset_id": data["id"], "max_accuracy_loss_percent": 1.0},
            "benchmark": {"batch_sizes": [1, 8], "min_seconds": 1},
            "engines_per_bundle": 1,
            "budget_seconds": 240,
            **fields,
        }
    )
    return str(job["id"])


def test_a_job_from_the_upload_to_an_engine_that_runs(served: Deployment, tmp_path: Path) -> None:
    served.start_worker()
    served.wait_ready()
    with served.client() as client:
        job = client.wait(submit(client, tmp_path / "case", 0), check=False)
        assert job["status"] == "succeeded", (job["error"], served.worker_log()[-3000:])
        report = client.report(job["id"])
        archive = client.download_bundle(job["engine_ids"][0], tmp_path / "bundle.zip")
    assert report["environment"]["hardware"]["kind"] == "gpu"
    assert report["baseline"]["batches"]["1"]["p50_ms"] > 0
    assert report["picked"].startswith(("ortcuda-", "trt-")), [(c["id"], c["reason"]) for c in report["candidates"]]
    assert report["final_metrics"]["accuracy_loss_percent"] <= 1.0
    assert report["final_metrics"]["gpu_memory_mb"] > 50
    assert "ortcuda-fp16-fused" in [c["id"] for c in report["candidates"]]
    folder = inferred(archive, tmp_path / "bundle")
    if report["picked"].startswith("ortcuda-"):
        assert onnx.load(folder / "model.onnx", load_external_data=False).graph.node


def inferred(archive: Path, folder: Path) -> Path:
    """The unpacked bundle, whose own script answered as it says."""
    with zipfile.ZipFile(archive) as bundle:
        bundle.extractall(folder)
    done = subprocess.run([sys.executable, "infer.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "expected_output.npz") as expected, np.load(folder / "output.npz") as got:
        for name in expected.files:
            assert np.allclose(expected[name], got[name], rtol=0.02, atol=0.02)
    return folder


@pytest.mark.filterwarnings("ignore")  # torch's own, of its own deprecations
def test_a_program_is_compiled_in_each_layout_and_precision(served: Deployment, tmp_path: Path) -> None:
    """A `.pt2`: engines of ONNX Runtime and of Inductor, in fp16 with the program's layout and with channels last, and
    in fp8, are made, judged and timed; one of them ships and runs."""
    torch = pytest.importorskip("torch")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no float8 products")
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        args = (torch.zeros(2, 3, 32, 32),)
        program = torch.export.export(programs.convnext(), args, dynamic_shapes=({0: batch},))
    torch.export.save(program, str(tmp_path / "model.pt2"))
    image = np.random.default_rng(7).normal(size=(96, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=image)
    served.start_worker()
    served.wait_ready()
    with served.client() as client:
        fields = {"precisions": ["fp16", "fp8"], "budget_seconds": BUDGET_OF_BUILDS_S, "benchmark": SMALL}
        job_id = submitted(client, tmp_path / "model.pt2", tmp_path / "data.npz", **fields)
        job = client.wait(job_id, check=False)
        assert job["status"] == "succeeded", (job["error"], served.worker_log()[-3000:])
        report = client.report(job_id)
        archive = client.download_bundle(job["engine_ids"][0], tmp_path / "bundle.zip")
    told = {c["id"]: c for c in report["candidates"]}
    for told_part in ("picked", "final_metrics", "stages", "candidates"):  # with `-s`: what took how long, and why
        sys.stdout.write(f"{told_part}: {json.dumps(report[told_part], default=str)}\n")
    for made in ("ortcuda-fp16", "tic-fp16-nhwc", "tic-fp16", "tic-fp8"):
        assert told[made]["failure"] is None
        assert told[made]["batches"], f"{made} was not timed: {told[made]['reason']}"
    assert report["picked"].startswith(("ortcuda-", "tic-")), report["picked"]
    assert report["final_metrics"]["accuracy_loss_percent"] <= 1.0
    inferred(archive, tmp_path / "bundle")


def test_each_worker_has_a_gpu_of_its_own(served: Deployment, tmp_path: Path) -> None:
    cards = gpus.machine_gpus()
    if len(cards) < 2:
        pytest.skip("one GPU")
    for index in (0, 1):
        served.environment |= {"WORKER_GPU": str(index), "WORKER_NAME": f"gpu-{index}"}
        served.start_worker()
    with served.client() as client:
        served.wait_for(lambda: len(client.capabilities()["workers"]) == 2, timeout_s=90)
        ids = [submit(client, tmp_path / f"case{seed}", seed) for seed in (1, 2)]
        jobs = [client.wait(job_id, check=False) for job_id in ids]
        assert [j["status"] for j in jobs] == ["succeeded"] * 2, served.worker_log()[-3000:]
        used = [client.report(j["id"])["environment"]["hardware"]["gpu"]["uuid"] for j in jobs]
    assert len(set(used)) == 2, "both jobs ran on one card"
    begun, ended = ([j[k] for j in jobs] for k in ("started_at", "finished_at"))
    assert max(begun) < min(ended), "one waited for the other"
