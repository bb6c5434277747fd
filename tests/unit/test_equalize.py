"""equalize: the same function with even channels; where nothing can take the division, nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from app.domain.failures import FailureKind
from tests.factories import architectures
from tests.factories.onnx_models import make_model, tensor, transformer_block, value
from tests.unit.test_quantize import Bench, Quiet, fails
from workers.kernel import StageContext, StageResult, backends
from workers.stages import equalize as stage
from workers.stages.equalize import Equalize, EqualizeOptions

OUTLIER = 200.0


def run(bench: Bench, *, data: bool = True, **options: Any) -> StageResult:
    """Afterwards the bench's model is the equalized one, and `bench.original` what it was."""
    bench.runs += 1
    workspace = bench.root / f"equalize{bench.runs}"
    workspace.mkdir()
    inputs = {"model": bench.source, **({"calibration": bench.calibration} if data else {})}
    ctx = StageContext(inputs, workspace, workspace / "out", Quiet(), {})
    return Equalize().run(ctx, EqualizeOptions(**options))


def folder(bench: Bench) -> Path:
    return bench.root / f"equalize{bench.runs}" / "out" / "model"


def difference(bench: Bench, one: Path, other: Path) -> float:
    """Relative, of the outputs on the bench's data."""
    backend = backends()["onnxruntime"]()
    a, b = (backend.load(f, {}).run(bench.data) for f in (one, other))
    return max(float(np.linalg.norm(a[k] - b[k]) / np.linalg.norm(a[k])) for k in a)


def spiky(model: ModelProto, gain: str, weights: list[str]) -> ModelProto:
    """One channel behind a norm grows by OUTLIER, and the products that read it take that back: the same function, as
    trained transformers have it."""
    found = {i.name: i for i in model.graph.initializer}
    for name, factor in ((gain, OUTLIER), *((w, 1 / OUTLIER) for w in weights)):
        array = numpy_helper.to_array(found[name]).copy()
        array[3] *= factor
        found[name].CopyFrom(numpy_helper.from_array(array, name))
    return model


def pre_norm(*, opset: int = 17) -> ModelProto:
    """x → LayerNormalization → two products → their sum."""
    rng = np.random.default_rng(0)
    weights = [
        tensor("gain", rng.normal(1, 0.1, 16)),
        tensor("shift", rng.normal(0, 0.1, 16)),
        tensor("q", rng.normal(0, 0.3, (16, 8))),
        tensor("k", rng.normal(0, 0.3, (8, 16))),
        tensor("bias", rng.normal(0, 0.1, 8)),
    ]
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain", "shift"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "q"], ["a"], name="q"),
        helper.make_node("Gemm", ["n", "k", "bias"], ["b"], name="k", transB=1),
        helper.make_node("Add", ["a", "b"], ["y"], name="sum"),
    ]
    return make_model(nodes, [value("x", ["batch", 16])], [value("y", ["batch", 8])], weights, opset=opset)


def small_block() -> ModelProto:
    return transformer_block(vocabulary=64)  # the ids of the test data


@pytest.mark.parametrize("opset", [17, 18])
def test_an_outlier_moves_from_the_norm_into_the_weights(opset: int, tmp_path: Path) -> None:
    model = spiky(pre_norm(opset=opset), "gain", ["q"])
    weights = {i.name: i for i in model.graph.initializer}
    transposed = numpy_helper.to_array(weights["k"]).copy()
    transposed[:, 3] /= OUTLIER
    weights["k"].CopyFrom(numpy_helper.from_array(transposed, "k"))
    shift = numpy_helper.to_array(weights["shift"]).copy()
    shift[3] *= OUTLIER
    weights["shift"].CopyFrom(numpy_helper.from_array(shift, "shift"))
    bench = Bench(tmp_path, model, simplified=False)
    bench.run("static_int8")
    before = difference(bench, bench.source, bench.out / "model")
    result = run(bench)
    (smoothed,) = result.data["smoothed"]
    assert smoothed["how"] == "folded"
    assert smoothed["outlier_ratio"] > 20
    assert result.data["nodes"] == smoothed["nodes"] == ["q", "k"]  # one scale for both
    made = onnx.load(folder(bench) / "model.onnx")
    onnx.checker.check_model(made)
    assert [n.op_type for n in made.graph.node] == ["LayerNormalization", "MatMul", "Gemm", "Add"]
    gain = numpy_helper.to_array(next(i for i in made.graph.initializer if i.name == made.graph.node[0].input[1]))
    assert np.abs(gain).max() / np.median(np.abs(gain)) < 40  # was 200
    assert result.data["max_abs_diff"] < 1e-4
    assert difference(bench, bench.source, folder(bench)) < 1e-5
    original, bench.source = bench.source, folder(bench)
    bench.run("static_int8")
    assert difference(bench, original, bench.out / "model") < 0.5 * before


