"""Which nodes go back into higher precision first, and what each of them has to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from app.domain.spec import OptimizationSpec
from tests.factories import architectures
from tests.factories.onnx_models import make_model, tensor, value
from tests.factories.search_world import Truth, World
from workers.data import synthetic_feeds
from workers.graph.onnx_graph import model_specs
from workers.graph.prepare import prepare
from workers.graph.work import MOVED, node_work
from workers.search import limits
from workers.search.ranking import in_order
from workers.search.requests import Rank, Request


def node(name: str, error: float | None, work: float | None = None) -> dict[str, Any]:
    return {"name": name, "error": error, "work": work}


def test_what_mends_most_for_its_work_comes_first() -> None:
    nodes = [node("dear", 4.0, 10.0), node("cheap", 3.0, 1.0), node("cheaper", 2.5, 0.5), node("middling", 2.4, 2.0)]
    names, shares = in_order(nodes)
    assert names == ("cheap", "cheaper", "middling", "dear"), "below the mean they cost the same: the worst come first"
    assert shares[0] < shares[1] < shares[2] < 0.6
    assert shares[3] == pytest.approx(1.0)


def test_where_squares_add_up_the_worst_count_for_more() -> None:
    nodes = [node("dear", 4.0, 6.0), node("cheap", 2.0, 1.0), node("b", 1.9, 1.0), node("c", 1.8, 1.0)]
    assert in_order(nodes)[0][0] == "cheap"
    assert in_order(nodes, squared=True)[0][0] == "dear"


def test_what_hardly_hurts_comes_last_however_little_it_has_to_do() -> None:
    names, _ = in_order([node("a", 4.0, 900.0), node("b", 3.0, 50.0), node("idle", 0.1, 0.001), node("none", 0.0, 1.0)])
    assert names == ("b", "a", "idle")


def test_without_work_the_worst_come_first_and_all_cost_the_same() -> None:
    names, shares = in_order([node("a", 4.0), node("b", 3.0), node("c", 2.0), node("unknown", None)])
    assert names == ("a", "b", "c")
    assert shares == (1 / 3, 2 / 3, 1.0)
    assert in_order([]) == ((), ())


def test_work_that_is_not_known_is_taken_for_the_mean() -> None:
    names, _ = in_order([node("b", 1.0, 6.0), node("odd", 1.0), node("a", 1.0, 2.0)])
    assert names == ("odd", "a", "b")


SPEC = OptimizationSpec.model_validate(
    {"model_id": "m", "calibration": {"dataset_id": "d"}, "benchmark": {"batch_sizes": [1, 8]}}
)


class Classifier(World):
    """Its last layer hurts most, and is a third of the work, as in SqueezeNet."""

    def answer(self, request: Request) -> dict[str, Any]:
        if not isinstance(request, Rank):
            return super().answer(request)
        few = [{"name": f"n{i}", "error": 1.0 - 0.05 * i, "work": 1.0} for i in range(15)]
        return {"nodes": [{"name": "classifier", "error": 1.5, "work": 8.0}, *few]}


def test_a_dear_node_is_not_kept_where_cheap_ones_mend_as_much() -> None:
    world = Classifier({"fp32": Truth(1.2, 1.2), "int8-a": Truth(3.0, 3.0, loss=2.0, mends=0.8)}, SPEC)
    _, state = world.run()
    kept = [c.plan.steps[1].options["exclude_nodes"] for cid, c in state.candidates.items() if ".keep" in cid]
    assert kept
    assert all("classifier" not in names for names in kept)


def test_of_one_graph_the_one_whose_rest_is_in_lower_precision_is_mended_first() -> None:
    class Twins(World):
        def _make(self, request: Any) -> dict[str, Any]:
            found = super()._make(request)
            found["built"]["graph"] = found["built"]["graph"].split(" ", 1)[1]
            return found

        def candidates(self) -> list[Any]:
            from dataclasses import replace

            return [replace(c, rest="bf16" if c.id == "int8-low" else "fp32") for c in super().candidates()]

    truths = {"int8-a": Truth(3.01, 3.01, loss=3.0), "int8-low": Truth(3.0, 3.0, loss=3.0), "fp32": Truth(1.2, 1.2)}
    world = Twins(truths, SPEC)
    world.run()
    ranked = [a["subject"]["candidate"]["id"] for a in world.asked if a["kind"] == "rank"]
    assert ranked[0] == "int8-low"


def work(model: onnx.ModelProto, tmp_path: Path, **sizes: tuple[int, ...]) -> dict[str, float]:
    onnx.save(model, tmp_path / "model.onnx")
    prepared = prepare(tmp_path / "model.onnx", tmp_path)
    specs = model_specs(onnx.load(prepared))[0]
    feeds = synthetic_feeds(specs, 1, {n: {"min": [*s], "opt": [*s], "max": [*s]} for n, s in sizes.items()}, 0)
    return node_work(prepared, feeds)


def test_work_is_counted_from_shapes_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["a"], ["p"], name="pool"),
        helper.make_node("Reshape", ["p", "flat"], ["r"], name="reshape"),
        helper.make_node("Gemm", ["r", "v"], ["y"], name="gemm"),
    ]
    weights = [
        tensor("w", rng.normal(size=(8, 4, 3, 3)).astype(np.float32)),
        tensor("v", rng.normal(size=(8, 300)).astype(np.float32)),
        numpy_helper.from_array(np.array([-1, 8], np.int64), "flat"),
    ]
    x, y = value("x", ["batch", 4, "height", "width"]), value("y", ["batch", 300])
    found = work(make_model(nodes, [x], [y], weights), tmp_path, x=(1, 4, 6, 6))
    conv = 8 * 36 * 4 * 9
    assert found["conv"] == conv + MOVED * (4 * 36 + 8 * 36)
    assert found["gemm"] == 300 * 8 + MOVED * (8 + 300)
    assert found["pool"] == MOVED * (8 * 36 + 8)


@pytest.mark.parametrize("name", ["bert", "residual_cnn", "lstm"])
def test_the_work_of_every_product_is_known(name: str, tmp_path: Path) -> None:
    """Also where a size depends on another one, as that of positions which are cut to the length of the input."""
    model = getattr(architectures, name)()
    found = work(model, tmp_path)
    heavy = sum(n.op_type in ("Conv", "MatMul", "Gemm", "LSTM") for n in model.graph.node)
    assert sum(n.split("_")[0] in ("Conv", "MatMul", "Gemm", "LSTM") for n in found) == heavy > 0


def test_a_graph_that_does_not_run_has_no_work(tmp_path: Path) -> None:
    model = make_model(
        [helper.make_node("Add", ["x", "w"], ["y"], name="add")], [value("x", ["n"])], [value("y", ["n"])],
        [tensor("w", np.ones(7, np.float32))],
    )  # fmt: skip
    onnx.save(model, tmp_path / "model.onnx")
    assert node_work(tmp_path / "model.onnx", {"x": np.ones(5, np.float32)}) == {}
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_the_limits_of_mending_are_shares_of_the_work() -> None:
    assert 0 < limits.FIRST_KEPT < limits.FEW_KEPT < limits.MOST_KEPT < 1
