"""Loading and running plans of TensorRT for RTX, which needs a GPU: on a stand-in, whose names the real library has."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tensorrt_rtx_bindings as real

from app.domain.failures import StageFailure
from tests.factories import onnx_models as models
from tests.factories import tensorrt_rtx_standin as standin
from tests.factories.tensorrt_rtx import Recorder
from tests.factories.tensorrt_standin import Behaviour, BuilderFlag
from workers.backends.tensorrt import TensorRtRtxBackend
from workers.backends.tensorrt.library import RTX
from workers.backends.tensorrt.script import infer_script


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Behaviour]:
    with standin.installed(monkeypatch, tmp_path / "cache") as found:
        yield found


def build(tmp_path: Path, **options: Any) -> tuple[dict[str, Any], Path]:
    model, out = models.folder(models.mlp(), tmp_path / "model"), tmp_path / "engine"
    out.mkdir()
    return TensorRtRtxBackend().build(model, out, options, Recorder()), out


def test_the_stand_in_has_nothing_that_the_library_has_not() -> None:
    for cls in standin.OWN:
        there = getattr(real, cls.__name__)
        if issubclass(cls, IntEnum):
            assert set(cls.__members__) <= set(there.__members__)
            continue
        for name in vars(cls):
            assert name.startswith("_") or name == "content" or hasattr(there, name), f"{cls.__name__}.{name}"
    assert set(RTX.capabilities.values()) <= set(real.ComputeCapability.__members__)


def test_it_runs_and_keeps_what_was_compiled(tmp_path: Path, behaviour: Behaviour) -> None:
    told, engine = build(tmp_path, cuda_graph=True)
    (config,) = behaviour.builds
    assert (config.num_compute_capabilities, config._target) == (1, standin.ComputeCapability.SM89)
    assert BuilderFlag.EDITABLE_TIMING_CACHE not in config._flags, "nothing is timed, so nothing is kept of it"
    assert told["timing_cache"] == {"used": False, "stored": False}
    assert behaviour.plugins_registered
    assert TensorRtRtxBackend().probe({}) is not None
    feeds = {"input": np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)}
    session = TensorRtRtxBackend().load(engine, told["runtime"])
    expected = onnxruntime.InferenceSession(tmp_path / "model" / "model.onnx").run(None, feeds)[0]
    np.testing.assert_allclose(next(iter(session.run(feeds).values())), expected, rtol=1e-5)
    session.bind(feeds)()
    assert session.graph_status == "left to the runtime"  # type: ignore[attr-defined]
    assert {c.cuda_graph_strategy for c in standin.seen} == {standin.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE}
    session.close()
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.read_bytes() == b"compiled"
    again = TensorRtRtxBackend().load(engine, {})
    assert standin.seen[-1]._cache.content == b"compiled", "the next process compiles nothing"
    assert standin.seen[-1].cuda_graph_strategy == standin.CudaGraphStrategy.DISABLED
    again.close()


@pytest.mark.usefixtures("behaviour")
def test_a_gpu_that_it_does_not_run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.backends.tensorrt import probe as trt_probe

    monkeypatch.setattr(trt_probe, "ask_driver", lambda: {**standin.GPU, "compute_capability": "9.0"})
    trt_probe.probe_gpu.cache_clear()
    assert TensorRtRtxBackend().probe({}) is None
    with pytest.raises(StageFailure) as caught:
        build(tmp_path)
    assert caught.value.code == "gpu_unsupported"
    assert "8.9" in caught.value.detail


@pytest.mark.usefixtures("behaviour")
def test_a_plan_for_another_target_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    told, engine = build(tmp_path, target="8.6")
    assert "built without its GPU" in told["reason"]
    with pytest.raises(StageFailure, match=r"compute capability 8\.6.*\(8\.9\)") as caught:
        TensorRtRtxBackend().load(engine, told["runtime"])
    assert caught.value.code == "engine_incompatible"
    assert not standin.seen


def test_what_is_built_for_a_target_tells_the_same_with_its_gpu_and_without(
    tmp_path: Path, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.backends.tensorrt import probe as trt_probe

    told = []
    for name, answer in (("with", dict(standin.GPU)), ("without", {"error": "no NVIDIA driver"})):
        monkeypatch.setattr(trt_probe, "ask_driver", lambda answer=answer: answer)
        trt_probe.probe_gpu.cache_clear()
        (tmp_path / name).mkdir()
        found, engine = build(tmp_path / name, target="8.9")
        told.append((found, (engine / "engine.json").read_bytes()))
    assert told[0] == told[1]


def test_the_bundles_script_imports_the_library() -> None:
    source = infer_script({}, "1.7", RTX)
    assert "import tensorrt_rtx_bindings as trt" in source
    assert "tensorrt-rtx-cu13-bindings (1.7 was measured)" in source
    compile(source, "infer.py", "exec")
    assert "__MODULE__" not in source
