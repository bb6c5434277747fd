"""convert: explicit precision by TensorRT's rules, counted, run on the CPU and compared; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from app.domain.failures import FailureKind, StageFailure
from tests.factories import architectures, onnx_models
from tests.gpu.models import Case, make_case
from workers.graph import rewriting as graphs
from workers.graph.precision import awq, floats, int4


@pytest.fixture(scope="module", params=["residual_cnn", "bert", "vit", "gpt2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("residual_cnn", tmp_path_factory.mktemp("cnn"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("bert", tmp_path_factory.mktemp("encoder"))


def _refused(case: Case, recipe: str, **options: Any) -> StageFailure:
    with pytest.raises(StageFailure) as caught:
        case.converted(recipe, {}, **options)
    return caught.value


@pytest.mark.parametrize(
    ("recipe", "options", "least"),
    [
        ("fp16", {}, 0.9999),
        ("bf16", {}, 0.999),
        ("int8", {}, 0.995),
        ("int8", {"high_precision": "fp16"}, 0.995),
        ("fp8", {}, 0.99),
        ("fp8", {"high_precision": "fp16"}, 0.99),
        ("fp8", {"high_precision": "bf16"}, 0.99),
        ("int4", {"block_size": 32}, 0.95),
    ],
)
def test_each_precision_runs_on_the_cpu_and_keeps_the_outputs(
    case: Case, recipe: str, options: dict[str, Any], least: float
) -> None:
    folder, result = case.converted(recipe, {}, **options)
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model)
    data = result.data
    assert data["quantized_nodes"] == sum(data["qdq_by_op"].values()) > 0
    assert data["trial_run"]["finite"]
    assert data["trial_run"]["cosine"] >= least
    original = onnx.load(case.model / "model.onnx")
    assert list(model.graph.output) == list(original.graph.output)
    assert [i.name for i in model.graph.input] == [i.name for i in original.graph.input]


def test_the_same_model_gives_the_same_bytes(cnn: Case) -> None:
    first, again = (cnn.converted("int8", {}, high_precision="fp16")[0] for _ in range(2))
    assert (first / "model.onnx").read_bytes() == (again / "model.onnx").read_bytes()


def test_range_critical_nodes_stay_in_float32(encoder: Case) -> None:
    folder, result = encoder.converted("fp16", {})
    kept = result.data["kept_fp32"]
    assert {"ReduceMean", "Pow", "Sqrt"} <= set(kept)
    assert "Softmax" not in kept
    model = onnx.shape_inference.infer_shapes(onnx.load(folder / "model.onnx"), strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    for node in model.graph.node:
        wanted = TensorProto.FLOAT if node.op_type in ("Pow", "ReduceMean") else None
        wanted = TensorProto.FLOAT16 if node.op_type == "MatMul" else wanted
        assert wanted is None or types.get(node.output[0], wanted) == wanted


def test_a_layer_norm_is_converted_although_its_unused_outputs_are_float32() -> None:
    node = helper.make_node("LayerNormalization", ["x", "s", "b"], ["y"], name="norm")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4]) for n in "xy"]
    weights = [numpy_helper.from_array(np.ones(4, np.float32), n) for n in "sb"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert floats.to_low(model, "fp16").by_op == {"LayerNormalization": 1}


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_fused_operators_compute_in_float16_too(name: str, tmp_path: Path) -> None:
    """ONNX Runtime's own operators, which its CPU provider has in float32 only: the trial run rounds as they do."""
    case = make_case(name, tmp_path)
    fused = case.fused()
    operators = {n.op_type for n in onnx.load(fused / "model.onnx").graph.node if n.domain == "com.microsoft"}
    assert {"Attention", "SkipLayerNormalization"} <= operators
    folder, result = case.converted("fp16", {}, inputs={"model": fused})
    assert operators <= set(result.data["qdq_by_op"])
    assert result.data["trial_run"]["emulated"]
    assert result.data["trial_run"]["cosine"] >= 0.9999
    types = {i.name: i.data_type for i in onnx.load(folder / "model.onnx").graph.initializer}
    for node in onnx.load(folder / "model.onnx").graph.node:
        if node.op_type == "Attention":
            assert [types[n] for n in node.input[1:3]] == [TensorProto.FLOAT16] * 2


def test_a_skipped_optional_output_does_not_keep_a_node_in_float32() -> None:
    """The fourth output of SkipLayerNormalization is the sum; the second and third, float32, are left out."""
    node = helper.make_node("SkipLayerNormalization", ["x", "s", "g"], ["y", "", "", "z"], domain="com.microsoft")
    assert floats._low_slots(node, 17, "fp16") == {0: True, 1: True, 2: True}
    node.output[1] = "mean"
    assert floats._low_slots(node, 17, "fp16") == {}
    assert floats._low_slots(helper.make_node("NoSuch", ["x"], ["y"], domain="com.microsoft"), 17, "fp16") == {}


