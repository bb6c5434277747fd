"""Stage export on real models: what is repaired, what is noted, what is refused and how."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from app.domain.failures import FailureKind, StageFailure
from tests.factories import onnx_models as models
from workers.graph import onnx_files
from workers.graph.onnx_graph import describe_structure
from workers.kernel import Reporter, StageContext, StageResult
from workers.stages.export import Export, ExportOptions, _source


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.fractions: list[float] = []

    def progress(self, fraction: float, message: str = "") -> None:
        self.fractions.append(fraction)

    def note(self, message: str, **facts: Any) -> None:
        self.notes.append(message)


def export(source: Path, tmp_path: Path, **options: Any) -> tuple[StageResult, Path]:
    """Run the stage on a folder that holds only `source`; returns the result and the model's folder."""
    for name in ("in", "work", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / source.name).write_bytes(source.read_bytes())
    context = StageContext({"source": tmp_path / "in"}, tmp_path / "work", tmp_path / "out", Notes(), {})
    result = Export().run(context, ExportOptions(**options))
    json.dumps(result.data, allow_nan=False)
    return result, tmp_path / "out" / "model"


def export_model(model: ModelProto, tmp_path: Path, **options: Any) -> tuple[Mapping[str, Any], ModelProto]:
    result, folder = export(models.save(model, tmp_path / "up" / "m.onnx"), tmp_path, **options)
    return result.data, onnx.load(str(folder / "model.onnx"))


def refused(source: Path | ModelProto, tmp_path: Path, **options: Any) -> StageFailure:
    path = source if isinstance(source, Path) else models.save(source, tmp_path / "up" / "m.onnx")
    with pytest.raises(StageFailure) as caught:
        export(path, tmp_path, **options)
    failure = caught.value
    assert failure.remedy
    assert str(tmp_path) not in json.dumps(failure.to_json())
    return failure


def zipped(path: Path, files: Mapping[str, bytes | Path]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content.read_bytes() if isinstance(content, Path) else content)
    return path


# What passes


def test_mlp(tmp_path: Path) -> None:
    data, model = export_model(models.mlp(), tmp_path)
    assert data["inputs"] == [{"name": "input", "dtype": "float32", "shape": ["batch", 8]}]
    assert data["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", 4]}]
    assert (data["opset"], data["opset_before"], data["dynamic_batch"]) == (17, 17, True)
    assert data["parameters"] == 8 * 16 + 16 + 16 * 4 + 4
    assert data["structure"]["ops"] == {"Gemm": 2, "Relu": 1}
    assert data["notes"] == []
    assert data["checks"] == {
        "onnx_checker": "passed",
        "shape_inference": "passed",
        "first_inference": [{"batch": 1, "passed": True}, {"batch": 2, "passed": True}],
        "finite_outputs": {"passed": True, "tensors": []},
        "first_inference_on": "random inputs",
        "repeats_itself": {"passed": True},
    }
    assert {v.name for v in model.graph.value_info} == {"h", "a"}


@pytest.mark.parametrize(
    "make",
    [
        models.conv_net,
        models.transformer_block,
        models.lstm,
        models.embedding,
        models.with_if,
        models.with_loop,
        models.with_function,
    ],
)
def test_other_architectures_pass(make: Callable[[], ModelProto], tmp_path: Path) -> None:
    data, _ = export_model(make(), tmp_path)
    assert data["dynamic_batch"] is True
    assert [t["passed"] for t in data["checks"]["first_inference"]] == [True, True]


def test_a_quantized_model_is_accepted_and_flagged(tmp_path: Path) -> None:
    data, _ = export_model(models.quantized_mlp(), tmp_path)
    assert data["structure"]["quantized"] is True


