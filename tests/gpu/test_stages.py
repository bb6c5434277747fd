"""Stages on a GPU as a worker runs them, each in a confined child process: convert, build, validate, benchmark,
package; the bundle's own script; and a build that calls compilers."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories import programs
from tests.gpu.models import Case
from tests.servers import temporary_folder
from workers import installation
from workers.artifacts import EXPORTED_PROGRAM
from workers.backends.inductor import InductorCudaBackend
from workers.hardware import conditions, fingerprint
from workers.installation import KEY_BYTES, Installation
from workers.kernel import Backend
from workers.measure.pieces import folder_digest
from workers.pipeline.isolated import IsolatedRunner, StageOutcome
from workers.pipeline.protocol import Limits, StageRequest

BACKEND = "onnxruntime-cuda"
LIMITS = Limits(300, 64 << 30, 8 << 30)
KEY = Installation(b"k" * KEY_BYTES)  # engines that are native code are signed


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

    def run(
        self, stage: str, inputs: dict[str, Path], kinds: dict[str, str] | None = None, **options: Any
    ) -> tuple[Path, StageOutcome]:
        folder = self.root / stage
        (folder / "work").mkdir(parents=True)
        (folder / "out").mkdir()
        paths = {name: str(path) for name, path in inputs.items()}
        own = str(folder / "work"), str(folder / "out")
        request = StageRequest(stage, options, paths, *own, self.hardware, LIMITS, KEY.to_json(), kinds or {})
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


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder that is not below /tmp: calls that load an engine of Inductor's have a /tmp of their own then."""
    with temporary_folder("gpu", base=Path("/var/tmp")) as folder:
        yield folder


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # torch's own, of its own deprecations
def test_a_program_is_compiled_where_the_call_is_confined(
    isolated: IsolatedRunner, gpu: dict[str, Any], elsewhere: Path
) -> None:
    """Inductor starts compilers, moves what they wrote into its caches, and times kernels on the GPU."""
    pytest.importorskip("torch")
    image, logits = {"image": ("float32", ("batch", 3, 16, 16))}, {"logits": ("float32", ("batch", 10))}
    net = programs.cnn()
    model = programs.folder(net, elsewhere / "model", image, logits, {"batch": (1, 64)})
    built, outcome = Chain(isolated, elsewhere, gpu).run(
        "build",
        {"model": model},
        {"model": EXPORTED_PROGRAM},
        backend=InductorCudaBackend.name,
        options={"precision": "fp16", "batch": 8},
    )
    feeds = {"image": np.random.default_rng(0).standard_normal((3, 3, 16, 16), dtype=np.float32)}
    with installation.using(KEY):
        session = InductorCudaBackend().load(built / "engine", outcome.data["runtime"])
        found = session.run(feeds)["logits"]
        session.close()
    wanted = programs.answers(net, feeds)[0]
    assert np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max()


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
