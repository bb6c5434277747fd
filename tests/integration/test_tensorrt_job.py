"""The stages with the TensorRT backend in real child processes, on the stand-ins: what a job on a GPU worker goes
through; and that a machine without a GPU never touches a GPU library."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from anneal_client import Client
from app.domain.failures import FailureKind, StageFailure
from tests.factories import onnx_models as models
from tests.factories.cuda_standin import HARDWARE
from tests.factories.deployment import Deployment, deployment
from tests.factories.pace import paced
from workers.installation import KEY_BYTES, Installation
from workers.pipeline.isolated import Interrupted, IsolatedRunner, StageOutcome
from workers.pipeline.protocol import Limits, StageRequest

HANDED = Installation(b"k" * KEY_BYTES).to_json()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def isolated() -> Iterator[IsolatedRunner]:
    runner = IsolatedRunner(["tests.factories.tensorrt_installed"])
    runner.start()
    yield runner
    runner.close()


class Job:
    """Stage calls one after the other, each with its folders below `folder`."""

    def __init__(self, isolated: IsolatedRunner, folder: Path) -> None:
        self.isolated, self.folder, self.calls = isolated, folder, 0
        self.progress: list[tuple[float, str]] = []

    def call(
        self,
        stage: str,
        inputs: dict[str, Path],
        options: dict[str, Any],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> tuple[StageOutcome, Path]:
        self.calls += 1
        work, out = (self.folder / f"{self.calls}-{part}" for part in ("work", "out"))
        work.mkdir(parents=True)
        out.mkdir()
        paths = {name: str(path) for name, path in inputs.items()}
        limits = Limits(120, 8 << 30, 1 << 30)
        request = StageRequest(stage, options, paths, str(work), str(out), dict(HARDWARE), limits, HANDED)
        tell = lambda fraction, message: self.progress.append((fraction, message))  # noqa: E731
        return self.isolated.run(request, on_progress=tell, should_stop=should_stop), out


def build_options(**options: Any) -> dict[str, Any]:
    return {"backend": "tensorrt", "options": {"timing_cache": False, **options}}


def activation(op: str) -> onnx.ModelProto:
    """A perceptron whose activation is `op`."""
    model = models.mlp()
    act = next(n for n in model.graph.node if n.name == "act")
    act.op_type = op
    return model


def test_build_validate_benchmark_package(isolated: IsolatedRunner, tmp_path: Path) -> None:
    job = Job(isolated, tmp_path)
    model = models.folder(models.conv_net(), tmp_path / "model")
    built, out = job.call("build", {"model": model}, build_options(batch_sizes=[1, 8], cuda_graph=True))
    assert built.data["fused"]["conv+bn+relu"] == 2
    assert built.data["versions"]["tensorrt"].startswith("11.")
    engine, runtime = out / "engine", built.data["runtime"]

    options = {"backend": "tensorrt", "runtime": runtime}
    checked, _ = job.call("validate", {"model": model, "engine": engine}, options)
    assert checked.data["broken"] is None

    engines = [{"id": "trt-fp32", "backend": "tensorrt", "runtime": runtime}]
    timed, _ = job.call(
        "benchmark",
        {"baseline": model, "engine.trt-fp32": engine},
        {"engines": engines, "batch_sizes": [1], "min_seconds": 0.2, "rounds": 5},
    )
    assert timed.data["engines"]["trt-fp32"]["batches"]["1"]["samples"] > 0

    profiled, _ = job.call("profile", {"engine": engine}, options)
    assert profiled.data["layer_count"] == 9

    packaged, out = job.call(
        "package",
        {"engine": engine},
        {
            "name": "net",
            "backend": "tensorrt",
            "runtime": runtime,
            "engine_format": "tensorrt-plan",
            "manifest": {"versions": built.data["versions"]},
            "engine_digest": checked.data["engine_digest"],
        },
    )
    assert packaged.data["bundle_file"] == "net-bundle.zip"
    with zipfile.ZipFile(out / "bundle" / "net-bundle.zip") as archive:
        names = set(archive.namelist())
        assert {"engine.plan", "engine.json", "infer.py", "sample_input.npz", "expected_output.npz"} <= names
        assert "deserialize_cuda_engine" in archive.read("infer.py").decode()
        needed = archive.read("requirements.txt").decode().split()
        assert {"pycuda", "ml-dtypes"} <= {line.split("==")[0] for line in needed}, "what infer.py imports"
        assert "onnxruntime" not in {line.split("==")[0] for line in needed}
        sidecar = json.loads(archive.read("engine.json"))
    assert sidecar["gpu"]["name"].startswith("NVIDIA")


def test_dynamic_shapes(isolated: IsolatedRunner, tmp_path: Path) -> None:
    job = Job(isolated, tmp_path)
    model = models.folder(models.transformer_block(), tmp_path / "model")
    shapes = {"input_ids": {"min": [1, 4], "opt": [4, 16], "max": [16, 64]}}
    built, out = job.call("build", {"model": model}, build_options(shapes=shapes))
    assert set(built.data["profiles"][0]) == {"input_ids", "attention_mask"}
    options = {"backend": "tensorrt", "runtime": built.data["runtime"], "shapes": shapes}
    checked, _ = job.call("validate", {"model": model, "engine": out / "engine"}, options)
    assert checked.data["broken"] is None


@pytest.mark.parametrize(("op", "code"), [("Celu", "unsupported_op"), ("Elu", "engine_build_failed")])
def test_a_parse_error_and_a_build_that_gives_nothing(
    op: str, code: str, isolated: IsolatedRunner, tmp_path: Path
) -> None:
    model = models.folder(activation(op), tmp_path / "model")
    with pytest.raises(StageFailure) as caught:
        Job(isolated, tmp_path).call("build", {"model": model}, build_options())
    failure = caught.value
    assert (failure.code, failure.kind, failure.node) == (code, FailureKind.MODEL, "act")


def test_cancel_in_mid_build_ends_the_build(isolated: IsolatedRunner, tmp_path: Path) -> None:
    job = Job(isolated, tmp_path)
    model = models.folder(activation("Selu"), tmp_path / "model")  # each of the stand-in's steps takes 5 s
    start = time.monotonic()
    with pytest.raises(Interrupted):
        job.call("build", {"model": model}, build_options(), lambda: time.monotonic() - start > 2)
    assert time.monotonic() - start < 10, "it did not wait for the build"
    assert not list((tmp_path / "1-out").rglob("engine.plan"))
    models.folder(models.mlp(), tmp_path / "next")
    assert job.call("build", {"model": tmp_path / "next"}, build_options())[0].outputs == ["engine"]


def test_a_plan_from_elsewhere_is_not_loaded(isolated: IsolatedRunner, tmp_path: Path) -> None:
    job = Job(isolated, tmp_path)
    model = models.folder(models.mlp(), tmp_path / "model")
    _, out = job.call("build", {"model": model}, build_options())
    plan = out / "engine" / "engine.plan"
    plan.write_bytes(plan.read_bytes() + b"\x90")
    with pytest.raises(StageFailure) as caught:
        job.call("validate", {"model": model, "engine": out / "engine"}, {"backend": "tensorrt", "runtime": {}})
    assert caught.value.code == "engine_untrusted"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A deployment whose worker has the stand-ins."""
    with deployment(tmp_path_factory.mktemp("gpu") / "home") as found:
        found.start("tests.factories.tensorrt_worker")
        found.wait_ready()
        yield found