def test_the_export_is_deterministic(tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        data, model = export_model(models.conv_net(), tmp_path / name)
        results.append((data, model.SerializeToString()))
    assert results[0] == results[1]


@pytest.mark.parametrize("opset", [8, 11, 13])
def test_opset_is_raised_and_computes_the_same(opset: int, tmp_path: Path) -> None:
    import onnxruntime as ort

    before = models.conv_net(opset=opset)
    data, after = export_model(before, tmp_path)
    assert (data["opset"], data["opset_before"]) == (17, opset)
    assert data["notes"] == [f"Opset raised from {opset} to 17."]
    feeds = {"input": np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)}
    a, b = (ort.InferenceSession(m.SerializeToString()).run(None, feeds)[0] for m in (before, after))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_opset_is_kept_where_the_converter_cannot(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("FusedMatMul", ["input", "w"], ["h"], name="fused", domain="com.microsoft"),
        helper.make_node("Upsample", ["h4", "scales"], ["up"], name="up"),
    ]
    nodes.insert(1, helper.make_node("Reshape", ["h", "shape"], ["h4"], name="reshape"))
    weights = [
        models.tensor("w", np.ones((4, 4))),
        models.tensor("scales", [1, 1, 2, 2]),
        models.tensor("shape", [-1, 1, 2, 2], np.int64),
    ]
    model = models.make_model(
        nodes,
        [models.value("input", ["batch", 4])],
        [models.value("up", ["batch", 1, 4, 4])],
        weights,
        opset=9,
        extra_opsets=[("com.microsoft", 1)],
    )
    data, _ = export_model(model, tmp_path)
    assert data["opset"] in (9, 17)
    assert data["notes"]
    assert data["checks"]["finite_outputs"]["passed"]


def test_initializers_are_no_inputs(tmp_path: Path) -> None:
    data, model = export_model(models.mlp(initializers_as_inputs=True), tmp_path)
    assert [i.name for i in model.graph.input] == ["input"]
    assert "4 initializers were also inputs" in data["notes"][0]


def test_fixed_batch_is_tried_as_it_is_and_noted(tmp_path: Path) -> None:
    data, _ = export_model(models.mlp(batch=3), tmp_path)
    assert data["dynamic_batch"] is False
    assert data["checks"]["first_inference"] == [{"batch": 3, "passed": True}]
    assert data["notes"] == ["The batch is fixed at 3 (input 'input')."]


def test_a_batch_that_only_seems_dynamic_is_fixed(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["input", "shape"], ["output"], name="one_row")]
    weights = [models.tensor("shape", [1, 2, 2], np.int64)]
    model = models.make_model(nodes, [models.value("input", ["n", 4])], [models.value("output", ["n", 2, 2])], weights)
    data, exported = export_model(model, tmp_path)
    assert data["dynamic_batch"] is False
    assert data["inputs"][0]["shape"] == [1, 4]
    assert [t["passed"] for t in data["checks"]["first_inference"]] == [True, False]
    assert any("fixed at 1" in note and "one_row" in note for note in data["notes"])
    assert exported.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    model = models.mlp()
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    data, exported = export_model(model, tmp_path)
    assert [n.name for n in exported.graph.node] == ["fc1", "act", "fc2"]
    assert any("sorted" in note for note in data["notes"])


def test_unnamed_nodes_and_dimensions_get_names(tmp_path: Path) -> None:
    model = models.mlp()
    for node in model.graph.node:
        node.name = ""
    model.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    data, exported = export_model(model, tmp_path)
    assert len({n.name for n in exported.graph.node}) == 3
    assert data["inputs"][0]["shape"] == ["input_dim_0", 8]


def test_outputs_without_a_shape_get_theirs(tmp_path: Path) -> None:
    model = models.mlp()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    data, _ = export_model(model, tmp_path)
    assert data["outputs"][0]["shape"] == ["batch", 4]


def test_nan_is_reported_as_a_check(tmp_path: Path) -> None:
    data, _ = export_model(models.makes_nan(), tmp_path)
    assert data["checks"]["finite_outputs"] == {"passed": False, "tensors": ["output"]}
    assert any("NaN" in note for note in data["notes"])


# Archives and external data


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archive_with_external_data(kind: str, tmp_path: Path) -> None:
    path = models.save_external(models.mlp(), tmp_path / "src" / "net.onnx")
    archive = tmp_path / f"net.{kind}"
    if kind == "zip":
        zipped(
            archive, {"net/net.onnx": path, "net/weights.bin": path.parent / "weights.bin", "__MACOSX/net.onnx": b"x"}
        )
    else:
        with tarfile.open(archive, "w") as tar:
            tar.add(path.parent, arcname="net")
    result, folder = export(archive, tmp_path, format="archive")
    assert [p.name for p in folder.iterdir()] == ["model.onnx"]
    assert result.data["parameters"] == 212
    loaded = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    assert not any(t.data_location == TensorProto.EXTERNAL for t in loaded.graph.initializer)


