"""A model's structure in a few lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from app.source_models.inspect import inspect_model
from app.source_models.outline import Block, outline
from tests.factories import onnx_models
from tests.unit.test_model_inspection import LIMITS

LAYER = ["MatMul", "Add", "Softmax", "MatMul", "Add", "LayerNormalization"]


def unfolded(blocks: Sequence[Block]) -> list[str]:
    return [op for block in blocks for _ in range(block["times"]) for op in block["ops"]]


def test_layers_are_told_once() -> None:
    ops = ["Gather", "Add", "LayerNormalization", *LAYER * 12, "Gemm", "Tanh"]
    found = outline(ops, len(ops))
    assert unfolded(found["blocks"]) == ops
    assert found["left_out"] == 0
    assert max(block["times"] for block in found["blocks"]) >= 11
    assert sum(len(block["ops"]) for block in found["blocks"]) <= 18


def test_what_repeats_within_what_is_left_is_found_too() -> None:
    ops = ["Conv", "Relu"] * 4 + ["MaxPool"] + ["Conv", "Conv", "Add", "Relu"] * 3 + ["Gemm"]
    found = outline(ops, len(ops))["blocks"]
    assert unfolded(found) == ops
    assert [block["times"] for block in found] == [4, 1, 3, 1]


def test_nothing_repeats_and_nothing_is_there() -> None:
    assert outline(["Conv", "Relu", "Gemm"], 3) == {
        "blocks": [{"times": 1, "ops": ["Conv", "Relu", "Gemm"]}],
        "left_out": 0,
    }
    assert outline([], 0) == {"blocks": [], "left_out": 0}


def test_long_graphs_are_cut_and_it_is_said_by_how_much() -> None:
    unlike = [f"Op{i}" for i in range(1000)]
    found = outline(unlike, 5000)
    assert found["blocks"] == [{"times": 1, "ops": unlike[:300]}]
    assert found["left_out"] == 4700


def test_the_work_is_bounded_whatever_the_graph() -> None:
    hostile = [
        ("A" if bin(i).count("1") % 2 else "B") for i in range(20_000)
    ]  # the Thue-Morse word: repetitions are many and short
    began = time.process_time()
    found = outline(hostile, len(hostile))
    assert time.process_time() - began < 10
    assert unfolded(found["blocks"]) == hostile[: len(unfolded(found["blocks"]))]


def test_a_file_says_its_structure(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx_models.mlp(), path)
    found = inspect_model(path, "model.onnx", LIMITS).detail["outline"]
    assert unfolded(found["blocks"]) == [node.op_type for node in onnx.load(path).graph.node]


def test_branches_are_part_of_the_node_that_has_them(tmp_path: Path) -> None:
    inner = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["z"])]
    branch = helper.make_graph(inner, "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])])
    nodes = [helper.make_node("If", ["c"], ["o"], then_branch=branch, else_branch=branch)]
    told = [
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
    ]
    graph = helper.make_graph(nodes, "g", told, [helper.make_tensor_value_info("o", TensorProto.FLOAT, [2])])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    found = inspect_model(path, "model.onnx", LIMITS).detail
    assert found["outline"] == {"blocks": [{"times": 1, "ops": ["If"]}], "left_out": 0}
    assert found["nodes"] == 5
