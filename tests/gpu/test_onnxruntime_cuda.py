"""Backend onnxruntime-cuda on a real GPU: outputs as the CPU's, graphs, memory limits, no silent fallback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from app.domain.failures import StageFailure
from tests.factories import onnx_models
from tests.gpu.models import Case, Notes, cosine
from workers.kernel import Backend

FULL = {"tf32": False}


def _built(backend: Backend, case: Case, folder: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    folder.mkdir()
    return folder, backend.build(case.model, folder, options, Notes())


def test_the_gpu_computes_what_the_cpu_does(ort_cuda: Backend, case: Case, tmp_path: Path) -> None:
    engine, built = _built(ort_cuda, case, tmp_path / "engine", **FULL)
    session = ort_cuda.load(engine, built["runtime"])
    found = session.run(case.feeds)
    for name, wanted in case.expected.items():
        assert np.allclose(found[name], wanted, rtol=1e-3, atol=1e-3)
    call = session.bind(case.feeds)
    call()
    assert cosine(case.expected, session.run(case.feeds)) > 0.99999
    assert built["cpu_nodes"] == {}


def test_a_graph_replays_the_model(ort_cuda: Backend, case: Case, tmp_path: Path) -> None:
    engine, built = _built(ort_cuda, case, tmp_path / "engine", cuda_graph=True, **FULL)
    assert built["runtime"]["cuda_graph"] is True
    session: Any = ort_cuda.load(engine, built["runtime"])
    other = {n: np.ascontiguousarray(a[:2]) for n, a in case.feeds.items()}
    calls = [session.bind(case.feeds), session.bind(other), session.bind(case.feeds)]
    for call in calls * 3:
        call()
    assert cosine(case.expected, session.run(case.feeds)) > 0.99999


@pytest.mark.parametrize(
    ("recipe", "options", "least"),
    [
        ("fp16", {}, 0.999),
        ("bf16", {}, 0.99),
        ("int8", {}, 0.99),
        ("int8", {"high_precision": "fp16"}, 0.99),
        ("fp8", {}, 0.98),
        ("fp8", {"high_precision": "fp16"}, 0.98),
        ("int4", {"high_precision": "fp16"}, 0.9),
    ],
)
def test_converted_graphs_run_on_the_gpu(
    ort_cuda: Backend,
    gpu: dict[str, Any],
    case: Case,
    recipe: str,
    options: dict[str, Any],
    least: float,
    request: pytest.FixtureRequest,
) -> None:
    try:
        model, result = case.converted(recipe, gpu, **options)
    except StageFailure as failure:
        if failure.code == "nothing_to_convert" and recipe in ("fp8", "int4"):
            pytest.skip(failure.detail)
        raise
    try:
        session: Any = ort_cuda.load(model, {})
    except StageFailure as failure:
        if failure.code in ("unsupported_op", "gpu_fallback", "load_failed") and recipe != "fp16":
            pytest.skip(f"ONNX Runtime's CUDA provider does not run {recipe} here: {failure.detail[:200]}")
        raise
    found = session.run(case.feeds)
    likeness = cosine(case.expected, found)
    likenesses = [("cosine_gpu", round(likeness, 6)), ("cosine_cpu", result.data["trial_run"]["cosine"])]
    request.node.user_properties += likenesses  # for --junitxml
    assert likeness >= least


@pytest.mark.parametrize("recipe", ["fp32", "fp16"])
def test_fused_transformers_run_on_the_gpu(
    ort_cuda: Backend, gpu: dict[str, Any], case: Case, recipe: str, tmp_path: Path
) -> None:
    """ONNX Runtime's own operators, in float16 too, in a CUDA graph: no kernel is missing, the outputs are right."""
    if case.name == "residual_cnn":
        pytest.skip("no transformer: there is nothing to fuse")
    model = case.fused()
    if recipe == "fp16":
        model, _ = case.converted("fp16", gpu, inputs={"model": model})
    engine = tmp_path / "engine"
    engine.mkdir()
    built = ort_cuda.build(model, engine, {"cuda_graph": True}, Notes())
    assert built["cpu_nodes"] == {}
    session = ort_cuda.load(engine, built["runtime"])
    assert cosine(case.expected, session.run(case.feeds)) >= 0.9999
    session.bind(case.feeds)()


def test_the_time_of_a_run_is_told_apart(ort_cuda: Backend, case: Case, tmp_path: Path) -> None:
    engine, built = _built(ort_cuda, case, tmp_path / "engine")
    session = ort_cuda.load(engine, built["runtime"])
    figures = session.profile(case.feeds)
    assert figures is not None
    assert {"h2d_ms", "compute_ms", "d2h_ms", "enqueue_ms", "latency_ms"} <= set(figures)
    assert all(figures[name] > 0 for name in ("h2d_ms", "compute_ms", "d2h_ms", "enqueue_ms"))
    assert session.profile(case.feeds) is not None  # and again: nothing is left over


def test_a_node_without_a_gpu_kernel_is_no_silent_fallback(ort_cuda: Backend, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
            helper.make_node("Det", ["y"], ["z"], name="determinant"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 4])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])],
        [onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder = onnx_models.folder(model, tmp_path / "model")
    with pytest.raises(StageFailure) as caught:
        ort_cuda.load(folder, {})
    assert caught.value.code == "gpu_fallback"
    assert caught.value.node == "determinant"
    out = tmp_path / "engine"
    out.mkdir()
    built = ort_cuda.build(folder, out, {"cpu_fallback": "report"}, Notes())
    assert built["cpu_nodes"] == {"Det": 1}


def test_too_little_gpu_memory_is_a_typed_failure(ort_cuda: Backend, tmp_path: Path) -> None:
    folder = onnx_models.folder(onnx_models.mlp(features=4096, hidden=4096), tmp_path / "model")
    with pytest.raises(StageFailure) as caught:
        ort_cuda.load(folder, {"gpu_mem_limit_mb": 8}).run({"input": np.zeros((4096, 4096), np.float32)})
    assert caught.value.code == "gpu_out_of_memory"


def test_an_engine_runs_in_a_forked_process(ort_cuda: Backend, case: Case, tmp_path: Path) -> None:
    """As the benchmark does it: this process must not have touched CUDA, so the test runs in a fresh interpreter."""
    engine, _ = _built(ort_cuda, case, tmp_path / "engine")
    np.savez(tmp_path / "feeds.npz", **case.feeds)  # type: ignore[arg-type]
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from workers import kernel\n"
        "from workers.measure.engine_process import EngineProcess\n"
        "kernel.backends()['onnxruntime-cuda']().probe({})\n"
        "feeds = dict(np.load(sys.argv[2]))\n"
        "process = EngineProcess('e', 'onnxruntime-cuda', Path(sys.argv[1]), {}, {8: [feeds]})\n"
        "print(process.load().load_ms > 0, process.prepare(8), process.warm_up(0.3).iterations > 0)\n"
        "process.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(engine), str(tmp_path / "feeds.npz")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.strip() == "True [] True", done.stderr[-2000:]