@pytest.mark.parametrize("files", [1, 2])
def test_large_external_data_stays_outside(files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.stages.export import _write

    for module in (onnx_files, _source, _write):
        monkeypatch.setattr(module, "INLINE_LIMIT_BYTES", 2000)
    model = models.mlp(features=32, hidden=64)
    path = tmp_path / "src" / "net.onnx"
    path.parent.mkdir()
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=files == 1,
        location="w.bin" if files == 1 else None,
        size_threshold=200,
    )
    archive = zipped(tmp_path / "net.zip", {p.name: p for p in path.parent.iterdir()})
    result, folder = export(archive, tmp_path, format="archive")
    assert sorted(p.name for p in folder.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert result.data["size_bytes"] > 4 * result.data["parameters"]
    for before, after in zip(
        models.mlp(features=32, hidden=64).graph.initializer,
        onnx.load(str(folder / "model.onnx")).graph.initializer,
        strict=True,
    ):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(before), onnx.numpy_helper.to_array(after))


def test_external_data_missing(tmp_path: Path) -> None:
    failure = refused(models.save_external(models.mlp(), tmp_path / "src" / "net.onnx"), tmp_path)
    assert (failure.code, failure.tensor) == ("external_data_missing", "w1")


def test_external_data_cut_off(tmp_path: Path) -> None:
    path = models.save_external(models.mlp(), tmp_path / "src" / "net.onnx")
    data = (path.parent / "weights.bin").read_bytes()[:100]
    archive = zipped(tmp_path / "net.zip", {"net.onnx": path, "weights.bin": data})
    assert refused(archive, tmp_path, format="archive").code == "external_data_missing"


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "a\\..\\b", "C:x"])
def test_external_data_outside(location: str, tmp_path: Path) -> None:
    path = models.save_external(models.mlp(), tmp_path / "src" / "net.onnx")
    model = onnx.load(str(path), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    failure = refused(model, tmp_path)
    assert (failure.code, failure.tensor) == ("external_data_outside", "w1")


def test_archive_with_two_models(tmp_path: Path) -> None:
    data = models.mlp().SerializeToString()
    failure = refused(zipped(tmp_path / "a.zip", {"a.onnx": data, "b.onnx": data}), tmp_path, format="archive")
    assert (failure.code, "2 .onnx files" in failure.detail) == ("invalid_model", True)


def test_archive_without_a_model(tmp_path: Path) -> None:
    assert refused(zipped(tmp_path / "a.zip", {"a.txt": b"x"}), tmp_path, format="archive").code == "invalid_model"


def test_archive_that_leaves_its_folder(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"../a.onnx": models.mlp().SerializeToString()})
    assert refused(archive, tmp_path, format="archive").code == "archive_unsafe_path"


def test_archive_bomb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.onnx", b"\0" * (20 << 20))
    assert refused(tmp_path / "a.zip", tmp_path, format="archive").code == "archive_bomb"


