"""simplify: what is in the produced graph, and what happens when a simplifier goes wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxslim
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.factories import architectures, onnx_models
from workers.graph.fuse import transformers as fusion
from workers.graph.onnx_graph import all_nodes
from workers.kernel import Reporter, StageContext, backends
from workers.stages import simplify
from workers.stages.quantize import Quantize, QuantizeOptions
from workers.stages.simplify import Simplify, SimplifyOptions


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def progress(self, fraction: float, message: str = "") -> None:
        assert 0 <= fraction <= 1

    def note(self, message: str, **facts: Any) -> None:
        self.notes.append(f"{message} {facts}")


def run(model: ModelProto, tmp_path: Path, **options: Any) -> tuple[ModelProto, dict[str, Any], Path]:
    source, workspace = tmp_path / "source", tmp_path / "workspace"
    source.mkdir()
    workspace.mkdir()
    onnx.save(model, source / "model.onnx")
    ctx = StageContext({"model": source}, workspace, tmp_path / "out", Notes(), {})
    result = Simplify().run(ctx, SimplifyOptions(**options))
    assert result.outputs == ["model"]
    path = tmp_path / "out" / "model" / "model.onnx"
    made = onnx.load(path)
    onnx.checker.check_model(made)
    assert [v.SerializeToString() for v in made.graph.input] == [v.SerializeToString() for v in model.graph.input]
    assert [v.name for v in made.graph.output] == [v.name for v in model.graph.output]
    return made, dict(result.data), path.parent


def ops(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_batch_norms_fold_into_convolutions_and_relus_fuse_at_load(tmp_path: Path) -> None:
    made, data, _ = run(architectures.residual_cnn(), tmp_path)
    assert ops(made)["BatchNormalization"] == 0
    assert ops(made)["Conv"] == 5
    assert data["fusions"]["conv+bn"] == 5
    assert data["fusions"]["conv+relu"] == data["at_load"]["conv+relu"] == 3  # two ReLUs follow residual sums
    assert data["nodes_before"] - data["nodes_after"] == 5
    assert data["fell_back"] is None
    assert data["max_abs_diff"] < 1e-4
    assert data["compared"] == {"inputs": 2, "batch_sizes": [1, 2]}


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "residual_cnn", "depthwise_cnn", "lstm"])
def test_without_fusions_the_graph_stays_standard(name: str, tmp_path: Path) -> None:
    original = getattr(architectures, name)()
    made, data, _ = run(original, tmp_path)
    assert {node.domain for node in made.graph.node} <= {"", "ai.onnx"}
    assert [(o.domain, o.version) for o in made.opset_import] == [("", 17)]
    assert made.ir_version == original.ir_version
    assert data["contrib_ops"] is False
    assert data["fell_back"] is None


@pytest.mark.parametrize(("name", "skips"), [("bert", 5), ("vit", 4), ("gpt2", 4)])
def test_a_recognised_transformer_gets_its_fusions(name: str, skips: int, tmp_path: Path) -> None:
    original = getattr(architectures, name)(layers=2, hidden=48, heads=3)
    made, data, folder = run(original, tmp_path, fusions=True)
    assert data["architecture"] == {"kind": name, "heads": 3, "hidden_size": 48, "blocks": 2}
    found = {k: data["fusions"][k] for k in ("attention", "gelu", "layernorm", "skip_layernorm")}
    assert found == {"attention": 2, "gelu": 2, "layernorm": 5, "skip_layernorm": skips}
    attention = [n for n in made.graph.node if n.op_type == "Attention"]
    assert [helper.get_node_attr_value(n, "num_heads") for n in attention] == [3, 3]
    assert ops(made)["Softmax"] == ops(made)["Erf"] == 0
    assert ("com.microsoft", 1) in [(o.domain, o.version) for o in made.opset_import]
    assert data["contrib_ops"] is True
    assert data["fell_back"] is None
    session = backends()["onnxruntime"]().load(folder, {})
    assert [i.name for i in session.inputs] == [i.name for i in original.graph.input]


def test_masks_keep_their_meaning_in_a_fused_bert(tmp_path: Path) -> None:
    """Padding at the left: an optimizer that turns masks into lengths would be wrong here."""
    original = architectures.bert()
    _, _, folder = run(original, tmp_path, fusions=True)
    rng = np.random.default_rng(7)
    mask = np.ones((2, 6), np.int64)
    mask[0, :3] = 0
    feeds = {"input_ids": rng.integers(0, 64, (2, 6)), "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}
    backend = backends()["onnxruntime"]()
    expected = backend.load(tmp_path / "source", {}).run(feeds)
    actual = backend.load(folder, {}).run(feeds)
    np.testing.assert_allclose(actual["logits"], expected["logits"], atol=1e-5)


def test_other_architectures_are_not_recognised() -> None:
    assert fusion.recognise(architectures.residual_cnn()) is None
    assert fusion.recognise(architectures.lstm()) is None


def test_dead_nodes_and_constants_are_folded(tmp_path: Path) -> None:
    model = architectures.lstm()
    graph = model.graph
    graph.node.append(helper.make_node("Relu", ["logits"], ["nowhere"], name="dead"))
    graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "a"))
    graph.node.insert(0, helper.make_node("Add", ["a", "a"], ["two"], name="constant"))
    graph.node.append(helper.make_node("Mul", ["logits", "two"], ["scaled"], name="scale"))
    graph.output.append(helper.make_tensor_value_info("scaled", TensorProto.FLOAT, ["batch", 4]))
    made, data, _ = run(model, tmp_path)
    assert {"dead", "constant"}.isdisjoint(node.name for node in made.graph.node)
    assert data["nodes_before"] - data["nodes_after"] == 2


def crash(*args: object, **kwargs: object) -> None:
    raise RuntimeError("simplifier broke")


def test_where_both_simplifiers_crash_the_graph_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxslim, "slim", crash)
    monkeypatch.setattr(simplify, "optimized", crash)
    original = architectures.residual_cnn()
    made, data, _ = run(original, tmp_path)
    broke = "RuntimeError: simplifier broke"
    assert data["fell_back"] == f"onnxslim: {broke}; ONNX Runtime's folding: {broke}"
    assert ops(made) == ops(original)
    assert data["fusions"]["conv+bn"] == 0


def test_where_the_simplifier_crashes_the_runtime_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In branches, too: a product there reads its weights, not what has yet to be made of them."""
    monkeypatch.setattr(onnxslim, "slim", crash)

    def branch(name: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Transpose", ["w"], [f"{name}_t"], name=f"{name}_turn", perm=[1, 0]),
            helper.make_node("MatMul", ["x", f"{name}_t"], [f"{name}_y"], name=f"{name}_product"),
        ]
        return helper.make_graph(nodes, name, [], [onnx_models.value(f"{name}_y", ["batch", 4])])

    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], name="most", keepdims=0),
        helper.make_node("Greater", ["most", "limit"], ["large"], name="greater"),
        helper.make_node("If", ["large"], ["y"], name="if", then_branch=branch("a"), else_branch=branch("b")),
    ]
    weights = [
        onnx_models.tensor("w", np.random.default_rng(0).normal(size=(4, 4))),
        onnx_models.tensor("limit", np.float32(0.5)),
    ]
    x, y = (onnx_models.value(name, ["batch", 4]) for name in "xy")
    made, data, _ = run(onnx_models.make_model(nodes, [x], [y], weights), tmp_path)
    assert data["steps"] == ["ONNX Runtime's folding"]
    assert data["fell_back"] == "onnxslim: RuntimeError: simplifier broke"
    assert Counter(node.op_type for node in all_nodes(made))["Transpose"] == 0
    assert {node.domain for node in all_nodes(made)} <= {"", "ai.onnx"}