def test_a_constant_beyond_float16_is_clamped() -> None:
    node = helper.make_node("Add", ["x", "mask"], ["y"], name="masked")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
    mask = numpy_helper.from_array(np.array([0, -np.inf], np.float32), "mask")
    graph = helper.make_graph([node], "g", values[:1], values[1:], [mask])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made = floats.to_low(model, "fp16")
    assert made.clamped == 1
    stored = {i.name: numpy_helper.to_array(i) for i in made.model.graph.initializer}
    assert stored["mask_fp16"].tolist() == [0, -30_000]


def test_values_beyond_float16_are_seen_in_the_data(tmp_path: Path) -> None:
    case = make_case("mlp_of_large_values", tmp_path, model=_large_values())
    folder, result = case.converted("fp16", {})
    assert result.data["range_check"]["out_of_range_nodes"] == 2
    model = onnx.load(folder / "model.onnx")
    weights = {i.name: i.data_type for i in model.graph.initializer}
    first, second = (n for n in model.graph.node if n.op_type == "MatMul")
    assert weights[first.input[1]] == TensorProto.FLOAT
    assert weights[second.input[1]] == TensorProto.FLOAT
    assert result.data["trial_run"]["cosine"] > 0.9999


def _large_values() -> ModelProto:
    """x · 1e6, then back by 1e-6: float16 has no such number; and a product of usual size beside it."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((1e6 * rng.normal(size=(8, 8))).astype(np.float32), "up"),
        numpy_helper.from_array((1e-6 * rng.normal(size=(8, 8))).astype(np.float32), "down"),
        numpy_helper.from_array(rng.normal(size=(8, 8)).astype(np.float32), "usual"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["large"], name="to_large"),
        helper.make_node("MatMul", ["large", "down"], ["y"], name="from_large"),
        helper.make_node("Gemm", ["x", "usual"], ["z"], name="beside"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 8]) for n in "yz"]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_q_dq_keeps_tensorrts_rules(cnn: Case, recipe: str) -> None:
    folder, result = cnn.converted(recipe, {})
    model = onnx.load(folder / "model.onnx")
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    producer = {o: n for n in model.graph.node for o in n.output}
    scaled = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in scaled:
        scale, zero = constants[node.input[1]], constants[node.input[2]]
        assert (scale > 0).all()
        assert not np.asarray(zero, np.float32).any()
        per_channel = graphs.attribute(node, "axis", None) is not None
        assert per_channel == (node.input[0] in constants)  # weights only
        assert scale.ndim == int(per_channel)
    for node in model.graph.node:
        if node.op_type == "Conv" and producer.get(node.input[1]) is not None:
            assert producer[node.input[0]].op_type == "DequantizeLinear"
            assert len(node.input) < 3 or node.input[2] in constants  # a bias stays in floating point
    sums = [n for n in model.graph.node if n.op_type == "Add"]
    assert result.data["qdq_by_op"]["Add"] == len(sums)
    for node in sums:
        kinds = sorted(producer[name].op_type for name in node.input)
        assert kinds == ["Conv", "DequantizeLinear"]


def test_one_pair_serves_all_readers_of_a_tensor(cnn: Case) -> None:
    model = onnx.load(cnn.converted("int8", {})[0] / "model.onnx")
    sources = [n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(sources) == len(set(sources))


def test_ranges_replace_the_data(cnn: Case, tmp_path: Path) -> None:
    folder, first = cnn.converted("int8", {})
    ranges = folder.parent / "ranges"
    again, second = cnn.converted("int8", {}, inputs={"calibration": None, "ranges": ranges})
    assert second.data["calibration"]["reused"]
    assert (again / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert first.data["calibration"]["samples"] == 32
    broken = tmp_path / "ranges"
    broken.mkdir()
    for text in ("{", "[]", json.dumps({"format": 1}), '{"format": 1, "tensors": {"x": [NaN, 1]}}'):
        (broken / "ranges.json").write_text(text)
        with pytest.raises(StageFailure) as caught:
            cnn.converted("int8", {}, inputs={"calibration": None, "ranges": broken})
        assert caught.value.code == "ranges_invalid"


def test_what_cannot_be_converted_is_a_typed_failure(encoder: Case, tmp_path: Path) -> None:
    assert _refused(encoder, "int8", inputs={"calibration": None}).code == "calibration_data_missing"
    unknown = _refused(encoder, "fp16", exclude_nodes=["nobody"])
    assert (unknown.code, unknown.kind, unknown.node) == ("unknown_node", FailureKind.REQUEST, "nobody")
    matmuls = [n.name for n in onnx.load(encoder.model / "model.onnx").graph.node if n.op_type in ("MatMul", "Gemm")]
    assert _refused(encoder, "int8", exclude_nodes=matmuls).code == "nothing_to_convert"
    folder, _ = encoder.converted("int8", {})
    assert _refused(encoder, "fp16", inputs={"model": folder}).code == "already_quantized"
    folder, _ = encoder.converted("fp16", {})
    assert _refused(encoder, "int8", inputs={"model": folder}).code == "not_float32"
    old = onnx_models.folder(onnx_models.mlp(opset=11), tmp_path / "old")
    assert _refused(encoder, "fp16", inputs={"model": old, "calibration": None}).code == "opset_too_old"


def test_a_small_network_without_fp8_shapes_is_refused(tmp_path: Path) -> None:
    case = make_case("lstm", tmp_path)
    assert _refused(case, "fp8").code == "nothing_to_convert"


def test_branches_and_loops_stay_as_they_are(tmp_path: Path) -> None:
    case = make_case("with_if", tmp_path, model=onnx_models.with_if())
    refused = _refused(case, "fp16")
    assert refused.code == "nothing_to_convert"


def test_int4_values_and_scales_of_blocks() -> None:
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(64, 5)).astype(np.float32)
    values, scales = int4.quantize(weight, 0, 32, np.ones(64))
    assert values.shape == (64, 5)
    assert scales.shape == (2, 5)
    assert values.min() >= -8
    assert values.max() <= 7
    error = np.abs(values * np.repeat(scales, 32, axis=0) - weight)
    assert float(error.mean()) < 0.15


def test_the_scale_search_protects_the_channels_that_matter() -> None:
    rng = np.random.default_rng(4)
    weight = rng.normal(size=(32, 8)).astype(np.float32)
    weight[0] *= 6  # an outlier among the weights, whose activations are small
    importance = np.ones(32, np.float32)
    importance[0] = 1e-4

    def loss(cost: Any) -> float:
        values, scales = int4.quantize(weight, 0, 32, cost)
        error = values * np.repeat(scales, 32, axis=0) - weight
        return float((error**2 * importance[:, None]).sum())

    assert loss(importance) < 0.8 * loss(np.ones(32, np.float32))


def _spread(folded: bool) -> ModelProto:
    """A LayerNorm with two channels far larger than the others, and two products that read it; not `folded`: the sum
    with the input reads it too, so that its constants cannot take the division."""
    rng = np.random.default_rng(5)
    gamma = np.full(64, 0.1, np.float32)
    gamma[[3, 40]] = 8.0
    weights = {"gamma": gamma, "beta": np.zeros(64, np.float32)}
    weights |= {w: rng.normal(size=(64, 32)).astype(np.float32) for w in ("a", "b")}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["h"], name="norm"),
        helper.make_node("MatMul", ["h", "a"], ["ya"], name="a"),
        helper.make_node("MatMul", ["h", "b"], ["yb"], name="b"),
        helper.make_node("Add", ["x" if folded else "h", "x"], ["r"], name="residual"),
    ]
    sizes = {"ya": 32, "yb": 32, "r": 64}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in sizes.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "spread", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _answers(model: ModelProto, x: Any) -> list[Any]:
    import onnxruntime

    return [*onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})]


def test_channels_with_large_activations_are_scaled_where_it_costs_no_node() -> None:
    x = np.random.default_rng(6).normal(size=(500, 64)).astype(np.float32)
    gamma = numpy_helper.to_array(_spread(True).graph.initializer[0])
    squares = {"h": gamma**2}  # of a normalized input
    plain, scaled = _spread(True), _spread(True)
    wanted = int4.targets(plain, 32, ())
    assert sorted(wanted) == [1, 2]
    known = awq.scale_channels(scaled, wanted, squares)
    assert known["h"].max() < squares["h"].max()
    assert [n.op_type for n in scaled.graph.node] == [n.op_type for n in plain.graph.node]
    exact = _answers(plain, x)
    for got, expected in zip(_answers(scaled, x), exact, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)

    def loss(model: ModelProto, importance: Any) -> float:
        placed = int4.place(model, wanted, importance)
        return float(((_answers(placed.model, x)[0] - exact[0]) ** 2).mean())

    assert loss(scaled, known) < 0.5 * loss(plain, squares)


def test_where_the_division_would_cost_a_node_the_channels_stay() -> None:
    model = _spread(False)
    before = model.SerializeToString()
    squares = {"h": np.linspace(0.01, 9.0, 64, dtype=np.float32)}
    known = awq.scale_channels(model, int4.targets(model, 32, ()), squares)
    assert known["h"] is squares["h"]
    assert model.SerializeToString() == before


def test_an_opset_that_cannot_be_raised_is_a_typed_failure() -> None:
    model = architectures.residual_cnn()
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 17))
    model.graph.node.append(helper.make_node("NoSuchOp", ["x"], ["never"], name="odd"))
    with pytest.raises(StageFailure) as caught:
        graphs.raise_opset(model, 21)
    assert caught.value.code == "opset_conversion_failed"
