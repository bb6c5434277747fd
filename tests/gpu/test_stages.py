"""Stages on a GPU as a worker runs them, each in a child process: convert, build, validate, benchmark, package; and the
bundle's own script."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.models import Case
from workers.hardware import conditions, fingerprint
from workers.kernel import Backend
from workers.measure.pieces import folder_digest
from workers.pipeline.isolated import IsolatedRunner, StageOutcome
from workers.pipeline.protocol import Limits, StageRequest

BACKEND = "onnxruntime-cuda"
LIMITS = Limits(300, 64 << 30, 8 << 30)


@pytest.fixture(scope="module")
def isolated(ort_cuda: Backend) -> Iterator[IsolatedRunner]:
    runner = IsolatedRunner()
    runner.start()
    yield runner
    runner.close()


class Chain:
    def __init__(self, isolated: IsolatedRunner, root: Path, hardware: dict[str, Any]) -> None:
        self.isolated = isolated
        self.root = root
        self.hardware = hardware

    def run(self, stage: str, inputs: dict[str, Path], **options: Any) -> tuple[Path, StageOutcome]:
        folder = self.root / stage
        (folder / "work").mkdir(parents=True)
        (folder / "out").mkdir()
        paths = {name: str(path) for name, path in inputs.items()}
        request = StageRequest(stage, options, paths, str(folder / "work"), str(folder / "out"), self.hardware, LIMITS)
        return folder / "out", self.isolated.run(request, on_progress=lambda *_: None, should_stop=lambda: False)


def test_a_converted_model_is_built_proven_measured_and_packaged(
    isolated: IsolatedRunner, gpu: dict[str, Any], case: Case, tmp_path: Path
) -> None:
    chain = Chain(isolated, tmp_path, gpu)
    converted, _ = chain.run("convert", {"model": case.model}, recipe="fp16")
    built, outcome = chain.run("build", {"model": converted / "model"}, backend=BACKEND, options={"cuda_graph": True})
    runtime = outcome.data["runtime"]
    assert runtime == {"cuda_graph": True}
    inputs = {"model": case.model, "engine": built / "engine", "data": case.data}
    _, validated = chain.run("validate", inputs, backend=BACKEND, runtime=runtime, metric="cosine")
    assert validated.data["loss_percent"] < 0.1
    _, measured = chain.run(
        "benchmark",
        {"baseline": case.model, "engine.fp16": built / "engine", "data": case.data},
        engines=[{"id": "fp16", "backend": BACKEND, "runtime": runtime}],
        batch_sizes=[1, 8],
        min_seconds=0.3,
        rounds=5,
        baseline_backend=BACKEND,
    )
    figures = measured.data["engines"]["fp16"]
    assert "failed" not in figures
    assert set(figures["batches"]) == {"1", "8"}
    assert figures["batches"]["8"]["profile"]["compute_ms"] > 0
    taken = [measured.data["engines"][name]["gpu_memory_mb"] for name in measured.data["engines"]]
    assert all(50 < mb < 10_000 for mb in taken), "a CUDA context alone takes hundreds of MB"
    assert measured.data["conditions"]["after"]["gpu"]["sm_mhz"] > 0
    packed, _ = chain.run(
        "package",
        {"engine": built / "engine", "data": case.data},
        name="it",
        backend=BACKEND,
        runtime=runtime,
        engine_format="onnx",
        manifest={},
        engine_digest=folder_digest(built / "engine"),
    )
    unpacked = tmp_path / "bundle"
    zipfile.ZipFile(packed / "bundle" / "it-bundle.zip").extractall(unpacked)
    script = next(unpacked.rglob("infer.py"))
    done = subprocess.run(
        [sys.executable, script.name], cwd=script.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "max abs difference to expected_output.npz" in done.stdout


def test_the_gpu_is_described(gpu: dict[str, Any]) -> None:
    card = gpu["gpu"]
    assert gpu["kind"] == "gpu"
    assert gpu["id"].startswith("gpu-")
    assert card["uuid"].startswith("GPU-")
    assert float(card["compute_capability"]) >= 5
    assert card["memory_bytes"] > 1 << 30
    assert card["driver"]
    assert card["cuda"]
    assert fingerprint(gpu) != fingerprint({**gpu, "gpu": {**card, "driver": "other"}})
    assert fingerprint(gpu) == fingerprint({**gpu, "gpu": {**card, "uuid": "another of the same kind"}})
    now = conditions(gpu)["gpu"]
    assert now["temperature_c"] > 0
    assert now["throttled"] is not None