@pytest.mark.parametrize("architecture", [architectures.bert, architectures.vit, architectures.gpt2, small_block])
def test_transformers_stay_the_same_function(architecture: Any, tmp_path: Path) -> None:
    bench = Bench(tmp_path, architecture(), simplified=architecture is not small_block)
    result = run(bench, alpha=0.7)
    assert result.data["fell_back"] is None
    assert result.data["nodes"]
    assert difference(bench, bench.source, folder(bench)) < 1e-5
    names = {n.name for n in onnx.load(bench.source / "model.onnx").graph.node}
    assert names <= {n.name for n in onnx.load(folder(bench) / "model.onnx").graph.node}


def test_a_norm_in_parts_takes_the_division(tmp_path: Path) -> None:
    """ViT's blocks: Q, K and V read one decomposed LayerNorm, whose gain and bias are a Mul and an Add."""
    bench = Bench(tmp_path, architectures.vit())
    smoothed = run(bench, insert_mul=False).data["smoothed"]
    assert [len(s["nodes"]) for s in smoothed if len(s["nodes"]) > 1] == [3, 3]
    assert {s["how"] for s in smoothed} == {"folded"}


def test_a_norm_that_others_read_gets_a_mul_where_it_pays(tmp_path: Path) -> None:
    """BERT's norms also feed the residual sum."""
    model = spiky(architectures.bert(), "0.norm1.weight", ["0.up.weight"])
    bench = Bench(tmp_path, model)
    result = run(bench)
    muls = [s for s in result.data["smoothed"] if s["how"] == "mul"]
    assert len(muls) == 1
    assert muls[0]["outlier_ratio"] > 20
    assert difference(bench, bench.source, folder(bench)) < 1e-5
    without = run(bench, insert_mul=False).data["smoothed"]
    assert {s["how"] for s in without} == {"folded"}


def test_excluded_products_stay(tmp_path: Path) -> None:
    bench = Bench(tmp_path, pre_norm(), simplified=False)
    result = run(bench, exclude_nodes=["k"])
    assert result.data["nodes"] == []
    assert "no product" in result.data["fell_back"]
    assert (folder(bench) / "model.onnx").read_bytes() == (bench.source / "model.onnx").read_bytes()
    with fails("unknown_node", FailureKind.REQUEST):
        run(bench, exclude_nodes=["nobody"])


def test_shared_weights_and_values_read_twice(tmp_path: Path) -> None:
    """A weight with a second reader keeps its values there; x·x does not take the factor twice."""
    rng = np.random.default_rng(0)
    weights = [tensor("w", rng.normal(0, 0.3, (8, 8))), tensor("v", rng.normal(0, 0.3, (8, 8)))]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="a"),
        helper.make_node("Mul", ["a", "a"], ["square"], name="square"),
        helper.make_node("MatMul", ["square", "v"], ["b"], name="b"),
        helper.make_node("Relu", ["b"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="y"),
    ]
    model = make_model(nodes, [value("x", ["batch", 8])], [value("y", ["batch", 8])], weights)
    bench = Bench(tmp_path, model, simplified=False)
    result = run(bench)
    assert result.data["fell_back"] is None
    assert "y" in result.data["nodes"]
    assert difference(bench, bench.source, folder(bench)) < 1e-5


def test_a_result_that_differs_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: ModelProto, *args: Any, **kwargs: Any) -> Any:
        found = original(model, *args, **kwargs)
        model.graph.initializer[0].CopyFrom(
            numpy_helper.from_array(
                numpy_helper.to_array(model.graph.initializer[0]) * 1.5, model.graph.initializer[0].name
            )
        )
        return found

    original = stage.smoothing.equalize
    monkeypatch.setattr(stage.smoothing, "equalize", broken)
    bench = Bench(tmp_path, pre_norm(), simplified=False)
    result = run(bench)
    assert "differs" in result.data["fell_back"]
    assert result.data["smoothed"] == []
    assert (folder(bench) / "model.onnx").read_bytes() == (bench.source / "model.onnx").read_bytes()


def test_what_has_no_products_passes_through(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    bench = Bench(tmp_path, make_model(nodes, [value("x", ["batch", 8])], [value("y", ["batch", 8])]), simplified=False)
    assert "no MatMul" in run(bench).data["fell_back"]


def test_data_is_needed_and_a_quantized_model_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, pre_norm(), simplified=False)
    with fails("calibration_data_missing", FailureKind.REQUEST):
        run(bench, data=False)
    bench.run("static_int8")
    bench.source = bench.out / "model"
    with fails("already_quantized"):
        run(bench)