@pytest.fixture(scope="module")
def client(served: Deployment) -> Iterator[Client]:
    with served.client() as client:
        yield client


def submit(client: Client, model: onnx.ModelProto, folder: Path, **changes: Any) -> dict[str, Any]:
    uploaded = client.upload_model(models.save(model, folder / "net.onnx"))
    spec = {
        "model_id": uploaded["id"],
        "target": {"backends": ["tensorrt"]},
        "precisions": ["fp32"],
        "search": {"strategy": "exhaustive"},
        "validation": {"max_accuracy_loss_percent": 100},
        "benchmark": {"batch_sizes": [1], "min_seconds": 0.1},
        "budget_seconds": paced(60),  # of which 5 are used; beside other tests, more
    }
    return client.submit({**spec, **changes})


def candidates_of(client: Client, job: dict[str, Any]) -> dict[str, Any]:
    return {c["id"]: c for c in client.report(job["id"])["candidates"]}


def test_the_whole_job_through_the_api(served: Deployment, client: Client, tmp_path: Path) -> None:
    (worker,) = client.capabilities()["workers"]
    (offered,) = [b for b in worker["backends"] if b["name"] == "tensorrt"]
    assert offered["devices"] == ["cuda"]
    assert offered["versions"]["tensorrt"].startswith("11.")
    job = client.wait(submit(client, models.conv_net(size=32), tmp_path)["id"])
    assert job["status"] == "succeeded", job
    found = candidates_of(client, job)
    assert {"trt-fp32", "trt-tf32", "trt-fp32.graph"} <= set(found)
    for candidate in found.values():
        assert candidate["batches"].get("1", {}).get("samples"), candidate["reason"]
        assert candidate["accuracy"] is None or not candidate["accuracy"].get("broken")
    assert [*served.home.glob("blobs/objects/shared/caches/tensorrt-timing-*/*")], "all workers have its timings"


