"""Weights in a file of their own, which may have several hard links, through the stages that rewrite graphs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from tests.factories import architectures
from tests.unit.test_equalize import folder as equalized_folder
from tests.unit.test_equalize import run as equalize
from tests.unit.test_quantize import Bench, Quiet
from workers.graph import onnx_files
from workers.graph.onnx_files import MODEL_FILE, load_model
from workers.kernel import StageContext
from workers.stages import equalize as equalize_stage
from workers.stages import simplify as simplify_stage
from workers.stages.simplify import Simplify, SimplifyOptions


def external(bench: Bench, model: ModelProto) -> None:
    """All weights outside; the file has a second name, as in a store."""
    path = bench.source / MODEL_FILE
    path.unlink()
    copy = ModelProto()
    copy.CopyFrom(model)  # saving moves the weights out of it
    onnx.save_model(copy, path, save_as_external_data=True, location="weights.bin", size_threshold=256)
    os.link(bench.source / "weights.bin", bench.root / "in-the-store")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    model = architectures.bert()
    bench = Bench(tmp_path, model, simplified=False)
    external(bench, model)
    return bench


@pytest.mark.parametrize("recipe", ["dynamic_int8", "static_int8"])
def test_the_same_graph_as_from_one_file(recipe: str, bench: Bench) -> None:
    result = bench.run(recipe)
    made = (bench.out / "model" / MODEL_FILE).read_bytes()
    (bench.source / "weights.bin").unlink()
    onnx.save(bench.model, bench.source / MODEL_FILE)
    again = bench.run(recipe)
    assert again.data["qdq_by_op"] == result.data["qdq_by_op"]
    first, second = onnx.load_from_string(made), onnx.load(bench.out / "model" / MODEL_FILE)
    assert [n.op_type for n in first.graph.node] == [n.op_type for n in second.graph.node]
    weights = {i.name: numpy_helper.to_array(i) for i in second.graph.initializer}
    assert {i.name for i in first.graph.initializer} == set(weights)
    for tensor in first.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), weights[tensor.name])


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("recipe", ["dynamic_int8", "static_int8"])
def test_every_step_takes_what_the_one_before_writes(
    recipe: str, limit: int, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model of over 2 GB goes: simplified and equalized as it is, quantized into an external file."""
    monkeypatch.setattr(onnx_files, "INLINE_LIMIT_BYTES", limit)
    monkeypatch.setattr(simplify_stage, "LARGEST_IN_MEMORY", 0)
    monkeypatch.setattr(equalize_stage, "LARGEST_IN_MEMORY", 0)
    workspace = bench.root / "simplify"
    workspace.mkdir()
    ctx = StageContext({"model": bench.source}, workspace, bench.root / "simplified", Quiet(), {})
    assert "2 GB" in Simplify().run(ctx, SimplifyOptions()).data["fell_back"]
    original, bench.source = bench.source, bench.root / "simplified" / "model"
    assert "2 GB" in equalize(bench).data["fell_back"]
    bench.source = equalized_folder(bench)
    bench.run(recipe)
    assert ((bench.out / "model" / "model.onnx.data").exists()) is (limit == 0)
    bench.source = original
    assert bench.error() < 0.1


def test_a_path_out_of_the_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / MODEL_FILE
    onnx.save_model(architectures.lstm(), path, save_as_external_data=True, location="weights.bin", size_threshold=256)
    (tmp_path / "weights.bin").rename(tmp_path.parent / "elsewhere.bin")
    skeleton = onnx.load(tmp_path / MODEL_FILE, load_external_data=False)
    for tensor in skeleton.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere.bin"
    onnx.save(skeleton, tmp_path / MODEL_FILE)
    with pytest.raises(ValueError, match="no file of the model"):
        load_model(tmp_path / MODEL_FILE)
