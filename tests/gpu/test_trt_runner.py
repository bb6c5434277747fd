"""The TensorRT runner on a GPU. With TensorRT: real plans against ONNX Runtime. Without it: the runner's own work
(pinned memory, copies, streams, CUDA graphs) on the GPU's memory, with a stand-in whose enqueue copies there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from tests.factories import onnx_models as models
from tests.factories import tensorrt_standin
from tests.gpu.models import Case
from workers import installation
from workers.backends.tensorrt import TensorRtBackend
from workers.backends.tensorrt import probe as trt_probe
from workers.backends.tensorrt.cuda import open_cuda
from workers.backends.tensorrt.library import TENSORRT
from workers.backends.tensorrt.runner import TensorRtSession
from workers.kernel import Reporter


class Silent(Reporter):
    def progress(self, fraction: float, message: str = "") -> None:
        pass

    def note(self, message: str, **facts: Any) -> None:
        pass


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


@pytest.fixture
def signed(tmp_path: Path) -> Iterator[None]:
    """A machine with a GPU and a CUDA library; with a key to sign engines."""
    found = trt_probe.probe_gpu()
    if isinstance(found, str):
        pytest.skip(found)
    if not all(map(_has, ("workers.devices.cuda.runtime", "cuda.bindings"))):
        pytest.skip("cuda-bindings is not installed")
    with installation.using(installation.Installation(b"k" * installation.KEY_BYTES, tmp_path / "cache")):
        yield


def session_of(model: onnx.ModelProto, folder: Path, runtime: dict[str, Any], **options: Any) -> TensorRtSession:
    source, out = models.folder(model, folder / "model"), folder / "engine"
    out.mkdir(exist_ok=True)
    built = TensorRtBackend().build(source, out, options, Silent())
    session = TensorRtBackend().load(out, {**built["runtime"], **runtime})
    assert isinstance(session, TensorRtSession)
    return session


def identity() -> onnx.ModelProto:
    node = helper.make_node("Identity", ["x"], ["y"], name="copy")
    return models.make_model([node], [models.value("x", ["b", 1024])], [models.value("y", ["b", 1024])])


def _copy_on_the_gpu(context: Any, stream: int) -> bool:
    from cuda.bindings import driver

    nbytes = int(np.prod(context._shapes["x"])) * 4
    source, target = context._addresses["x"], context._addresses["y"]
    (status,) = driver.cuMemcpyDtoDAsync(target, source, nbytes, driver.CUstream(stream))
    return bool(status == driver.CUresult.CUDA_SUCCESS)


@pytest.mark.usefixtures("signed")
@pytest.mark.parametrize("graph", [False, True])
def test_the_runners_own_work(graph: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_standin)
    monkeypatch.setattr(tensorrt_standin.IExecutionContext, "execute_async_v3", _copy_on_the_gpu)
    session = session_of(identity(), tmp_path, {"cuda_graph": graph, "transfers": True}, batch_sizes=[1, 8, 512])
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((batch, 1024)).astype(np.float32) for batch in (1, 8, 3, 512, 100)]
    for array in arrays:
        np.testing.assert_array_equal(session.run({"x": array})["y"], array)
    calls = [session.bind({"x": array}) for array in arrays]
    assert session.graph_status == ("captured" if graph else None)
    for binding in session._bindings[1:]:
        binding.arrays["x"][...] *= -2  # what the next call must copy in
    for call in calls * 3:
        call()
    for binding, array in zip(session._bindings[1:], arrays, strict=True):
        found = binding.buffers.host("y", array.shape, np.dtype(np.float32))
        np.testing.assert_array_equal(found, array * -2)
    figures = session.profile({"x": arrays[3]})
    assert figures["h2d_ms"] > 0
    assert figures["d2h_ms"] > 0
    assert figures["memory"]["io_bytes"] > 0
    session.close()


@pytest.mark.usefixtures("signed")
def test_what_cannot_be_captured_runs_eagerly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    def waits(context: Any, stream: int) -> bool:
        """Waiting for the stream is illegal while it is captured."""
        (status,) = driver.cuStreamSynchronize(driver.CUstream(stream))
        return bool(status == driver.CUresult.CUDA_SUCCESS) and _copy_on_the_gpu(context, stream)

    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_standin)
    monkeypatch.setattr(tensorrt_standin.IExecutionContext, "execute_async_v3", waits)
    session = session_of(identity(), tmp_path, {"cuda_graph": True})
    array = np.ones((4, 1024), np.float32)
    call = session.bind({"x": array})
    call()
    assert (session.graph_status or "").startswith("not captured")
    np.testing.assert_array_equal(session.run({"x": array})["y"], array)
    session.close()


@pytest.mark.usefixtures("signed")
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("make", [models.conv_net, models.transformer_block], ids=["cnn", "transformer"])
def test_a_real_plan(make: Any, graph: bool, tmp_path: Path) -> None:
    if not TENSORRT.installed():
        pytest.skip("TensorRT is not installed")
    model = make()
    session = session_of(model, tmp_path, {"cuda_graph": graph}, tf32=False, batch_sizes=[1, 8])
    original = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in original.get_outputs()]
    for batch in (1, 8, 3):
        feeds = _feeds(session, batch)
        found = session.run(feeds)
        session.bind(feeds)()
        for name, wanted in zip(names, original.run(names, feeds), strict=True):
            np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=1e-4)
    session.close()


@pytest.mark.usefixtures("signed")
@pytest.mark.parametrize(("recipe", "least"), [("fp16", 0.999), ("bf16", 0.99), ("int8", 0.99), ("fp8", 0.98)])
def test_a_real_plan_in_explicit_precision(recipe: str, least: float, case: Case, tmp_path: Path) -> None:
    if not TENSORRT.installed():
        pytest.skip("TensorRT is not installed")
    high = {"high_precision": "fp16"} if recipe in ("int8", "fp8") else {}
    folder, _ = case.converted(recipe, {}, **high)
    out = tmp_path / "engine"
    out.mkdir()
    built = TensorRtBackend().build(folder, out, {"precision": recipe, "batch_sizes": [1, 8]}, Silent())
    session = TensorRtBackend().load(out, built["runtime"])
    found = session.run(case.feeds)
    session.close()
    for name, wanted in case.expected.items():
        a, b = found[name].astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
        assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) >= least


def _feeds(session: TensorRtSession, batch: int) -> dict[str, Any]:
    from workers.measure.synthetic import synthetic_feeds

    return synthetic_feeds(session.inputs, batch, None, batch)


@pytest.mark.usefixtures("signed")
def test_the_cuda_layer_is_what_the_runner_expects() -> None:
    cuda = open_cuda()
    with cuda.context():
        free, total = cuda.mem_info()
        assert 0 < free <= total
    cuda.close()