def test_dynamic_shapes_and_build_options_through_the_api(client: Client, tmp_path: Path) -> None:
    def shapes(batch: int, length: int) -> dict[str, Any]:
        return {"input_ids": {"min": [1, 4], "opt": [batch, length], "max": [16, 64]}}

    asked = {"optimization_level": 2, "profiles": [shapes(1, 16), shapes(8, 32)]}
    job = client.wait(submit(client, models.transformer_block(), tmp_path, tensorrt=asked)["id"])
    assert job["status"] == "succeeded", job
    built = candidates_of(client, job)["trt-fp32"]
    assert built["batches"]["1"]["samples"] > 0, built["reason"]
    (made, *_) = [s for s in client.manifest(job["id"])["stages"] if s["stage"] == "build"]
    assert made["options"]["options"]["optimization_level"] == 2
    assert len(made["options"]["options"]["profiles"]) == 2


def test_a_model_that_tensorrt_refuses_through_the_api(client: Client, tmp_path: Path) -> None:
    for op, words in (("Celu", "TensorRT cannot take Celu"), ("Elu", "TensorRT built no engine")):
        job = client.wait(submit(client, activation(op), tmp_path)["id"])
        assert job["status"] == "succeeded", "the baseline ships"
        for candidate in candidates_of(client, job).values():
            assert words in candidate["reason"]
            assert "act" in candidate["reason"] or "node" in candidate["reason"]


def test_a_job_is_cancelled_in_mid_build(client: Client, tmp_path: Path) -> None:
    job = submit(client, activation("Selu"), tmp_path)
    deadline = time.monotonic() + 60
    while client.job(job["id"])["stage"] != "build" and time.monotonic() < deadline:
        time.sleep(0.05)
    start = time.monotonic()
    client.cancel(job["id"])
    assert client.wait(job["id"], check=False)["status"] == "cancelled"
    assert time.monotonic() - start < 10, "the build, of 15 s and more, was ended"


def test_without_a_gpu_no_gpu_library_is_imported(tmp_path: Path) -> None:
    """All stages and backends are loaded, TensorRT is probed, and a build is asked for, on this machine as it is."""
    models.folder(models.mlp(), tmp_path / "model")
    code = """
import json, sys
from pathlib import Path
from app.domain.failures import StageFailure
from workers import kernel
kernel.stages()
backend = kernel.backends()["tensorrt"]()
found = {"probe": backend.probe({}) is not None}
class Silent(kernel.Reporter):
    def progress(self, fraction, message=""): pass
    def note(self, message, **facts): pass
folder = Path(sys.argv[1])
try:
    backend.build(folder / "model", folder, {}, Silent())
except StageFailure as failure:
    found["build"] = failure.to_json()
gpu = ("tensorrt", "tensorrt_bindings", "pycuda", "cuda", "cupy", "torch", "pynvml")
found["modules"] = [m for m in sys.modules if m.split(".")[0] in gpu]
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["probe"] is False
    assert found["modules"] == []
    assert found["build"]["code"] == "gpu_unavailable"
    assert found["build"]["kind"] == "infrastructure"


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.backends.tensorrt import cuda as trt_cuda
    from workers.backends.tensorrt.library import TENSORRT

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert not TENSORRT.installed()
    monkeypatch.setitem(sys.modules, "workers.devices.cuda.runtime", None)
    for needs, code in (
        (TENSORRT.version, "tensorrt_unavailable"),
        (trt_cuda.open_cuda, "cuda_unavailable"),
    ):
        with pytest.raises(StageFailure) as caught:
            needs()
        assert caught.value.code == code
        assert "anneal[tensorrt]" in (caught.value.remedy or "")