def test_a_numeric_difference_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: ModelProto, **kwargs: object) -> ModelProto:
        weight = next(i for i in model.graph.initializer if i.name == "fc.weight")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, "fc.weight"))
        return model

    monkeypatch.setattr(onnxslim, "slim", wrong)
    original = architectures.residual_cnn()
    made, data, _ = run(original, tmp_path)
    assert "differs by" in data["fell_back"]
    weights = [{i.name: i for i in m.graph.initializer}["fc.weight"] for m in (made, original)]
    assert np.array_equal(*map(numpy_helper.to_array, weights))


@pytest.mark.parametrize("fault", ["input", "output", "dtype", "opset"])
def test_a_changed_interface_falls_back(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: ModelProto, **kwargs: object) -> ModelProto:
        if fault == "input":
            model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
        elif fault == "output":
            model.graph.output[0].name = "Conv_1_out"
        elif fault == "dtype":
            model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
        else:
            model.opset_import[0].version = 18
        return model

    monkeypatch.setattr(onnxslim, "slim", change)
    _, data, _ = run(architectures.residual_cnn(), tmp_path)
    assert data["fell_back"].startswith("onnxslim: it changes the")


def test_symbolic_dimensions_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(model: ModelProto, **kwargs: object) -> ModelProto:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        return model

    monkeypatch.setattr(onnxslim, "slim", narrow)
    _, data, _ = run(architectures.residual_cnn(), tmp_path)  # `run` compares the inputs
    assert data["fell_back"] is None


