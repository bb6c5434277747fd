"""Nodes that are to stay in float: they compute on float values and float weights, whatever stands around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, helper

from app.domain.failures import FailureKind
from tests.factories import architectures
from tests.factories.onnx_models import make_model, tensor, value
from tests.unit.test_quantize import Bench, fails

RNG = np.random.default_rng(0)
RECIPES = ["static_int8", "dynamic_int8"]


def producers(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def reads_float(model: ModelProto, node: NodeProto) -> bool:
    """No input of `node` was rounded (a value that a quantized node wrote is not rounded by that)."""
    makers = producers(model)
    return all(makers[n].op_type != "DequantizeLinear" for n in node.input if n in makers)


def two_products(*, shared: bool) -> ModelProto:
    """x → MatMul a, MatMul b (with one weight if `shared`) → their sum and a residual."""
    weights = [tensor("w", RNG.normal(0, 0.3, (8, 8)))]
    if not shared:
        weights.append(tensor("v", RNG.normal(0, 0.3, (8, 8))))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="a"),
        helper.make_node("MatMul", ["x", "w" if shared else "v"], ["b"], name="b"),
        helper.make_node("Add", ["a", "b"], ["sum"], name="sum"),
        helper.make_node("Add", ["sum", "x"], ["y"], name="residual"),
    ]
    return make_model(nodes, [value("x", ["batch", 8])], [value("y", ["batch", 8])], weights)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shared", [True, False])
def test_an_excluded_product_reads_floats(recipe: str, shared: bool, tmp_path: Path) -> None:
    bench = Bench(tmp_path, two_products(shared=shared), simplified=False)
    result = bench.run(recipe, exclude_nodes=["b"])
    made = bench.made()
    (kept,) = [n for n in made.graph.node if n.name == "b"]
    assert [*kept.input] == ["x", "w" if shared else "v"]
    assert reads_float(made, kept)
    (residual,) = [n for n in made.graph.node if n.name == "residual"]
    assert residual.input[1] == "x"
    assert sum(result.data["qdq_by_op"].values()) == 1
    assert result.data["excluded_nodes"] == ["b"]
    assert bench.error() < 0.05


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_excluded_gemm_keeps_its_shared_weight_and_bias(recipe: str, tmp_path: Path) -> None:
    """The quantizer rewrites Gemm to MatMul and transposes its weight, and rounds the bias in place."""
    weights = [tensor("w", RNG.normal(0, 0.3, (8, 8))), tensor("c", RNG.normal(0, 0.3, 8))]
    nodes = [
        helper.make_node("Gemm", ["x", "w", "c"], ["a"], name="a", transB=1),
        helper.make_node("Gemm", ["a", "w", "c"], ["b"], name="b", transB=1),
        helper.make_node("MatMul", ["b", "w"], ["y"], name="y"),
    ]
    model = make_model(nodes, [value("x", ["batch", 8])], [value("y", ["batch", 8])], weights)
    bench = Bench(tmp_path, model, simplified=False)
    result = bench.run(recipe, exclude_nodes=["b", "y"])
    made = bench.made()
    kept = [n for n in made.graph.node if n.name.startswith(("b", "y")) and n.op_type in ("Gemm", "MatMul")]
    assert len(kept) == 2
    assert all(reads_float(made, n) for n in kept)
    assert sum(result.data["qdq_by_op"].values()) == 1
    assert bench.error() < 0.05


def test_no_pair_stays_between_two_float_nodes(tmp_path: Path) -> None:
    """Excluding both readers of a tensor leaves no trace of its Q/DQ pair."""
    bench = Bench(tmp_path, architectures.bert())
    names = [n.name for n in onnx.load(bench.source / "model.onnx").graph.node if n.op_type == "MatMul"]
    bench.run("static_int8", exclude_nodes=names)
    made = bench.made()
    rounded = [n for n in made.graph.node if n.op_type == "QuantizeLinear"]
    assert len(rounded) == 1  # the head's input
    assert all(reads_float(made, n) for n in made.graph.node if n.op_type == "MatMul")
    used = {name for node in made.graph.node for name in node.input}
    assert {i.name for i in made.graph.initializer} <= used


def test_an_excluded_convolution_between_quantized_ones(tmp_path: Path) -> None:
    """What quantized convolutions write stays rounded (their kernels need it); what float nodes write is read as it
    is."""
    bench = Bench(tmp_path, architectures.residual_cnn())
    names = [n.name for n in onnx.load(bench.source / "model.onnx").graph.node if n.op_type == "Conv"]
    everything = bench.run("static_int8").data["qdq_by_op"]["Conv"]
    error = bench.error()
    result = bench.run("static_int8", exclude_nodes=names[1:3])
    assert result.data["qdq_by_op"]["Conv"] == everything - 2
    made = bench.made()
    makers = producers(made)
    first, second = (next(n for n in made.graph.node if n.name == name) for name in names[1:3])
    assert all(i not in makers or makers[i].op_type != "DequantizeLinear" for i in first.input[1:])
    assert reads_float(made, second)  # its input comes from the first one, by a Relu in float
    assert bench.error() < error


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_that_a_graph_inside_reads(recipe: str, tmp_path: Path) -> None:
    """Graphs inside the graph are not quantized: they keep the float weight, and their nodes may be named."""
    inner = [helper.make_node("MatMul", ["a", "w"], ["then_out"], name="inner")]
    then = helper.make_graph(inner, "then", [], [value("then_out", None)])
    other = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["else_out"], name="negate")], "else", [], [value("else_out", None)]
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="outer"),
        helper.make_node("ReduceSum", ["x"], ["total"], name="total", keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"], name="greater"),
        helper.make_node("If", ["positive"], ["y"], name="if", then_branch=then, else_branch=other),
    ]
    weights = [tensor("w", RNG.normal(0, 0.3, (8, 8))), tensor("zero", 0.0)]
    model = make_model(nodes, [value("x", ["batch", 8])], [value("y", ["batch", 8])], weights)
    bench = Bench(tmp_path, model, simplified=False)
    result = bench.run(recipe, exclude_nodes=["inner"])
    assert sum(result.data["qdq_by_op"].values()) == 1
    assert result.data["trial_run"]["finite"]
    assert bench.error() < 0.05


def test_an_unknown_name_tells_the_closest_ones(tmp_path: Path) -> None:
    bench = Bench(tmp_path, two_products(shared=False), simplified=False)
    with fails("unknown_node", FailureKind.REQUEST) as caught:
        bench.run("static_int8", exclude_nodes=["residual", "residuel"])
    assert caught.value.node == "residuel"
    assert "'residual'" in caught.value.detail


@pytest.mark.parametrize("recipe", RECIPES)
def test_everything_excluded_is_refused(recipe: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, two_products(shared=False), simplified=False)
    with fails("nothing_to_quantize"):
        bench.run(recipe, exclude_nodes=["a", "b"])


@pytest.mark.parametrize("gather", [True, False])
def test_the_embedding_is_quantized_only_where_it_is_asked_for(gather: bool, tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.bert())
    ops: dict[str, Any] = {"op_types": ["MatMul", "Gemm", "Gather"]} if gather else {}
    bench.run("dynamic_int8", **ops)
    tables = {i.name: i for i in bench.made().graph.initializer}
    assert ("word_embeddings" in tables) is not gather
    assert ("word_embeddings_quantized" in tables) is gather
    assert bench.error() < 0.06
