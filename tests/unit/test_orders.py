"""Engines beside the original at every shape, in several orders of calls: what must not ship, what bundles refuse."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from app.domain.spec import OptimizationSpec
from tests.factories.architectures import GraphBuilder
from tests.factories.onnx_models import make_model, tensor, value
from workers.candidates import Candidate
from workers.hardware import describe
from workers.kernel import Reporter, StageContext, TensorSpec, backends, stages
from workers.measure.orders import at_least
from workers.measure.pieces import folder_digest
from workers.measure.shapes import judged_shapes
from workers.pipeline.budget import Budget
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.job_data import spanned
from workers.pipeline.select import Tried, judge
from workers.pipeline.shape_checks import ShapeChecks
from workers.pipeline.shape_rules import accepted, unfit
from workers.stages.check_shapes import CheckShapes, CheckShapesOptions
from workers.stages.package import Package, PackageOptions
from workers.stages.shape_probes import ShapeProbes, ShapeProbesOptions

LENGTH = 20
LIMIT = 1.0


class Quiet(Reporter):
    def progress(self, fraction: float, message: str = "") -> None: ...

    def note(self, message: str, **facts: Any) -> None: ...


def saved(folder: Path, model: ModelProto) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder


Checked = Callable[..., dict[str, Any]]


@pytest.fixture
def checked(tmp_path: Path) -> Checked:
    """What `check_shapes` finds of an engine (a folder) beside an original, with data or without."""

    def run(
        original: ModelProto,
        engine: Path,
        data: Mapping[str, Any] | None = None,
        *,
        backend: str = "onnxruntime",
        runtime: Mapping[str, Any] | None = None,
        thorough: bool = True,
    ) -> dict[str, Any]:
        inputs = {"model": saved(tmp_path / "original", original)}
        if data is not None:
            (tmp_path / "data").mkdir(exist_ok=True)
            np.savez(tmp_path / "data" / "d.npz", **data)  # type: ignore[arg-type]
            inputs["data"] = tmp_path / "data"

        def ctx(given: dict[str, Path], out: str) -> StageContext:
            return StageContext(given, tmp_path, tmp_path / out, Quiet(), describe())

        probes = ShapeProbes().run(ctx(inputs, "made"), ShapeProbesOptions())
        options = CheckShapesOptions(backend=backend, runtime=dict(runtime or {}), thorough=thorough)
        given = {"engine": engine, "probes": tmp_path / "made" / "probes"}
        return {**CheckShapes().run(ctx(given, "found"), options).data, **probes.data}

    return run


# An engine that the first call spoils


def attention() -> ModelProto:
    """Attention without a mask over [batch, length, 16]: OpenVINO's fused kernels answer by the first length."""
    net = GraphBuilder(3)
    split = net.ints(0, -1, 2, 8)
    q, k, v = (net.add("Reshape", net.linear("x", name, 16, 16), split) for name in "qkv")
    q, v = (net.add("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
    scores = net.add("Mul", net.add("MatMul", q, net.add("Transpose", k, perm=[0, 2, 3, 1])), net.constant("s", 0.35))
    found = net.add("MatMul", net.add("Softmax", scores, axis=-1), v)
    net.linear(net.add("Reshape", net.add("Transpose", found, perm=[0, 2, 1, 3]), net.ints(0, -1, 16)), "out", 16, 16)
    net.nodes[-1].output[0] = "y"
    return net.model([value("x", ["batch", "length", 16])], [value("y", ["batch", "length", 16])])


@pytest.mark.parametrize("thorough", [True, False])
def test_an_engine_that_the_first_call_spoils_does_not_ship(checked: Checked, tmp_path: Path, thorough: bool) -> None:
    """As the plug-in does it where the loader does not keep clear of the fault."""
    model, engine = attention(), tmp_path / "engine"
    engine.mkdir()
    openvino = backends()["openvino"]()
    made = openvino.build(saved(tmp_path / "built", model), engine, {}, Quiet())
    data = {"x": np.random.default_rng(0).standard_normal((40, LENGTH, 16)).astype(np.float32)}
    usual = {"outputs": {"y": {"kind": "numbers", "normalized_error": 1e-6, "cosine": 1.0}}}
    safe = checked(model, engine, data, backend="openvino", runtime=made["runtime"], thorough=thorough)
    assert unfit(safe, usual, LIMIT) == []
    assert made["runtime"]["snippets"] is False
    spoiled = {**made["runtime"], "snippets": None}
    found = checked(model, engine, data, backend="openvino", runtime=spoiled, thorough=thorough)
    where = "order_dependent: at the typical shape (x [1, 20, 16])"
    assert any(why.startswith(where) for why in unfit(found, usual, LIMIT))


# Engines that are right at one size


def summed(step: float | None = None) -> ModelProto:
    """A sum over the length, then a linear layer; with `step`, the sum is quantized as for the length of the data."""
    rng = np.random.default_rng(1)
    nodes = [helper.make_node("ReduceSum", ["x", "axis"], ["sum"], keepdims=0)]
    weights = [tensor("axis", [1], np.int64), tensor("w", rng.normal(0, 0.3, (8, 4)))]
    last = "sum"
    if step is not None:
        weights += [tensor("step", step), tensor("zero", 0, np.int8)]
        nodes += [
            helper.make_node("QuantizeLinear", ["sum", "step", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["dq"]),
        ]
        last = "dq"
    nodes.append(helper.make_node("MatMul", [last, "w"], ["y"]))
    return make_model(nodes, [value("x", ["batch", "length", 8])], [value("y", ["batch", 4])], weights)


def test_int8_that_is_right_at_the_datas_length_alone(checked: Checked, tmp_path: Path) -> None:
    """Less than 2 % off at length 20, more than 10 % at length 1, and clipped at length 80: lengths that the data do
    not have are refused by the bundle, one that they have stops the engine."""
    x = np.random.default_rng(0).uniform(0.2, 1, (40, LENGTH, 8)).astype(np.float32)
    engine = saved(tmp_path / "engine", summed(step=0.35))
    usual = {"outputs": {"y": {"kind": "numbers", "normalized_error": 0.0095, "cosine": 1.0}}}
    found = checked(summed(), engine, {"x": x})
    by_label = {s["label"]: s["outputs"]["y"]["orders"]["longest first"]["normalized_error"] for s in found["shapes"]}
    assert by_label["typical"] < 2 < 10 < by_label["short"]
    assert unfit(found, usual, LIMIT) == []
    assert accepted(found, usual, LIMIT) == {"length": [LENGTH, LENGTH]}
    in_use = {**found, "shapes": [{**s, "in_use": s["label"] in ("short", "typical")} for s in found["shapes"]]}
    (why,) = unfit(in_use, usual, LIMIT)
    assert why.startswith("shape_dependent: at the short shape (x [1, 1, 8]) 'y' loses")
    figures = {"batches": {"1": {"speedup": {"ratio": 3.0, "low": 2.9, "high": 3.1}}}, "size_bytes": 1}
    accuracy = {**usual, "loss_percent": 0.0, "broken": None, "source": "dataset"}
    tried = Tried("int8", "int8", False, accuracy=accuracy, figures=figures, shapes=in_use)
    baseline = Tried("baseline", "fp32", True, figures=figures)
    verdict = judge(OptimizationSpec(model_id="m"), baseline, [tried], {"1": {"ratio": 1.0, "low": 0.99, "high": 1.01}})
    assert verdict.picked == "baseline"
    assert why in tried.reasons


def decoder(empty: float = 0.0) -> ModelProto:
    """`y` = x + the sum of the past keys; with `empty`, so much more where the past is empty."""
    nodes = [
        helper.make_node("ReduceSum", ["past", "axis"], ["kept"], keepdims=0),
        helper.make_node("Add", ["x", "kept"], ["sum"]),
        helper.make_node("Shape", ["past"], ["sizes"], start=1, end=2),
        helper.make_node("Equal", ["sizes", "nothing"], ["none"]),
        helper.make_node("Cast", ["none"], ["flag"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["flag", "more"], ["added"]),
        helper.make_node("Add", ["sum", "added"], ["y"]),
    ]
    weights = [tensor("axis", [1], np.int64), tensor("nothing", [0], np.int64), tensor("more", empty)]
    inputs = [value("x", ["batch", 8]), value("past", ["batch", "past_length", 8])]
    return make_model(nodes, inputs, [value("y", ["batch", 8])], weights)


def test_an_empty_past_is_judged_where_the_original_takes_it(checked: Checked, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("x", (30, 8)), ("past", (30, 16, 8)))}
    found = checked(decoder(), saved(tmp_path / "engine", decoder(0.3)), data)
    assert accepted(found, {}, LIMIT) == {"past_length": [1, None]}
    fine = checked(decoder(), saved(tmp_path / "fine", decoder()), data)
    assert accepted(fine, {}, LIMIT) == {}
    assert "empty past_length" in [s["label"] for s in fine["shapes"]]


def test_what_the_original_answers_with_nothing_or_refuses_is_left_out(checked: Checked, tmp_path: Path) -> None:
    """A mean over an empty length is no number; windows of 12 make no sense of one element."""
    nodes = [
        helper.make_node("AveragePool", ["x"], ["pooled"], kernel_shape=[12]),
        helper.make_node("ReduceMean", ["pooled"], ["y"], axes=[2], keepdims=0),
    ]
    model = make_model(nodes, [value("x", ["batch", 3, "time"])], [value("y", ["batch", 3])], [])
    found = checked(model, saved(tmp_path / "engine", model))
    assert [s["label"] for s in found["shapes"]] == ["typical", "long"]
    assert {at["label"] for at in found["left_out"]} == {"short", "empty time"}


def test_a_random_original_is_compared_with_nothing(checked: Checked, tmp_path: Path) -> None:
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["noise"]), helper.make_node("Add", ["x", "noise"], ["y"])]
    model = make_model(nodes, [value("x", ["batch", "t"])], [value("y", ["batch", "t"])], [])
    found = checked(model, saved(tmp_path / "engine", model))
    assert found["probes"] == []
    assert "random" in found["left_out"][0]["reason"]


def test_an_original_that_takes_no_made_up_input_blames_no_engine(checked: Checked, tmp_path: Path) -> None:
    """Ids of 0 to 9 where the table has 2 rows; no data."""
    nodes = [helper.make_node("Gather", ["table", "sum"], ["y"]), helper.make_node("Add", ["ids", "far"], ["sum"])]
    nodes.reverse()
    weights = [tensor("table", np.ones((2, 3))), tensor("far", [100], np.int64)]
    ids = value("ids", ["batch", "t"], TensorProto.INT64)
    model = make_model(nodes, [ids], [value("y", ["batch", "t", 3])], weights)
    found = checked(model, saved(tmp_path / "engine", model))
    assert found["probes"] == []
    assert "made up" in found["left_out"][0]["reason"]


# Which shapes, and how much chance explains


def test_axes_that_are_free_of_each_other_are_tried_one_by_one() -> None:
    specs = (TensorSpec("x", "float32", ("n", "a", 4)), TensorSpec("y", "float32", ("n", "b", 4)))
    layout = {(("x", (6, 4)), ("y", (9, 4))): 10}
    found = judged_shapes(specs, layout, None)
    first = {way[0].label: (way[0].dims["x"][1], way[0].dims["y"][1]) for way in found.others}
    assert first["short"] == (1, 1)
    assert first["long"] == (24, 36)
    assert first["short a"] == (1, 9)
    assert first["long b"] == (6, 36)
    assert first["empty b"] == (6, 0)


def test_few_flips_are_no_proof_of_a_loss() -> None:
    assert at_least(0, 17) == 0
    assert 100 * at_least(1, 17) == pytest.approx(0.301, abs=0.01)  # exact: 1 − 0.95^(1/17)
    assert 100 * at_least(9, 17) > 30


# In the search


class Outcome:
    """Of a stage that ran here."""

    def __init__(self, data: Any, outputs: Mapping[str, Path]) -> None:
        self.data, self.outputs = data, outputs


class Evaluator:
    """Runs the stages in this process, on folders instead of artifacts."""

    def __init__(self, folder: Path, original: Path, data: Path, inputs: list[dict[str, Any]], limit: float) -> None:
        self._folder, self._data = folder, data
        self.export = Outcome({"inputs": inputs}, {"model": original})
        self.spec = OptimizationSpec.model_validate(
            {"model_id": "m", "validation": {"max_accuracy_loss_percent": limit}}
        )
        self.budget = Budget(60.0)
        self.calls: list[str] = []

    def selection(self, inputs: dict[str, Path], samples: int, part: str) -> dict[str, Any]:
        inputs["data"] = self._data
        return {"max_samples": samples, "part": part}

    def call(self, stage: str, inputs: Mapping[str, Path], options: Mapping[str, Any], *_: Any) -> Outcome:
        self.calls.append(stage)
        out = self._folder / f"{len(self.calls)}"
        found = stages()[stage]
        ctx = StageContext(inputs, self._folder, out, Quiet(), describe())
        result = found().run(ctx, found.Options(**options))
        return Outcome(result.data, {name: out / name for name in result.outputs})


class Run(CandidateRun):
    @property
    def engine(self) -> Any:
        return self.folder

    @property
    def runtime(self) -> dict[str, Any]:
        return {}

    folder: Path


def test_the_search_drops_what_is_wrong_at_a_length_of_the_data(tmp_path: Path) -> None:
    """Quantized as for length 20, and the data have length 2 as well."""
    original = saved(tmp_path / "original", summed())
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "data" / "d.zip", "w") as archive:
        for count, length in ((30, LENGTH), (12, 2)):
            buffer = BytesIO()
            np.savez(buffer, x=rng.uniform(0.2, 1, (count, length, 8)).astype(np.float32))
            archive.writestr(f"{length}.npz", buffer.getvalue())
    inputs = [{"name": "x", "dtype": "float32", "shape": ["batch", "length", 8]}]
    evaluator = Evaluator(tmp_path, original, tmp_path / "data", inputs, LIMIT)
    checks = ShapeChecks(evaluator)  # type: ignore[arg-type]  # what it needs of one
    for step, kept in ((0.35, False), (None, True)):
        run = Run.of(Candidate(id="c", name="engine", backend="onnxruntime", precision="int8", steps=()))
        run.folder = saved(tmp_path / f"engine{step}", summed(step))
        checks.shortest_first(run, 60.0)
        wrong = "; ".join(unfit(run.tried.shapes, run.tried.accuracy, LIMIT))
        assert (wrong == "") is kept
        if not kept:
            assert "shape_dependent: at the short shape (x [1, 2, 8])" in wrong
        else:
            checks.every_order(run, 60.0)
            assert run.tried.shapes is not None
            assert len(run.tried.shapes["orders"]) == 3
    assert evaluator.calls.count("shape_probes") == 1  # the original answers once for all


