"""sensitivity: the figures agree with quantizing single nodes for real, and the time is kept."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from app.domain.failures import FailureKind
from tests.factories import architectures
from tests.factories.onnx_models import make_model, tensor, value
from tests.unit.test_quantize import SEVEN_BITS, Bench, Quiet, fails
from workers.kernel import StageContext, StageResult, backends
from workers.stages.sensitivity import Sensitivity, SensitivityOptions


def run(
    bench: Bench, *, data: bool = True, ranges: Path | None = None, soft: float | None = None, **options: Any
) -> StageResult:
    bench.runs += 1
    workspace = bench.root / f"sensitivity{bench.runs}"
    workspace.mkdir()
    inputs = {"model": bench.source}
    if data:
        inputs["calibration"] = bench.calibration
    if ranges is not None:
        inputs["ranges"] = ranges
    deadline = None if soft is None else time.monotonic() + soft
    ctx = StageContext(inputs, workspace, workspace / "out", Quiet(), {}, soft_deadline=deadline)
    if options.get("recipe") in ("static_int8", "dynamic_int8"):
        options.setdefault("reduce_range", SEVEN_BITS)  # as `Bench` quantizes
    result = Sensitivity().run(ctx, SensitivityOptions(**options))
    json.dumps(result.data, allow_nan=False)
    return result


def normalized_error(bench: Bench) -> float:
    """Of the quantized model's outputs on the bench's data, the worst output's."""
    backend = backends()["onnxruntime"]()
    expected = backend.load(bench.source, {}).run(bench.data)
    actual = backend.load(bench.out / "model", {}).run(bench.data)
    return max(float(np.linalg.norm(actual[k] - v) / np.linalg.norm(v)) for k, v in expected.items())


def with_outlier() -> onnx.ModelProto:
    """Three products in a row; the input of the second has one channel of a thousand times the others' size, which its
    weight takes back."""
    rng = np.random.default_rng(0)
    first, second, third = (rng.normal(0, 0.3, (16, 16)).astype(np.float32) for _ in range(3))
    first[:, 3] *= 1000
    second[3] /= 1000
    weights = [tensor("w1", first), tensor("w2", second), tensor("w3", third)]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "w2"], ["b"], name="second"),
        helper.make_node("Tanh", ["b"], ["c"], name="tanh"),
        helper.make_node("MatMul", ["c", "w3"], ["y"], name="third"),
    ]
    return make_model(nodes, [value("x", ["batch", 16])], [value("y", ["batch", 16])], weights)


@pytest.mark.parametrize("recipe", ["static_int8", "dynamic_int8"])
def test_the_node_that_hurts_comes_first(recipe: Any, tmp_path: Path) -> None:
    bench = Bench(tmp_path, with_outlier(), simplified=False)
    result = run(bench, recipe=recipe, max_groups=1)
    nodes = result.data["nodes"]
    assert result.reusable
    assert nodes[0]["name"] == "second"
    assert nodes[0]["error"] > 10 * nodes[1]["error"]
    assert {n["measured"] for n in nodes} == {"node"}
    assert result.data["complete"]
    assert result.data["metric"] == "normalized_error"
    assert result.data["groups"] == [
        {"id": 0, "nodes": ["first", "second", "third"], "error": result.data["all_error"]}
    ]


@pytest.mark.parametrize("architecture", [architectures.bert, architectures.residual_cnn, architectures.depthwise_cnn])
@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_simulated_and_real_quantization_agree(architecture: Any, activations: Any, tmp_path: Path) -> None:
    bench = Bench(tmp_path, architecture())
    bench.run("static_int8", activations=activations)
    real = normalized_error(bench)
    found = run(bench, recipe="static_int8", activations=activations, ranges=bench.out / "ranges", max_samples=32)
    data = found.data
    if data["metric"] == "normalized_error":
        assert data["all_error"] == pytest.approx(real, rel=0.15)
    else:
        assert data["metric"] == "kl"
        assert 0 < data["all_error"] < 0.01


@pytest.mark.parametrize("recipe", ["static_int8", "dynamic_int8"])
def test_one_node_alone_agrees_with_quantizing_it_alone(recipe: Any, tmp_path: Path) -> None:
    bench = Bench(tmp_path, with_outlier(), simplified=False)
    # One batch of all samples, as the check below runs it: dynamic ranges are the batch's.
    np.savez(bench.calibration / "data.npz", **{k: v[:8] for k, v in bench.data.items()})
    bench.data = {k: v[:8] for k, v in bench.data.items()}
    found = {n["name"]: n["error"] for n in run(bench, recipe=recipe).data["nodes"]}
    for name, error in found.items():
        bench.run(recipe, exclude_nodes=sorted({*found} - {name}))
        assert error == pytest.approx(normalized_error(bench), rel=0.05)


