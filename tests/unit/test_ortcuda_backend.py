"""Backend onnxruntime-cuda as far as it goes without a GPU: what it proposes, its options, its script, its refusals.
The rest is in `tests/gpu`."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest

from app.domain.failures import StageFailure
from app.domain.spec import OptimizationSpec
from tests.factories import onnx_models
from workers import kernel
from workers.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from workers.backends.onnxruntime_cuda.session import PROVIDER, RuntimeOptions, fallen_nodes, gpu_failure
from workers.backends.options import parsed
from workers.candidates import Case
from workers.graph.onnx_files import MODEL_FILE

H100 = {"gpu": {"compute_capability": "9.0"}}


def _case(kind: str = "cnn", **spec: Any) -> Case:
    wanted = OptimizationSpec.model_validate({"model_id": "mdl_x", **spec})
    ops = {"Conv": 5, "Gemm": 1} if kind == "cnn" else {"MatMul": 12}
    return Case(wanted, ops, kind, hardware=H100, has_calibration=wanted.calibration is not None)


def test_it_is_a_backend_of_the_cuda_device() -> None:
    assert kernel.backends()["onnxruntime-cuda"].device == "cuda"
    assert kernel.backends()["onnxruntime"].device == "cpu"


@pytest.mark.skipif(PROVIDER in onnxruntime.get_available_providers(), reason="this ONNX Runtime has a CUDA provider")
def test_without_the_provider_it_offers_nothing_and_refuses_to_run_on_the_cpu(tmp_path: Path) -> None:
    backend = OnnxRuntimeCudaBackend()
    assert backend.probe(H100) is None
    folder = onnx_models.folder(onnx_models.mlp(), tmp_path / "model")
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(StageFailure) as caught:
        backend.load(folder, {})
    assert caught.value.code == "gpu_provider_missing"


def test_what_counts_as_a_fallback_to_the_cpu(tmp_path: Path) -> None:
    """An Add may be shape arithmetic, or the model's own: what it gives tells."""
    node = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("Shape", ["x"], ["s"], name="shape"),
            node("Cast", ["s"], ["f"], name="sizes", to=onnx.TensorProto.FLOAT),
            node("ConstantOfShape", ["s"], ["zeros"], name="zeros"),
            node("Add", ["zeros", "zeros"], ["mask"], name="mask"),
            node("Mul", ["x", "mask"], ["masked"]),
            node("Add", ["x", "masked"], ["t"], name="sum"),
            node("Det", ["t"], ["y"], name="det"),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4, 4])],
        [
            onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"]),
            onnx.helper.make_tensor_value_info("f", onnx.TensorProto.FLOAT, [3]),
        ],
    )
    folder = onnx_models.folder(onnx.helper.make_model(graph), tmp_path)
    on_cpu = [("Shape", "shape"), ("Cast", "sizes"), ("ConstantOfShape", "zeros"), ("Add", "mask"), ("Mul", "")]
    on_cpu += [("Add", "sum"), ("Det", "det"), ("MemcpyToHost", "")]
    assert fallen_nodes(on_cpu) == {"Det": ["det"]}
    assert fallen_nodes(on_cpu, folder / MODEL_FILE) == {"Add": ["sum"], "Det": ["det"]}


def test_what_it_proposes_by_precision_and_device() -> None:
    backend = OnnxRuntimeCudaBackend()
    proposal = backend.propose(_case())
    assert [c.id for c in proposal.candidates] == ["ortcuda-fp32", "ortcuda-fp16", "ortcuda-bf16"]
    assert [s.name for s in proposal.skipped] == ["ortcuda-int8"]
    fused = [c for c in backend.propose(_case("transformer")).candidates if c.id.endswith("-fused")]
    assert [(c.id, c.precision, c.lossless) for c in fused] == [
        ("ortcuda-fp32-fused", "fp32", True),
        ("ortcuda-fp16-fused", "fp16", False),
    ]
    assert all(c.steps[0].options["fusions"] for c in fused)
    kept = backend.propose(_case("transformer", quantization={"keep_nodes": ["/q/MatMul"]})).candidates
    assert not [c for c in kept if c.id.endswith("-fused")], "the fused graph has no node of that name"
    assert backend.propose(_case(target={"device": "cpu"})).candidates == ()
    only = backend.propose(_case(precisions=["int8"], calibration={"dataset_id": "dst_x"}))
    assert [c.id for c in only.candidates] == ["ortcuda-int8"]
    assert only.candidates[0].steps[-1].extra == ("calibration",)
    for candidate in (*proposal.candidates, *only.candidates):
        stage = kernel.stages()[candidate.steps[-1].stage]
        stage.Options.model_validate(dict(candidate.steps[-1].options))
        parsed(RuntimeOptions, candidate.build_options, "CUDA")


def test_an_old_gpu_has_no_bfloat16() -> None:
    old = Case(OptimizationSpec(model_id="mdl_x"), {"Conv": 1}, "cnn", hardware={"gpu": {"compute_capability": "7.5"}})
    assert "ortcuda-bf16" not in [c.id for c in OnnxRuntimeCudaBackend().propose(old).candidates]


@pytest.mark.parametrize(("kind", "expected"), [("cnn", ["graph", "nhwc"]), ("transformer", ["graph"])])
def test_variants_share_the_engine(kind: str, expected: list[str]) -> None:
    case = _case(kind)
    backend = OnnxRuntimeCudaBackend()
    half = next(c for c in backend.propose(case).candidates if c.precision == "fp16")
    found = backend.variants(case, half)
    assert [v.id.rpartition(".")[2] for v in found] == expected
    assert all(v.steps == half.steps and v.runtime["cuda_graph"] for v in found)
    assert backend.with_threads({"cuda_graph": True}, 4) == {"cuda_graph": True}


def test_options_are_checked_and_translated() -> None:
    options = parsed(
        RuntimeOptions, {"cuda_graph": True, "gpu_mem_limit_mb": 2, "tf32": False, "prefer_nhwc": True}, "CUDA"
    )
    assert options.provider_options() == {
        "device_id": "0",
        "enable_cuda_graph": "1",
        "gpu_mem_limit": str(2 << 20),
        "use_tf32": "0",
        "prefer_nhwc": "1",
    }
    assert parsed(RuntimeOptions, {}, "CUDA").provider_options() == {"device_id": "0"}
    with pytest.raises(StageFailure) as caught:
        parsed(RuntimeOptions, {"cuda_grap": True}, "CUDA")
    assert caught.value.code == "invalid_backend_options"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (
            "Available memory of 1 is smaller than requested bytes of 2",
            "gpu_out_of_memory",
        ),
        ("CUDA failure 2: out of memory ; GPU=0", "gpu_out_of_memory"),
        ("something else", "inference_failed"),
    ],
)
def test_lack_of_gpu_memory_is_told_apart(message: str, code: str) -> None:
    failure = gpu_failure("inference_failed", RuntimeError(message))
    assert failure.code == code
    assert failure.cacheable == (code == "inference_failed")


def test_the_bundles_script_carries_the_options() -> None:
    script = OnnxRuntimeCudaBackend().infer_script({"cuda_graph": True, "tf32": False})
    tree = ast.parse(script)
    constants = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    told = [json.loads(text) for text in constants if text.startswith("{")]
    assert {"cuda_graph": True, "tf32": False} in told
    assert {"device_id": "0", "enable_cuda_graph": "1", "use_tf32": "0"} in told
    assert "sys.exit" in script
    compile(script, "infer.py", "exec")
