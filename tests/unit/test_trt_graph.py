"""What the TensorRT backend reads from a graph, and which candidates it proposes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from app.domain.failures import StageFailure
from app.domain.spec import OptimizationSpec
from tests.factories import onnx_models as models
from workers.backends.tensorrt import recipes as trt_recipes
from workers.backends.tensorrt.graph import GraphFacts, check_gpu, read_graph
from workers.backends.tensorrt.options import BuildOptions
from workers.backends.tensorrt.probe import Gpu, capability, gpu_from
from workers.candidates import Case

H100 = Gpu("H100", "9.0", 80 << 30, "13.1", "590")
T4 = Gpu("T4", "7.5", 16 << 30, "13.1", "590")


def folder(model: onnx.ModelProto, tmp_path: Path) -> Path:
    return models.folder(model, tmp_path / "model")


def one_node(op: str, dtype: int, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node(op, ["x"], ["y"], name="n", **attributes)
    return models.make_model([node], [models.value("x", ["b", 4], dtype)], [models.value("y", ["b", 4], dtype)])


def refused(model: onnx.ModelProto, tmp_path: Path) -> StageFailure:
    with pytest.raises(StageFailure) as caught:
        read_graph(folder(model, tmp_path))
    assert caught.value.remedy
    return caught.value


def test_a_plain_graph(tmp_path: Path) -> None:
    facts = read_graph(folder(models.mlp(), tmp_path))
    assert [i.name for i in facts.inputs] == ["input"]
    assert facts.precisions == ()
    assert facts.declared == {}


def test_int64_and_float64_are_told(tmp_path: Path) -> None:
    facts = read_graph(folder(models.transformer_block(), tmp_path))
    assert facts.int64 == ("input_ids", "attention_mask")
    double = read_graph(models.folder(one_node("Abs", TensorProto.DOUBLE), tmp_path / "double"))
    assert double.declared == {"x": "float64", "y": "float64"}


def test_dynamic_rank(tmp_path: Path) -> None:
    failure = refused(models.dynamic_rank(), tmp_path)
    assert (failure.code, failure.tensor) == ("dynamic_rank", "input")


def test_types_that_tensorrt_has_not(tmp_path: Path) -> None:
    assert refused(models.string_input(), tmp_path).code == "unsupported_input_type"
    cast = helper.make_node("Cast", ["x"], ["y"], name="n", to=TensorProto.UINT16)
    model = models.make_model([cast], [models.value("x", [4])], [models.value("y", [4], TensorProto.UINT16)])
    failure = refused(model, tmp_path / "out")
    assert (failure.code, failure.tensor) == ("unsupported_output_type", "y")
    assert "onnxruntime" in (failure.remedy or "")


def quantized(zero: Any, dtype: Any) -> onnx.ModelProto:
    stored = [models.tensor("s", 0.1), models.tensor("z", zero, dtype)]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dequantize"),
    ]
    return models.make_model(nodes, [models.value("x", ["b", 4])], [models.value("y", ["b", 4])], stored)


@pytest.mark.parametrize(("zero", "dtype"), [(0, np.uint8), (128, np.uint8), (3, np.int8)])
def test_asymmetric_quantization_is_refused(zero: int, dtype: Any, tmp_path: Path) -> None:
    failure = refused(quantized(zero, dtype), tmp_path)
    assert (failure.code, failure.node) == ("asymmetric_quantization", "quantize")


@pytest.mark.parametrize(("attributes", "taken"), [({}, False), ({"output_dtype": TensorProto.INT8}, True)])
def test_without_a_zero_point_the_type_decides(attributes: dict[str, int], taken: bool, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], name="quantize", **attributes),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"], name="dequantize"),
    ]
    ends = [models.value("x", ["b", 4])], [models.value("y", ["b", 4])]
    model = models.make_model(nodes, *ends, [models.tensor("s", 0.1)])
    model.opset_import[0].version = 21
    if taken:
        read_graph(folder(model, tmp_path))
    else:
        assert refused(model, tmp_path).code == "asymmetric_quantization"


def test_precisions_of_a_graph(tmp_path: Path) -> None:
    assert read_graph(folder(quantized(0, np.int8), tmp_path)).precisions == ("int8",)
    half = helper.make_node("Cast", ["x"], ["y"], name="n", to=TensorProto.BFLOAT16)
    model = models.make_model([half], [models.value("x", [4])], [models.value("y", [4], TensorProto.BFLOAT16)])
    assert read_graph(models.folder(model, tmp_path / "half")).precisions == ("bf16",)


def test_a_precision_that_the_gpu_lacks() -> None:
    facts = GraphFacts((), (), ("fp8",), 1)
    check_gpu(facts, H100)
    with pytest.raises(StageFailure) as caught:
        check_gpu(facts, T4)
    assert caught.value.code == "precision_unsupported"
    assert "8.9" in caught.value.detail
    assert "7.5" in caught.value.detail
    with pytest.raises(StageFailure):
        check_gpu(GraphFacts((), (), ("bf16",), 1), T4)


def test_a_model_larger_than_the_gpus_memory() -> None:
    with pytest.raises(StageFailure) as caught:
        check_gpu(GraphFacts((), (), (), 17 << 30), T4)
    assert caught.value.code == "gpu_out_of_memory"
    assert not caught.value.cacheable


def test_the_drivers_answer() -> None:
    assert gpu_from({"error": "no driver"}) == "no driver"
    assert capability("8.9") == (8, 9) > capability("8.6")
    assert capability("") == capability("sm_90") == (0, 0)


def case(*, cc: str | None = "9.0", kind: str = "cnn", ops: dict[str, int] | None = None, **changes: Any) -> Case:
    spec = {"model_id": "m", "calibration": {"dataset_id": "d"}, **changes.pop("spec", {})}
    return Case(
        spec=OptimizationSpec.model_validate(spec),
        ops={"Conv": 3, "Gemm": 1} if ops is None else ops,
        kind=kind,
        hardware={"gpu": {"compute_capability": cc}} if cc else {},
        has_calibration=changes.pop("has_calibration", True),
        **changes,
    )


def test_the_jobs_build_options_reach_every_candidate() -> None:
    profiles = [{"x": {"min": [1, 4], "opt": [b, 4], "max": [b, 4]}} for b in (1, 8)]
    asked = {"workspace_mb": 512, "optimization_level": 5, "profiles": profiles}
    for candidate in trt_recipes.propose(case(spec={"tensorrt": asked})).candidates:
        options = BuildOptions.model_validate(candidate.build_options)
        assert (options.workspace_mb, options.optimization_level) == (512, 5)
        assert options.profiles == profiles
    with pytest.raises(ValueError, match="not both"):
        case(spec={"tensorrt": asked, "shapes": profiles[0]})
    for low, high, words in (([4], [2], "value 0 needs"), ([1, 2], [3], "same length")):
        with pytest.raises(ValueError, match=words):
            case(spec={"tensorrt": {"shape_values": {"n": {"min": low, "opt": low, "max": high}}}})


def test_convolutions_like_int8_and_products_fp8() -> None:
    for kind, first in (("cnn", "trt-int8"), ("transformer", "trt-fp8")):
        found = trt_recipes.propose(case(kind=kind)).candidates
        assert min(found, key=lambda c: c.prior).id == first


def test_candidates_by_compute_capability() -> None:
    found = {c.id: c for c in trt_recipes.propose(case()).candidates}
    assert set(found) == {"trt-fp32", "trt-tf32", "trt-fp16", "trt-bf16", "trt-int8", "trt-fp8"}
    assert found["trt-fp32"].lossless
    assert not found["trt-tf32"].lossless
    assert found["trt-fp32"].build_options == {"precision": "fp32", "tf32": False, "batch_sizes": [1, 8]}
    int8 = found["trt-int8"].steps[-1]
    assert (int8.stage, int8.options["recipe"], int8.options["high_precision"]) == ("convert", "int8", "fp16")
    assert int8.extra == ("calibration",)
    fp16, bf16 = found["trt-fp16"].steps[-1], found["trt-bf16"].steps[-1]
    assert fp16.options["max_samples"] < int8.options["max_samples"], "a few tell what leaves its range"
    assert not bf16.extra
    assert found["trt-int8"].name == "TensorRT int8, the rest fp16"
    (graph,) = trt_recipes.variants(found["trt-fp16"])
    assert (graph.id, graph.runtime) == ("trt-fp16.graph", {"cuda_graph": True})


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"cc": "8.6"}, {"trt-fp8": "8.9"}),
        ({"cc": "7.5"}, {"trt-bf16": "8.0", "trt-fp8": "8.9", "trt-tf32": "8.0"}),
        ({"has_calibration": False}, {"trt-int8": "calibration data", "trt-fp8": "calibration data"}),
        ({"ops": {"Relu": 1}}, {"trt-int8": "no operator", "trt-fp16": "no operator"}),
        ({"quantized": True}, {"trt-fp16": "quantized already", "trt-int8": "quantized already"}),
    ],
)
def test_what_is_not_tried_says_why(changes: dict[str, Any], missing: dict[str, str]) -> None:
    proposal = trt_recipes.propose(case(**changes))
    reasons = {s.name: s.reason for s in proposal.skipped}
    for name, words in missing.items():
        assert words in reasons[name]
        assert name not in {c.id for c in proposal.candidates}


def test_only_what_the_job_lets_it_use() -> None:
    proposal = trt_recipes.propose(case(spec={"precisions": ["fp16", "int4"]}))
    assert [c.id for c in proposal.candidates] == ["trt-fp16", "trt-int4"]
    unasked = {s.name: s.reason for s in trt_recipes.propose(case()).skipped}
    assert set(unasked) == {"trt-int4"}
    assert not trt_recipes.propose(case(spec={"target": {"device": "cpu"}})).candidates


def test_no_gpu_proposes_nothing() -> None:
    proposal = trt_recipes.propose(case(cc=None))
    assert not proposal.candidates
    assert "NVIDIA" in proposal.skipped[0].reason
