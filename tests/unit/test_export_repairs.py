"""What exporters write that ONNX or its tools stumble over, and what the export stage makes of it: the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper

from tests.factories import cases
from tests.factories import onnx_models as models
from tests.unit.test_export import Notes, export_model
from workers.graph.onnx_graph import all_nodes
from workers.graph.precision.floats import to_low
from workers.kernel import StageContext
from workers.measure.stored import OutputWriter, StoredOutputs
from workers.stages.quantize import Quantize, QuantizeOptions


def answers(model: ModelProto, feeds: cases.Feeds) -> dict[str, Any]:
    model = cases.without_node_names(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def check_same(case: cases.ModelCase, model: ModelProto) -> None:
    for feeds in case.held.values():
        found = answers(model, feeds)
        for name, wanted in answers(case.model, feeds).items():
            assert found[name].shape == wanted.shape
            np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=1e-5)


def test_initializers_that_are_inputs_of_an_old_ir_become_constants_of_a_newer_one(tmp_path: Path) -> None:
    case = cases.ir3_plain("ir3")
    assert case.model.ir_version == 3
    data, model = export_model(case.model, tmp_path)
    onnx.checker.check_model(model)
    assert [i.name for i in model.graph.input] == ["x"]
    assert model.opset_import[0].version >= 17
    assert any("also inputs" in note for note in data["notes"])
    assert any("IR version raised from 3" in note for note in data["notes"])
    check_same(case, model)


def test_every_node_has_a_name_of_its_own(tmp_path: Path) -> None:
    case = cases.dup_names("dup")
    case.model.graph.node[2].name = "same_1"  # as the repair would call the second
    data, model = export_model(case.model, tmp_path)
    names = [node.name for node in all_nodes(model)]
    assert len(set(names)) == len(names)
    assert {"same", "same_1"} <= set(names)
    assert any("'same' (Relu) is 'same_2'" in note for note in data["notes"])
    check_same(case, model)


def test_names_in_bodies_are_repaired_too(tmp_path: Path) -> None:
    model = models.with_if()
    for node in all_nodes(model):
        node.name = "n"
    _, made = export_model(model, tmp_path)
    names = [node.name for node in all_nodes(made)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("symbol", ["?", "-1", "None", "unknown"])
def test_placeholders_on_two_axes_are_not_equal(symbol: str, tmp_path: Path) -> None:
    case = cases.dup_dim_symbol("dim")
    for axis in (0, 2, 3):
        case.model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = symbol
    case.model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = symbol
    data, _ = export_model(case.model, tmp_path, shapes=case.spec["shapes"])
    shape = data["inputs"][0]["shape"]
    assert len(set(shape)) == 4
    assert symbol not in shape
    assert data["dynamic_batch"]


def test_a_name_that_the_jobs_shapes_contradict_is_taken_apart(tmp_path: Path) -> None:
    case = cases.dup_dim_symbol("dim")
    for axis in (2, 3):
        case.model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "side"
    data, _ = export_model(case.model, tmp_path, shapes=case.spec["shapes"])
    assert data["inputs"][0]["shape"] == ["n", 3, "x_dim_2", "x_dim_3"]
    assert any("'side'" in note for note in data["notes"])


def _quantized(model: ModelProto, case: cases.ModelCase, tmp_path: Path) -> ModelProto:
    assert case.data is not None
    for name in ("source", "data", "quantizing", "quantized"):
        (tmp_path / name).mkdir()
    onnx.save(model, tmp_path / "source" / "model.onnx")
    np.savez(tmp_path / "data" / "data.npz", **case.data)  # type: ignore[arg-type]
    inputs = {"model": tmp_path / "source", "calibration": tmp_path / "data"}
    context = StageContext(inputs, tmp_path / "quantizing", tmp_path / "quantized", Notes(), {})
    Quantize().run(context, QuantizeOptions(recipe="static_int8"))
    return onnx.load(tmp_path / "quantized" / "model" / "model.onnx")


def test_the_names_that_quantizers_give_are_free(tmp_path: Path) -> None:
    case = cases.bias_name_clash("clash")
    data, model = export_model(case.model, tmp_path)
    assert any("made room" in note for note in data["notes"])
    check_same(case, model)
    quantized = _quantized(model, case, tmp_path)
    assert {o.name for o in quantized.graph.output} == {"y"}
    feeds = case.held["b3"]
    error = answers(quantized, feeds)["y"] - answers(case.model, feeds)["y"]
    assert np.abs(error).max() < 0.1


def test_a_tensor_called_as_anothers_scale_moves_and_an_output_stays(tmp_path: Path) -> None:
    weights = [models.tensor("h_scale", np.full(8, 2.0)), models.tensor("x_quantized", np.eye(8))]
    nodes = [
        helper.make_node("MatMul", ["x", "x_quantized"], ["h"]),
        helper.make_node("Mul", ["h", "h_scale"], ["h_zero_point"]),
        helper.make_node("Relu", ["h_zero_point"], ["y"]),
    ]
    outputs = [models.value("y", ["n", 8]), models.value("h_zero_point", ["n", 8])]
    data, model = export_model(models.make_model(nodes, [models.value("x", ["n", 8])], outputs, weights), tmp_path)
    assert [o["name"] for o in data["outputs"]] == ["y", "h_zero_point"]
    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    assert not {"h", "h_scale", "x_quantized"} <= names
    x = np.arange(16, dtype=np.float32).reshape(2, 8)
    np.testing.assert_array_equal(answers(model, {"x": x})["y"], 2 * x)


def test_an_output_of_rank_0_is_stored_as_it_is(tmp_path: Path) -> None:
    writer = OutputWriter(tmp_path, 1 << 20)
    outputs: dict[str, Any] = {"mean": np.float32(3.5).reshape(()), "y": np.ones((2, 3), np.float32).T}
    assert writer.add(outputs, 2, 2)
    writer.close(list(outputs), {"batch_size": 2, "inputs": [], "outputs": []})
    ((count, found),) = StoredOutputs(tmp_path).batches()
    assert count == 2
    for name, array in outputs.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_a_scalar_initializer_stays_a_scalar_in_lower_precision(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Mul", ["h", "half"], ["y"], name="scaled"),
        helper.make_node("Mul", ["half", "two"], ["mean"], name="scalars"),
    ]
    weights = [models.tensor("w", np.eye(8)), models.tensor("half", 0.5), models.tensor("two", 2.0)]
    outputs = [models.value("y", ["n", 8]), models.value("mean", [])]
    model = models.make_model(nodes, [models.value("x", ["n", 8])], outputs, weights)
    made = onnx.shape_inference.infer_shapes(model)
    low = to_low(made, "fp16").model
    made_low = [t for t in low.graph.initializer if t.data_type == TensorProto.FLOAT16 and t.name.startswith("half")]
    assert [list(t.dims) for t in made_low] == [[]]