def test_broken_fusions_leave_the_slimmed_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: ModelProto, architecture: object) -> ModelProto:
        raise AssertionError("unexpected pattern")

    monkeypatch.setattr(fusion, "fuse", broken)
    made, data, _ = run(architectures.bert(), tmp_path, fusions=True)
    assert data["fell_back"] == "transformer fusions: AssertionError: unexpected pattern"
    assert data["steps"] == ["onnxslim", "attention"]  # which is our own
    assert ops(made)["Attention"] == 0


def test_memory_errors_are_not_taken_for_a_fall_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(onnxslim, "slim", full)
    with pytest.raises(MemoryError):
        run(architectures.lstm(), tmp_path)


def _needs_seven_columns() -> ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "columns"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    weight = numpy_helper.from_array(np.ones((7, 2), np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_cannot_be_compared_is_not_simplified(tmp_path: Path) -> None:
    _, data, _ = run(_needs_seven_columns(), tmp_path)
    assert "could not be compared" in data["fell_back"]


def test_the_jobs_shapes_are_used_for_the_comparison(tmp_path: Path) -> None:
    shapes = {"x": {"min": [1, 7], "opt": [2, 7], "max": [4, 7]}}
    _, data, _ = run(_needs_seven_columns(), tmp_path, shapes=shapes)
    assert data["fell_back"] is None


def test_a_fixed_batch_is_compared_at_that_size(tmp_path: Path) -> None:
    _, data, _ = run(architectures.residual_cnn(batch=3), tmp_path)
    assert data["compared"] == {"inputs": 2, "batch_sizes": [3, 3]}
    assert data["fusions"]["conv+bn"] == 5


def test_a_model_over_two_gigabytes_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, "LARGEST_IN_MEMORY", 1000)
    original = architectures.residual_cnn()
    made, data, _ = run(original, tmp_path)
    assert made == original
    assert data["fell_back"].startswith("larger than 2 GB")
    assert data["nodes_before"] == data["nodes_after"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(run(architectures.bert(), tmp_path / name, fusions=True)[2] / "model.onnx")
    assert made[0].read_bytes() == made[1].read_bytes()


def test_an_old_opset_is_raised_so_that_the_model_can_be_quantized(tmp_path: Path) -> None:
    """Its Softmax counted axes from the first on, and its Squeeze had them as an attribute."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
        helper.make_node("Squeeze", ["product"], ["flat"], axes=[1], name="squeeze"),
        helper.make_node("Softmax", ["flat"], ["y"], name="softmax"),
    ]
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32), "w")
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    made, data, folder = run(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), tmp_path
    )
    assert [(o.domain, o.version) for o in made.opset_import] == [("", 13)]
    assert {n.name for n in made.graph.node} >= {"product", "softmax"}
    assert data["steps"] == ["newer opset", "onnxslim"]
    assert data["fell_back"] is None
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    ctx = StageContext({"model": folder}, quantized, quantized / "out", Notes(), {})
    assert Quantize().run(ctx, QuantizeOptions(recipe="dynamic_int8")).data["qdq_by_op"] == {"MatMulInteger": 1}


def test_an_opset_that_cannot_be_raised_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: ModelProto, minimum: int) -> ModelProto:
        raise RuntimeError("no adapter")

    monkeypatch.setattr(simplify, "raise_opset", fails)
    made, data, _ = run(onnx_models.mlp(opset=11), tmp_path)
    assert [o.version for o in made.opset_import] == [11]
    assert data["fell_back"] == "newer opset: RuntimeError: no adapter"
