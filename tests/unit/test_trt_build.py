"""What a build needs a GPU for: tactics and their cache, loading the plan, the driver. On a stand-in whose surface the
contract tests check against the real binding; parser and builder themselves run for real in `test_trt_rtx.py`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from app.domain.failures import FailureKind, StageFailure
from tests.factories import cuda_standin, tensorrt_standin
from tests.factories import onnx_models as models
from tests.factories.tensorrt_standin import Behaviour, BuilderFlag
from workers import installation
from workers.backends.options import parsed
from workers.backends.tensorrt import TensorRtBackend, timing
from workers.backends.tensorrt import probe as trt_probe
from workers.backends.tensorrt.build import build
from workers.backends.tensorrt.library import TENSORRT
from workers.backends.tensorrt.options import BuildOptions
from workers.backends.tensorrt.progress import Progress
from workers.kernel import Reporter, StageContext
from workers.stages.build import Build, BuildStageOptions


class Recorder(Reporter):
    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.notes: list[tuple[str, dict[str, Any]]] = []

    def progress(self, fraction: float, message: str = "") -> None:
        self.fractions.append(fraction)

    def note(self, message: str, **facts: Any) -> None:
        self.notes.append((message, facts))


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Behaviour]:
    with cuda_standin.installed(monkeypatch, tmp_path / "cache") as found:
        yield found


def make(
    model: onnx.ModelProto | Path, tmp_path: Path, reporter: Reporter | None = None, **options: Any
) -> dict[str, Any]:
    source = model if isinstance(model, Path) else models.folder(model, tmp_path / "model")
    out = tmp_path / "engine"
    out.mkdir(exist_ok=True)
    return TensorRtBackend().build(source, out, options, reporter or Recorder())


def refused(model: onnx.ModelProto | Path, tmp_path: Path, **options: Any) -> StageFailure:
    with pytest.raises(StageFailure) as caught:
        make(model, tmp_path, **options)
    assert caught.value.remedy
    return caught.value


@pytest.mark.usefixtures("behaviour")
def test_a_plan_and_its_sidecar(tmp_path: Path) -> None:
    reporter = Recorder()
    data = make(models.conv_net(), tmp_path, reporter, precision="fp32", tf32=False, batch_sizes=[1, 8])
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert sorted(p.name for p in (tmp_path / "engine").iterdir()) == ["engine.json", "engine.plan"]
    sidecar = json.loads((tmp_path / "engine" / "engine.json").read_text())
    assert sidecar["tensorrt"] == tensorrt_standin.__version__
    assert sidecar["gpu"]["compute_capability"] == "9.0"
    assert sidecar["profiles"] == data["profiles"]
    assert data["profiles_derived"]
    assert data["runtime"] == {}
    assert reporter.fractions == sorted(reporter.fractions)
    assert 0.5 < max(reporter.fractions) <= 0.95
    assert data["memory"]["activation_bytes_by_profile"] == [4096, 8192]


@pytest.mark.usefixtures("behaviour")
def test_what_was_fused_is_read_layer_by_layer(tmp_path: Path) -> None:
    data = make(models.conv_net(), tmp_path)
    assert data["fused"]["conv+bn+relu"] == 2
    first = data["layers"][0]
    assert first["origins"] == ["conv1", "bn1", "relu1"]
    assert first["precision"] == "Float"
    assert data["io_tensors"] == ["input", "logits"]


def test_tensorrt_10_spells_the_inspection_otherwise(tmp_path: Path, behaviour: Behaviour) -> None:
    behaviour.old_inspector = True
    assert make(models.conv_net(), tmp_path)["io_tensors"] == ["input", "logits"]


def test_options_reach_the_builder(tmp_path: Path, behaviour: Behaviour) -> None:
    make(
        models.mlp(),
        tmp_path,
        workspace_mb=64,
        optimization_level=5,
        max_tactics=7,
        max_aux_streams=0,
        tf32=False,
        sparsity=True,
        version_compatible=True,
        hardware_compatibility="ampere_plus",
    )
    (config,) = behaviour.builds
    assert config._pools == {tensorrt_standin.MemoryPoolType.WORKSPACE: 64 << 20}
    assert (config.builder_optimization_level, config.max_num_tactics, config.max_aux_streams) == (5, 7, 0)
    assert config._flags == {
        BuilderFlag.SPARSE_WEIGHTS,
        BuilderFlag.VERSION_COMPATIBLE,
        BuilderFlag.EXCLUDE_LEAN_RUNTIME,
        BuilderFlag.EDITABLE_TIMING_CACHE,
    }
    assert config.hardware_compatibility_level == tensorrt_standin.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config.profiling_verbosity == tensorrt_standin.ProfilingVerbosity.DETAILED


@pytest.mark.parametrize(
    ("logged", "code", "kind"),
    [
        ("Could not find any implementation for node fc1 + act.", "engine_build_failed", FailureKind.MODEL),
        ("Requested amount of GPU memory (1 bytes) could not be allocated: out of memory", "gpu_out_of_memory", None),
        (
            "kOPT dimensions in profile 0 are [1,8] but input has static dimensions",
            "invalid_profile",
            FailureKind.MODEL,
        ),
        ("Cuda initialization: CUDA driver version is insufficient", "gpu_unavailable", FailureKind.INFRASTRUCTURE),
    ],
)
def test_a_build_that_gives_nothing(
    logged: str, code: str, kind: FailureKind | None, tmp_path: Path, behaviour: Behaviour
) -> None:
    behaviour.build_error = logged
    failure = refused(models.mlp(), tmp_path)
    assert failure.code == code
    assert kind is None or failure.kind is kind
    if code == "engine_build_failed":
        assert failure.node == "fc1"
        assert not failure.cacheable
    assert not list((tmp_path / "engine").iterdir()), "nothing half-made is left"


def test_a_missing_driver_is_found_before_tensorrt_is_touched(
    tmp_path: Path, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviour.no_driver = True
    failure = refused(models.mlp(), tmp_path)
    assert (failure.code, failure.kind) == ("gpu_unavailable", FailureKind.INFRASTRUCTURE)
    assert "35" in failure.detail
    monkeypatch.setattr(trt_probe, "ask_driver", lambda: {"error": "no NVIDIA driver: libcuda.so.1"})
    trt_probe.probe_gpu.cache_clear()
    monkeypatch.delattr(tensorrt_standin, "Builder")
    assert "no NVIDIA driver" in refused(models.mlp(), tmp_path).detail
    assert TensorRtBackend().probe({}) is None


def test_a_build_ends_when_the_jobs_time_for_it_is_over(tmp_path: Path, behaviour: Behaviour) -> None:
    behaviour.step_seconds = 0.3
    inputs = {"model": models.folder(models.conv_net(), tmp_path / "model")}
    ctx = StageContext(inputs, tmp_path, tmp_path / "out", Recorder(), cuda_standin.HARDWARE, time.monotonic() + 0.1)
    with pytest.raises(StageFailure) as caught:
        Build().run(ctx, BuildStageOptions(backend="tensorrt"))
    assert caught.value.code == "build_cancelled"


def test_progress_of_nested_phases_goes_forward_only() -> None:
    reporter = Recorder()
    progress = Progress(reporter)
    progress.start("outer", None, 2)
    progress.start("inner", "outer", 4)
    assert all(progress.step("inner", i) for i in range(4))
    assert progress.step("outer", 0)
    progress.start("inner", "outer", 4)
    progress.step("inner", 0)
    progress.finish("inner")
    progress.finish("outer")
    assert reporter.fractions == sorted(reporter.fractions)
    assert reporter.fractions[-1] == pytest.approx(0.95)
    progress.cancel()
    assert not progress.step("unheard of", 3)


def test_the_timing_cache_is_kept_merged_and_used(tmp_path: Path, behaviour: Behaviour) -> None:
    first = make(models.mlp(), tmp_path)["timing_cache"]
    assert (first["used"], first["stored"]) == (False, True)
    make(models.conv_net(), tmp_path / "other")
    (path,) = (tmp_path / "cache").glob("*.cache")
    keys = set(json.loads(path.read_bytes())["keys"])
    assert {"Gemm:fc1", "Conv:conv1"} <= keys, "both builds are in it"
    again = make(models.mlp(), tmp_path / "again", exact_timing=True)["timing_cache"]
    assert again["used"]
    assert BuilderFlag.ERROR_ON_TIMING_CACHE_MISS in behaviour.builds[-1]._flags


@pytest.mark.usefixtures("behaviour")
def test_what_another_build_stored_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "shared.cache"
    ours, theirs = tensorrt_standin.IBuilderConfig(), tensorrt_standin.IBuilderConfig()
    for config, key in ((ours, "ours"), (theirs, "theirs")):
        cache, filled = timing.attach(config, path)  # type: ignore[arg-type]
        assert not filled
        cache._keys.add(key)  # type: ignore[union-attr]
    timing.merge(ours, path)  # type: ignore[arg-type]
    told = timing.merge(theirs, path)  # type: ignore[arg-type]
    assert json.loads(path.read_bytes())["keys"] == ["ours", "theirs"]
    assert told["bytes"] == path.stat().st_size


@pytest.mark.usefixtures("behaviour")
def test_a_timing_cache_that_cannot_be_kept_costs_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(timing, "merge", full)
    assert make(models.mlp(), tmp_path)["timing_cache"] == {"used": False, "stored": False}
    assert (tmp_path / "engine" / "engine.plan").stat().st_size > 0


@pytest.mark.usefixtures("behaviour")
def test_a_state_of_another_kind_waits_and_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, others = tmp_path / "shared.cache", tmp_path / "shared.others"
    others.mkdir()
    ours, theirs = tensorrt_standin.IBuilderConfig(), tensorrt_standin.IBuilderConfig()
    for config, where in ((ours, path), (theirs, others / "state")):
        timing.attach(config, None)  # type: ignore[arg-type]
        timing.merge(config, where)  # type: ignore[arg-type]
    timing.attach(ours, None)  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr(tensorrt_standin.ITimingCache, "combine", lambda *_, **__: False)
        timing.merge(ours, path)  # type: ignore[arg-type]
    assert (others / "state").exists()
    timing.merge(ours, path)  # type: ignore[arg-type]
    assert not (others / "state").exists()


@pytest.mark.usefixtures("behaviour")
def test_an_exact_rebuild_without_the_cache(tmp_path: Path) -> None:
    assert refused(models.mlp(), tmp_path, exact_timing=True).code == "timing_cache_miss"


@pytest.mark.parametrize("content", [b"garbage", json.dumps({"version": "10.0", "keys": []}).encode()])
@pytest.mark.usefixtures("behaviour")
def test_a_timing_cache_that_does_not_fit_is_left_out(content: bytes, tmp_path: Path) -> None:
    make(models.mlp(), tmp_path)
    (path,) = (tmp_path / "cache").glob("*.cache")
    path.write_bytes(content)
    assert not make(models.mlp(), tmp_path)["timing_cache"]["used"]
    assert json.loads(path.read_bytes())["version"] == tensorrt_standin.__version__


def test_without_a_folder_or_without_a_cache(tmp_path: Path, behaviour: Behaviour) -> None:
    key = installation.current().engine_key
    with installation.using(installation.Installation(key)):
        assert not make(models.mlp(), tmp_path)["timing_cache"]["stored"]
    make(models.mlp(), tmp_path, timing_cache=False)
    assert BuilderFlag.DISABLE_TIMING_CACHE in behaviour.builds[-1]._flags
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("behaviour")
def test_a_precision_that_the_gpu_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_probe, "ask_driver", lambda: {**cuda_standin.GPU, "compute_capability": "8.6"})
    trt_probe.probe_gpu.cache_clear()
    assert refused(models.mlp(), tmp_path, precision="fp8").code == "precision_unsupported"
    info = TensorRtBackend().probe({})
    assert info is not None
    assert info.precisions == ("fp32", "fp16", "bf16", "int8", "int4")


@pytest.mark.usefixtures("behaviour")
def test_the_same_facts_for_the_same_build(tmp_path: Path) -> None:
    source = models.folder(models.mlp(), tmp_path / "m")
    options = parsed(BuildOptions, {"timing_cache": False}, "TensorRT")
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found.append(build(TENSORRT, source, tmp_path / name, options, Recorder()))
    assert found[0] == found[1]