# What is refused


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "no graph"),
        (b"hello, I am no model", "parsed"),
        (models.conv_net().SerializeToString()[:3000], "cut off"),
        (models.mlp().SerializeToString().replace(b"Relu", b"\xff\xfe\xfd\xfc"), "UTF-8"),
        (b"\x80\x04\x95pickle", "pickle"),
        (b"PK\x03\x04torchscript", "TorchScript"),
    ],
)
def test_not_a_model(content: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    failure = refused(tmp_path / "m.onnx", tmp_path)
    assert failure.code == "invalid_model"
    assert word in failure.detail


@pytest.mark.parametrize(
    ("model", "code", "node", "tensor"),
    [
        (models.cyclic(), "invalid_graph", "first", None),
        (models.unknown_op(), "unsupported_op", "frob", None),
        (models.unknown_standard_op(), "unsupported_op", "frob", None),
        (models.string_input(), "unsupported_input_type", None, "text"),
        (models.no_inputs(), "no_inputs", None, None),
        (models.no_outputs(), "no_outputs", None, None),
        (models.dynamic_rank(), "dynamic_rank", None, "input"),
        (models.type_error(), "invalid_graph", "mixed", None),
        (models.shape_error(), "invalid_graph", "mm", None),
    ],
)
def test_bad_graph(model: ModelProto, code: str, node: str | None, tensor: str | None, tmp_path: Path) -> None:
    failure = refused(model, tmp_path)
    assert (failure.code, failure.node, failure.tensor) == (code, node, tensor)
    assert failure.kind is FailureKind.MODEL
    assert failure.cacheable


def test_unknown_op_of_a_runtime_domain_names_the_node(tmp_path: Path) -> None:
    model = models.unknown_op()
    model.graph.node[0].domain = "com.microsoft"
    model.opset_import[1].domain = "com.microsoft"
    failure = refused(model, tmp_path)
    assert (failure.code, failure.node) == ("unsupported_op", "frob")


def test_tensor_that_nothing_makes(tmp_path: Path) -> None:
    model = models.mlp()
    model.graph.node[1].input[0] = "ghost"
    failure = refused(model, tmp_path)
    assert (failure.code, failure.node, failure.tensor) == ("invalid_graph", "act", "ghost")


def test_opset_of_the_future(tmp_path: Path) -> None:
    model = models.mlp()
    model.opset_import[0].version = 99
    assert refused(model, tmp_path).code == "unsupported_opset"


def test_model_that_fails_at_run_names_the_node(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["input", "shape"], ["output"], name="bad_reshape")]
    weights = [models.tensor("shape", [7, 3], np.int64)]
    model = models.make_model(nodes, [models.value("input", ["n", "m"])], [models.value("output", [7, 3])], weights)
    failure = refused(model, tmp_path)
    assert (failure.code, failure.node) == ("inference_failed", "bad_reshape")
    assert "input[1]" in (failure.remedy or "")


def same(*dims: int) -> dict[str, list[int]]:
    return {"min": list(dims), "opt": list(dims), "max": list(dims)}


@pytest.mark.parametrize(
    ("shapes", "tensor"),
    [
        ({"ghost": same(1, 8)}, "ghost"),
        ({"input": same(1, 8, 1)}, "input"),
        ({"input": same(1, 9)}, "input"),
        ({"input": {"min": [1, 4], "opt": [1, 8], "max": [1, 8]}}, "input"),
    ],
)
def test_shapes_that_contradict_the_model(shapes: dict[str, Any], tensor: str, tmp_path: Path) -> None:
    failure = refused(models.mlp(), tmp_path, shapes=shapes)
    assert (failure.code, failure.kind, failure.tensor) == ("shape_mismatch", FailureKind.REQUEST, tensor)


def test_one_symbol_has_one_range(tmp_path: Path) -> None:
    shapes = {"input_ids": same(1, 16), "attention_mask": same(1, 8)}
    assert refused(models.transformer_block(), tmp_path, shapes=shapes).code == "shape_mismatch"


def test_shapes_bound_the_first_inference(tmp_path: Path) -> None:
    shapes = {n: {"min": [4, 8], "opt": [8, 16], "max": [8, 32]} for n in ("input_ids", "attention_mask")}
    data, _ = export_model(models.transformer_block(), tmp_path, shapes=shapes)
    assert [t["batch"] for t in data["checks"]["first_inference"]] == [4, 5]


# Structure


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (models.mlp, "other"),
        (models.conv_net, "cnn"),
        (models.transformer_block, "transformer"),
        (models.lstm, "rnn"),
        (models.embedding, "other"),
    ],
)
def test_kind(make: Callable[[], ModelProto], kind: str) -> None:
    structure = describe_structure(make())
    assert structure["kind"] == kind
    assert structure["quantized"] is False


def test_structure_counts_at_every_depth() -> None:
    assert describe_structure(models.with_if())["ops"] == {"Add": 1, "Greater": 1, "If": 1, "Neg": 1, "ReduceSum": 1}
    assert describe_structure(models.with_function())["ops"] == {"Mul": 1, "Sigmoid": 1, "Swish": 2}