def test_excluded_nodes_are_not_measured(tmp_path: Path) -> None:
    bench = Bench(tmp_path, with_outlier(), simplified=False)
    assert {n["name"] for n in run(bench, exclude_nodes=["second"]).data["nodes"]} == {"first", "third"}
    with fails("unknown_node", FailureKind.REQUEST):
        run(bench, exclude_nodes=["secnd"])


def test_time_that_is_out_leaves_what_was_measured(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.bert())
    result = run(bench, soft=0.0)
    assert not result.reusable
    assert not result.data["complete"]
    assert {n["measured"] for n in result.data["nodes"]} == {"none"}
    assert all(n["error"] is None for n in result.data["nodes"])


def test_groups_that_do_not_matter_stay_whole(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.bert(layers=3))
    whole = run(bench, max_groups=4).data
    assert len(whole["groups"]) == 4
    assert sum(len(g["nodes"]) for g in whole["groups"]) == len(whole["nodes"]) == 25
    errors = [n["error"] for n in whole["nodes"]]
    assert errors == sorted(errors, reverse=True)
    assert run(bench, max_groups=4).data == whole


def test_dynamic_int8_without_data(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.lstm())
    data = run(bench, data=False, recipe="dynamic_int8").data
    assert {n["op_type"] for n in data["nodes"]} == {"LSTM", "Gemm"}
    with fails("calibration_data_missing", FailureKind.REQUEST):
        run(bench, data=False, recipe="static_int8")


def test_a_fixed_batch_and_fused_nodes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert run(Bench(tmp_path / "a", architectures.residual_cnn(batch=5)), max_samples=12).data["samples"] == 12
    bench = Bench(tmp_path, architectures.bert(), fusions=True)
    data = run(bench, recipe="dynamic_int8").data
    assert {n["op_type"] for n in data["nodes"]} == {"Attention", "MatMul", "Gemm"}


def test_weights_in_an_external_file(tmp_path: Path) -> None:
    bench = Bench(tmp_path, with_outlier(), simplified=False)
    plain = run(bench).data
    model = onnx.load(bench.source / "model.onnx")
    (bench.source / "model.onnx").unlink()
    onnx.save_model(
        model, bench.source / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )
    assert run(bench).data == plain


def test_infinite_values_are_left_out(tmp_path: Path) -> None:
    model = with_outlier()
    model.graph.initializer.append(numpy_helper.from_array(np.full(16, -np.inf, np.float32), "infinite"))
    model.graph.node.append(helper.make_node("Add", ["y", "infinite"], ["masked"], name="mask"))
    model.graph.node.append(helper.make_node("MatMul", ["masked", "w3"], ["z"], name="last"))
    model.graph.output.append(value("z", ["batch", 16]))
    bench = Bench(tmp_path, model, simplified=False)
    assert "last" not in {n["name"] for n in run(bench).data["nodes"]}


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, with_outlier(), simplified=False)
    bench.run("static_int8")
    bench.source = bench.out / "model"
    with fails("already_quantized"):
        run(bench)


def test_arithmetic_of_shapes_is_not_switched(tmp_path: Path) -> None:
    """A Concat of sizes is of a type that static quantization takes, and is never rounded."""
    rng = np.random.default_rng(0)
    weights = [tensor("w1", rng.normal(0, 0.3, (16, 16))), tensor("w2", rng.normal(0, 0.3, (4, 4)))]
    sizes = [
        numpy_helper.from_array(np.array(values, np.int64), name) for name, values in (("zero", [0]), ("rest", [4, 4]))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Shape", ["a"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "zero"], ["batch_size"], name="gather"),
        helper.make_node("Concat", ["batch_size", "rest"], ["sizes"], name="concat", axis=0),
        helper.make_node("Reshape", ["a", "sizes"], ["b"], name="reshape"),
        helper.make_node("MatMul", ["b", "w2"], ["y"], name="second"),
    ]
    model = make_model(nodes, [value("x", ["batch", 16])], [value("y", ["batch", 4, 4])], [*weights, *sizes])
    bench = Bench(tmp_path, model, simplified=False)
    result = run(bench, recipe="static_int8", op_types=["MatMul", "Concat"])
    assert {n["name"] for n in result.data["nodes"]} == {"first", "second"}


def test_the_error_is_the_one_that_the_job_judges_by(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.residual_cnn(channels=16))
    by_kind, by_numbers = (run(bench, metric=metric).data for metric in ("auto", "normalized_error"))
    assert (by_kind["metric"], by_numbers["metric"]) == ("kl", "normalized_error")
    assert {n["name"]: n["work"] for n in by_kind["nodes"]} == {n["name"]: n["work"] for n in by_numbers["nodes"]}
    assert all(n["work"] > 0 for n in by_kind["nodes"])
    assert by_numbers["all_error"] > by_kind["all_error"]
