"""The loader of every bundle from many threads at once: each call gets the answer to its own question, at its own batch
size. ONNX Runtime and OpenVINO run for real; CUDA and TensorRT on stand-ins that refuse what theirs refuse."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper

from tests.factories import cuda_standin
from tests.factories import onnx_models as models
from tests.unit.test_trt_build import Recorder
from tests.unit.test_trt_script import fake_pycuda
from workers.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from workers.backends.tensorrt import TensorRtBackend
from workers.kernel import Backend, backends

THREADS, CALLS = 8, 200
Feeds = dict[str, Any]
Run = Callable[[Feeds], Feeds]


def network() -> ModelProto:
    """Rows and their mean, a number of rank 0, over layers that take long enough for calls to overlap."""
    rng = np.random.default_rng(0)
    nodes, last = [], "x"
    weights = [models.tensor(f"w{i}", rng.standard_normal((64, 64)) / 8) for i in range(4)]
    for i, weight in enumerate(weights):
        nodes += [
            helper.make_node("MatMul", [last, weight.name], [f"m{i}"], name=f"product{i}"),
            helper.make_node("Tanh", [f"m{i}"], [f"t{i}"], name=f"tanh{i}"),
        ]
        last = f"t{i}"
    nodes.append(helper.make_node("Identity", [last], ["rows"], name="rows"))
    nodes.append(helper.make_node("ReduceMean", [last], ["mean"], name="mean", keepdims=0))
    outputs = [models.value("rows", ["batch", 64]), models.value("mean", [])]
    graph = helper.make_graph(nodes, "g", [models.value("x", ["batch", 64])], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def bundle(backend: Backend, tmp_path: Path, **options: Any) -> Path:
    out = tmp_path / "bundle"
    out.mkdir()
    built = backend.build(models.folder(network(), tmp_path / "model"), out, options, Recorder())
    (out / "infer.py").write_text(backend.infer_script(built["runtime"]))
    return out


def loader(out: Path) -> Run:
    """The function that the bundle's `infer.py` gives its user."""
    spec = importlib.util.spec_from_file_location("infer", out / "infer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names, run = module.load()
    assert names == ["x"]
    found: Run = run
    return found


def ask(run: Run, calls: int = CALLS) -> None:
    """Every thread its own questions, all at once; every answer is that of the original to that very question."""
    session = onnxruntime.InferenceSession(network().SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    questions = [{"x": rng.standard_normal((1 + i % 5, 64)).astype(np.float32)} for i in range(THREADS * 16)]
    answers = [session.run(["rows", "mean"], q) for q in questions]
    start = threading.Barrier(THREADS)

    def thread(number: int) -> list[Feeds]:
        start.wait()
        return [run(questions[(number * 16 + call) % len(questions)]) for call in range(calls)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(thread, range(THREADS)))
    # Compared when all calls are over: what a later call wrote over would show.
    for number, given in enumerate(found):
        for call, outputs in enumerate(given):
            rows, mean = answers[(number * 16 + call) % len(questions)]
            assert outputs["rows"].shape == rows.shape
            assert np.shape(outputs["mean"]) == ()
            np.testing.assert_allclose(outputs["rows"], rows, atol=1e-5)
            np.testing.assert_allclose(outputs["mean"], mean, atol=1e-5)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_threads_get_their_own_answers(name: str, tmp_path: Path) -> None:
    ask(loader(bundle(backends()[name](), tmp_path)))


class _Gpu(ModuleType):
    """ONNX Runtime whose CUDA provider is its CPU provider, and whose sessions with CUDA graphs refuse a second call
    while one runs, as the provider's captured graphs would mix them up."""

    def __init__(self) -> None:
        super().__init__("onnxruntime")
        self.__dict__.update({n: getattr(onnxruntime, n) for n in ("GraphOptimizationLevel", "RunOptions")})
        self.SessionOptions = onnxruntime.SessionOptions

    def preload_dlls(self) -> None:
        pass

    class InferenceSession:
        def __init__(self, path: str, options: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            self._graph = providers[0][1].get("enable_cuda_graph") == "1"
            self._busy = threading.Lock()
            self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

        def disable_fallback(self) -> None:
            pass

        def run(self, names: Any, feeds: Feeds, options: Any) -> Any:
            if not self._graph:
                return self._session.run(names, feeds)
            assert options.get_run_config_entry("gpu_graph_id") == "-1"
            assert self._busy.acquire(blocking=False), "two calls at once"
            try:
                return self._session.run(names, feeds)
            finally:
                self._busy.release()


@pytest.mark.parametrize("runtime", [{}, {"cuda_graph": True}], ids=["eager", "graph"])
def test_threads_on_the_cuda_provider(runtime: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.folder(network(), tmp_path / "engine")
    (folder / "infer.py").write_text(OnnxRuntimeCudaBackend().infer_script(runtime))
    monkeypatch.setitem(sys.modules, "onnxruntime", _Gpu())
    ask(loader(folder))


def test_threads_on_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's context is one, and PyCUDA's is current in the importing thread only."""
    with cuda_standin.installed(monkeypatch, tmp_path / "cache"):
        out = bundle(TensorRtBackend(), tmp_path, batch_sizes=[1, 8])
        for name, module in fake_pycuda(cuda_standin.GPU["name"], (9, 0)).items():
            monkeypatch.setitem(sys.modules, name, module)
        ask(loader(out), calls=25)


def test_tensorrt_refuses_another_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would narrow in silence the original refuses, too."""
    with cuda_standin.installed(monkeypatch, tmp_path / "cache"):
        out = bundle(TensorRtBackend(), tmp_path, batch_sizes=[1, 8])
        for name, module in fake_pycuda(cuda_standin.GPU["name"], (9, 0)).items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(SystemExit, match="float64 for x, which is float32"):
            loader(out)({"x": np.ones((1, 64))})


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_input_of_rank_zero(name: str, tmp_path: Path) -> None:
    """Bound or not, it stays of rank 0."""
    nodes = [helper.make_node("Mul", ["x", "factor"], ["y"], name="scale")]
    inputs = [models.value("x", ["batch", 4]), models.value("factor", [])]
    graph = helper.make_graph(nodes, "g", inputs, [models.value("y", ["batch", 4], TensorProto.FLOAT)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "engine").mkdir()
    backend = backends()[name]()
    built = backend.build(models.folder(model, tmp_path / "model"), tmp_path / "engine", {}, Recorder())
    session = backend.load(tmp_path / "engine", built["runtime"])
    feeds = {"x": np.ones((2, 4), np.float32), "factor": np.asarray(3, np.float32)}
    session.bind(feeds)()
    np.testing.assert_array_equal(session.run(feeds)["y"], np.full((2, 4), 3, np.float32))
    session.close()
