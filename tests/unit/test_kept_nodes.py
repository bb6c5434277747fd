"""Keeping nodes of explicit int8 and fp8 graphs in higher precision: one calibration serves the conversion, the
sensitivity and every conversion that keeps nodes. The graphs run on ONNX Runtime's CPU provider."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import OptimizationSpec
from tests.factories import architectures
from tests.factories.onnx_models import make_model, tensor, value
from tests.unit.test_quantize import SEVEN_BITS, Bench, Quiet, fails
from tests.unit.test_sensitivity import normalized_error, run, with_outlier
from workers.candidates import Case
from workers.kernel import StageContext, backends
from workers.pipeline.planner import planned
from workers.search.desk import Desk
from workers.search.requests import Rank, Subject
from workers.stages.convert import Convert, ConvertOptions
from workers.stages.sensitivity import SensitivityOptions


def convert(bench: Bench, *, ranges: Path | None = None, **options: Any) -> dict[str, Any]:
    """Into `bench.out`; by the ranges alone where there are any."""
    bench.runs += 1
    workspace = bench.root / f"convert{bench.runs}"
    workspace.mkdir()
    bench.out = workspace / "out"
    inputs = {"model": bench.source, **({"ranges": ranges} if ranges else {"calibration": bench.calibration})}
    result = Convert().run(StageContext(inputs, workspace, bench.out, Quiet(), {}), ConvertOptions(**options))
    return dict(result.data)


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_the_node_that_hurts_is_found_and_kept(recipe: Any, tmp_path: Path) -> None:
    bench = Bench(tmp_path, with_outlier(), simplified=False)
    convert(bench, recipe=recipe)
    before, ranges = normalized_error(bench), bench.out / "ranges"
    data = run(bench, recipe=recipe, ranges=ranges, data=True, max_groups=1).data
    worst = data["nodes"][0]
    if recipe == "int8":  # a float's exponent bears the outlier
        assert worst["name"] == "second"
        assert worst["error"] > 10 * data["nodes"][1]["error"]
    convert(bench, recipe=recipe, ranges=ranges, exclude_nodes=[worst["name"]])
    assert normalized_error(bench) < before
    kept = next(n for n in onnx.load(bench.out / "model" / "model.onnx").graph.node if n.name == worst["name"])
    assert not any("dequantized" in name for name in kept.input)
    # The file is the same however many nodes it was used for.
    assert (bench.out / "ranges" / "ranges.json").read_bytes() == (ranges / "ranges.json").read_bytes()


# What is converted for GPUs has eight bits, and is computed on this processor here.
_INT8_OR_FP8 = pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("int8", marks=pytest.mark.skipif(SEVEN_BITS, reason="sums of products of bytes saturate here")),
        "fp8",
    ],
)


@pytest.mark.parametrize("architecture", [architectures.residual_cnn, architectures.bert], ids=["cnn", "encoder"])
@_INT8_OR_FP8
def test_simulated_and_real_conversion_agree(architecture: Any, recipe: Any, tmp_path: Path) -> None:
    sizes = {"channels": 16} if architecture is architectures.residual_cnn else {}
    bench = Bench(tmp_path, architecture(**sizes))
    convert(bench, recipe=recipe)
    real = normalized_error(bench)
    data = run(bench, recipe=recipe, ranges=bench.out / "ranges", max_samples=32).data
    if data["metric"] == "normalized_error":
        assert data["all_error"] == pytest.approx(real, rel=0.1)
    else:
        assert data["metric"] == "kl"
        assert 0 < data["all_error"] < 0.02


@_INT8_OR_FP8
def test_one_node_alone_agrees_with_converting_it_alone(recipe: Any, tmp_path: Path) -> None:
    bench = Bench(tmp_path, with_outlier(), simplified=False)
    found = {n["name"]: n["error"] for n in run(bench, recipe=recipe, max_samples=32).data["nodes"]}
    assert set(found) == {"first", "second", "third"}
    for name, error in found.items():
        convert(bench, recipe=recipe, exclude_nodes=sorted({*found} - {name}))
        assert error == pytest.approx(normalized_error(bench), rel=0.05)


def two_branches() -> onnx.ModelProto:
    """A sum of two convolutions: which of its sides is rounded depends on which of them are."""
    rng = np.random.default_rng(0)
    weights = [tensor(n, rng.normal(0, 0.3, (8, 8, 3, 3))) for n in ("w1", "w2", "w3")]
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="left", **pads),
        helper.make_node("Conv", ["x", "w2"], ["b"], name="right", **pads),
        helper.make_node("Add", ["a", "b"], ["c"], name="sum"),
        helper.make_node("Relu", ["c"], ["d"], name="relu"),
        helper.make_node("Conv", ["d", "w3"], ["y"], name="last", **pads),
    ]
    shape = ["batch", 8, 6, 6]
    return make_model(nodes, [value("x", shape)], [value("y", shape)], weights)


@pytest.mark.parametrize("kept", ["left", "right", "sum", "last"])
def test_one_calibration_serves_every_choice_of_nodes(kept: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, two_branches(), simplified=False)
    everything = convert(bench, recipe="int8")
    assert everything["qdq_by_op"] == {"Add": 1, "Conv": 3}
    assert {n["name"] for n in run(bench, recipe="int8", ranges=bench.out / "ranges").data["nodes"]} == {
        *("left", "right", "sum", "last")
    }
    found = convert(bench, recipe="int8", ranges=bench.out / "ranges", exclude_nodes=[kept])
    assert found["calibration"]["reused"]
    assert found["qdq_by_op"].get("Conv", 0) == (3 if kept == "sum" else 2)
    assert found["qdq_by_op"].get("Add", 0) == (0 if kept == "sum" else 1)


def test_ranges_of_another_recipe_are_refused(tmp_path: Path) -> None:
    """Static int8 rounds what nodes write, too, and each side of zero by its own step."""
    bench = Bench(tmp_path, architectures.bert())
    convert(bench, recipe="int8")
    ranges = bench.out / "ranges"
    with fails("ranges_mismatch", FailureKind.DATA) as caught:
        bench.run("static_int8", ranges=ranges)
    assert "made for int8, not for static_int8" in caught.value.detail
    (tmp_path / "old").mkdir()
    known = json.loads((ranges / "ranges.json").read_text())
    (tmp_path / "old" / "ranges.json").write_text(json.dumps({**known, "format": 1}))
    with fails("ranges_invalid", FailureKind.DATA):
        convert(bench, recipe="int8", ranges=tmp_path / "old")


def test_every_recipe_keeps_the_jobs_nodes() -> None:
    """Every step that changes precision, of every backend and precision, is told which nodes to leave."""
    spec = OptimizationSpec.model_validate(
        {
            "model_id": "mdl_x",
            "precisions": ["fp32", "fp16", "bf16", "int8", "fp8", "int4"],
            "calibration": {"dataset_id": "ds_x"},
            "quantization": {"keep_nodes": ["b", "a"]},
        }
    )
    hardware = {"gpu": {"compute_capability": "9.0"}}
    isa = ("avx512_vnni", "avx512_bf16")
    for kind in ("cnn", "transformer", "rnn", "other"):
        ops = {"Conv": 3, "MatMul": 8, "LSTM": 1}
        case = Case(spec, ops, kind, isa=isa, hardware=hardware, has_calibration=True)
        steps = [
            (candidate.id, step)
            for name in ("onnxruntime", "openvino", "onnxruntime-cuda", "tensorrt")
            for candidate in backends()[name]().propose(case).candidates
            for step in candidate.steps
            if step.stage != "simplify"
        ]
        assert {"ortcuda-int8", "trt-int8", "trt-fp8", "ort-int8-static"} <= {cid for cid, _ in steps}
        for cid, step in steps:
            assert step.options["exclude_nodes"] == ["a", "b"], cid


class _Evaluator:
    """Knows the ranges of a conversion; its sensitivity stage cannot be run."""

    def __init__(self, spec: OptimizationSpec) -> None:
        self.spec = spec
        self.data = SimpleNamespace(calibration="data set", shapes=None, same=False)
        self.asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def ranges_of(self, step: Any, graph: Any) -> str:
        return f"ranges of {step.options['recipe']}"

    def call(self, stage: str, inputs: Any, options: Any, candidate: str, until: float) -> Any:
        self.asked.append((stage, dict(inputs), dict(options)))
        raise StageFailure("ranges_mismatch", "The ranges belong to another graph.", FailureKind.DATA)


@pytest.mark.parametrize(
    ("name", "cid", "recipe"),
    [
        ("tensorrt", "trt-int8", "int8"),
        ("tensorrt", "trt-fp8", "fp8"),
        ("onnxruntime-cuda", "ortcuda-int8", "int8"),
        ("onnxruntime", "ort-int8-static", "static_int8"),
    ],
)
def test_what_is_won_back_is_measured_as_it_was_quantized(name: str, cid: str, recipe: str) -> None:
    """With the ranges of that very recipe; and where it cannot be measured, the answer says why."""
    spec = OptimizationSpec.model_validate(
        {
            "model_id": "mdl_x",
            "precisions": ["int8", "fp8"],
            "calibration": {"dataset_id": "ds_x"},
            "validation": {"metric": "rmse"},
        }
    )
    case = Case(spec, {"MatMul": 8}, "other", hardware={"gpu": {"compute_capability": "9.0"}}, has_calibration=True)
    plan = next(planned(c) for c in backends()[name]().propose(case).candidates if c.id == cid)
    evaluator = _Evaluator(spec)
    desk = Desk(evaluator)  # type: ignore[arg-type]  # what it needs of one
    run = desk.run_of(plan)
    run.steps = [SimpleNamespace(outputs={"model": "simplified"}, seconds=1.0)] * 2  # type: ignore[list-item]
    run.build = run.steps[-1]
    answer = desk.answer(Rank(Subject(plan), 16, 60.0))
    ((stage, inputs, options),) = evaluator.asked
    assert (stage, options["recipe"]) == ("sensitivity", recipe)
    assert inputs["ranges"] == f"ranges of {recipe}"
    SensitivityOptions.model_validate(options)
    assert options["metric"] == "normalized_error", "what the job judges by"
    assert answer == {"why_not": "The ranges belong to another graph."}