def test_profiles_of_tensorrt_tell_the_sizes_in_use() -> None:
    wanted = (
        {"x": {"min": [1, 1], "opt": [1, 32], "max": [8, 64]}},
        {"x": {"min": [1, 64], "opt": [1, 256], "max": [4, 512]}},
    )
    spec = OptimizationSpec.model_validate({"model_id": "m", "tensorrt": {"profiles": wanted}})
    assert spec.tensorrt.profiles is not None
    assert spanned(spec.tensorrt.profiles) == {"x": {"min": [1, 1], "opt": [1, 32], "max": [8, 512]}}


# The bundle


def test_a_bundle_refuses_sizes_that_its_engine_was_not_seen_to_answer(tmp_path: Path) -> None:
    engine = saved(tmp_path / "engine", summed())
    manifest = {"engine": {"accepts": {"x": [None, [LENGTH, None], None]}, "precision": "fp32"}, "versions": {}}
    ranges = {"x": {"min": [1, LENGTH, 8], "opt": [1, LENGTH, 8], "max": [8, 64, 8]}}
    options = PackageOptions(
        name="m",
        backend="onnxruntime",
        runtime={},
        engine_format="onnx",
        manifest=manifest,
        shapes=ranges,
        engine_digest=folder_digest(engine),
    )
    ctx = StageContext({"engine": engine}, tmp_path, tmp_path / "out", Quiet(), describe())
    Package().run(ctx, options)
    folder = tmp_path / "bundle"
    with zipfile.ZipFile(tmp_path / "out" / "bundle" / "m-bundle.zip") as archive:
        archive.extractall(folder)
    assert "axis 1: at least 20" in (folder / "README.md").read_text()
    for length, code in ((LENGTH, 0), (64, 0), (1, 2)):
        np.savez(folder / "in.npz", x=np.ones((2, length, 8), np.float32))
        command = [sys.executable, "infer.py", "in.npz", "--repeat", "1"]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == code, ran.stderr
    assert "input x has size 1 on axis 1; this engine takes at least 20" in ran.stderr
    assert "Traceback" not in ran.stderr
