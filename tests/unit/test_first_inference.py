"""The export tries a model on what it is for: samples where there are any, else random inputs that the graph allows.
What it finds out of the batch, and of the values, stands in the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from app.domain.failures import FailureKind, StageFailure
from tests.factories import cases
from tests.factories import onnx_models as models
from tests.factories.architectures import GraphBuilder
from tests.unit.test_export import Notes
from workers.data import Samples
from workers.graph.onnx_graph import model_specs
from workers.kernel import StageContext, TensorSpec, backends
from workers.measure.axes import batch_axes, fixed_batch
from workers.measure.synthetic import synthetic_feeds, synthetic_shapes
from workers.stages.export import Export, ExportOptions
from workers.stages.export._values import value_bounds

F, I32, I64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


def export(
    model: ModelProto, tmp_path: Path, data: cases.Feeds | None = None, **options: Any
) -> tuple[Mapping[str, Any], list[TensorSpec], Path]:
    """The stage's data, the inputs of what it wrote, and its folder."""
    for name in ("in", "data", "work", "out"):
        (tmp_path / name).mkdir()
    models.save(model, tmp_path / "in" / "m.onnx")
    inputs = {"source": tmp_path / "in"}
    if data is not None:
        np.savez(tmp_path / "data" / "data.npz", **data)  # type: ignore[arg-type]
        inputs["data"] = tmp_path / "data"
    context = StageContext(inputs, tmp_path / "work", tmp_path / "out", Notes(), {})
    found = Export().run(context, ExportOptions(**options)).data
    folder = tmp_path / "out" / "model"
    return found, model_specs(onnx.load(folder / "model.onnx"))[0], folder


def runs_at(folder: Path, inputs: list[TensorSpec], *batches: int) -> None:
    session = backends()["onnxruntime"]().load(folder, {})
    for batch in batches:
        for seed in range(3):
            session.run(synthetic_feeds(inputs, batch, None, seed))
    assert [(s.shape, s.values) for s in session.inputs] == [(s.shape, s.values) for s in inputs]
    session.close()


WITH_DATA = [(name, True) for name in ("lstm_lengths", "small_vocab", "weekday")]
WITHOUT = [(name, False) for name in ("lstm_lengths", "small_vocab", "weekday", "roialign", "lstm_state")]


@pytest.mark.parametrize(("name", "with_data"), [*WITH_DATA, *WITHOUT])
def test_random_numbers_do_not_decide(name: str, with_data: bool, tmp_path: Path) -> None:
    case = cases.CASES[name]()
    data, inputs, folder = export(case.model, tmp_path, case.data if with_data else None)
    assert data["dynamic_batch"]
    assert fixed_batch(inputs) is None
    assert all(t["passed"] for t in data["checks"]["first_inference"])
    assert data["checks"]["first_inference_on"] == ("data" if with_data else "random inputs")
    assert not any("fixed" in note for note in data["notes"])
    runs_at(folder, inputs, 1, 2, 5)


def test_bounds_come_from_the_graph(tmp_path: Path) -> None:
    values = {}
    for name in ("lstm_lengths", "small_vocab", "weekday", "roialign"):
        (tmp_path / name).mkdir()
        _, inputs, _ = export(cases.CASES[name]().model, tmp_path / name)
        values |= {s.name: s.values for s in inputs if s.values is not None}
    assert values == {"lengths": (1, 6), "cats": (0, 1), "weekday": (0, 6), "batch_ids": (0, "n")}


def _bounds(nodes: list[Any], weights: list[Any], dtype: int = I64) -> Any:
    model = models.make_model(nodes, [models.value("ids", ["n", 3], dtype)], [models.value("y", None)], weights)
    return value_bounds(onnx.shape_inference.infer_shapes(model)).get("ids")


TABLE = models.tensor("table", np.zeros((20, 4)))


@pytest.mark.parametrize(
    ("nodes", "bounds"),
    [
        ([("Gather", ["table", "ids"], {})], (0, 19)),
        ([("Cast", ["ids"], {"to": I64}), ("Gather", ["table", "0"], {})], (0, 19)),
        ([("Add", ["ids", "offsets"], {}), ("Gather", ["table", "0"], {})], (0, 9)),
        ([("Sub", ["ids", "two"], {}), ("Gather", ["table", "0"], {})], (2, 21)),
        ([("Mul", ["ids", "two"], {}), ("Gather", ["table", "0"], {})], (0, 9)),
        ([("Mod", ["ids", "two"], {}), ("Gather", ["table", "0"], {})], None),
        ([("Gather", ["table", "ids"], {"axis": 1})], (0, 3)),
        ([("Reshape", ["ids", "flat"], {}), ("Unsqueeze", ["0", "two"], {}), ("Gather", ["table", "1"], {})], (0, 19)),
        ([("Identity", ["ids"], {})], None),
    ],
)
def test_bounds_go_back_through_what_moves_and_shifts_values(nodes: list[Any], bounds: Any) -> None:
    made = [
        helper.make_node(op, [f"t{i}" if i.isdigit() else i for i in inputs], [f"t{k}"], **attributes)
        for k, (op, inputs, attributes) in enumerate(nodes)
    ]
    made[-1].output[0] = "y"
    weights = [
        TABLE,
        models.tensor("offsets", [0, 4, 10], np.int64),
        models.tensor("two", [2], np.int64),
        models.tensor("flat", [-1], np.int64),
    ]
    assert _bounds(made, weights) == bounds


def test_ids_given_as_floats_are_whole_numbers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], to=I32),
        helper.make_node("Gather", ["table", "ids"], ["y"]),
    ]
    outputs = [models.value("y", ["n", 3, 4])]
    model = models.make_model(nodes, [models.value("x", ["n", 3])], outputs, [TABLE])
    _, inputs, folder = export(model, tmp_path)
    x = synthetic_feeds(inputs, 50, None, 1)["x"]
    assert inputs[0].values == (0, 19)
    assert (x.dtype, x.min() >= 0, x.max() <= 19, bool((x == np.floor(x)).all())) == (np.float32, True, True, True)
    runs_at(folder, inputs, 1, 2)


def test_edges_are_bounded_by_the_nodes_and_a_graph_is_one_sample(tmp_path: Path) -> None:
    (tmp_path / "random").mkdir()
    _, inputs, folder = export(cases.graph_net("graph").model, tmp_path / "random")
    assert {s.name: s.values for s in inputs}["edges"] == (0, "nodes")
    runs_at(folder, inputs, 1, 7)
    (tmp_path / "data").mkdir()
    given = cases.graph(12, 9)
    data, inputs, _ = export(
        cases.graph_net("graph").model, tmp_path / "data", given, batch_axes={"x": None, "edges": None}
    )
    assert batch_axes(inputs) == {"x": None, "edges": None}
    assert not data["dynamic_batch"]
    (batch,) = Samples(tmp_path / "data" / "data" / "data.npz", inputs).batches(16)
    assert len(batch) == 1
    for name, array in given.items():
        np.testing.assert_array_equal(batch.feeds[name], array)


def test_a_graph_is_found_to_be_one_sample_where_the_data_run_no_other_way(tmp_path: Path) -> None:
    data, inputs, _ = export(cases.graph_net("graph").model, tmp_path, cases.graph(12, 9))
    assert batch_axes(inputs) == {"x": None, "edges": None}
    assert any("no batch axis" in note for note in data["notes"])


@pytest.mark.parametrize("symbol", ["batch", "b", "?", "unk__5"])
def test_the_batch_of_a_state_is_found_whatever_its_symbol(symbol: str, tmp_path: Path) -> None:
    case = cases.lstm_state("state")
    for info, axis in ((case.model.graph.input[1], 1), (case.model.graph.output[1], 1)):
        info.type.tensor_type.shape.dim[axis].dim_param = symbol
    data, inputs, folder = export(case.model, tmp_path)
    assert batch_axes(inputs) == {"x": 0, "state": 1}
    assert data["dynamic_batch"]
    runs_at(folder, inputs, 1, 4)


def test_the_data_tell_where_the_batch_of_a_state_is(tmp_path: Path) -> None:
    case = cases.lstm_state("state")
    case.model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "k"
    rng = np.random.default_rng(0)
    given = {"x": cases.floats(rng, 11, 6, 8), "state": cases.floats(rng, 2, 11, 16)}
    _, inputs, _ = export(case.model, tmp_path, given)
    assert batch_axes(inputs) == {"x": 0, "state": 1}
    samples = Samples(tmp_path / "data" / "data.npz", inputs)
    first, *_, last = samples.batches(4)
    assert (first.feeds["state"].shape, last.feeds["state"].shape) == ((2, 4, 16), (2, 3, 16))
    np.testing.assert_array_equal(first.feeds["state"], given["state"][:, :4])
    assert last.filled(5)["state"].shape == (2, 5, 16)


def _sequence_first() -> ModelProto:
    net = GraphBuilder(21)
    net.add("LSTM", "x", net.weight("w", (1, 32, 4)), net.weight("r", (1, 32, 8)), "", "lengths", hidden_size=8,
            outputs=["steps", "h", "c"])  # fmt: skip
    net.add("Squeeze", "h", net.ints(0), outputs=["y"])
    inputs: list[cases.Tensor] = [("x", F, ["t", "m", 4]), ("lengths", I32, ["m"])]
    return cases.finished(net, inputs, [("y", F, ["m", 8])])


def test_sequence_first(tmp_path: Path) -> None:
    data, inputs, folder = export(_sequence_first(), tmp_path)
    assert batch_axes(inputs) == {"x": 1, "lengths": 0}
    assert data["dynamic_batch"]
    runs_at(folder, inputs, 1, 3)


def test_what_the_job_says_of_the_batch_is_written_and_checked(tmp_path: Path) -> None:
    (tmp_path / "said").mkdir()
    _, inputs, _ = export(_sequence_first(), tmp_path / "said", batch_axes={"x": 1})
    assert batch_axes(inputs) == {"x": 1, "lengths": 0}
    for wrong in ({"z": 0}, {"x": 3}):
        (folder := tmp_path / next(iter(wrong))).mkdir()
        with pytest.raises(StageFailure) as caught:
            export(_sequence_first(), folder, batch_axes=wrong)
        assert (caught.value.code, caught.value.kind) == ("batch_axis_mismatch", FailureKind.REQUEST)
        assert caught.value.remedy


def _needs_even_ids() -> ModelProto:
    """Ids that no bound explains: 100 to 103, by way of a hash."""
    net = GraphBuilder(22)
    near = net.add("Sub", net.add("Mul", "ids", "ids"), net.constant("square", 10_000, np.int64))
    net.add("Gather", net.weight("table", (610, 4)), near, outputs=["y"])
    return cases.finished(net, [("ids", I64, ["n"])], [("y", F, ["n", 4])])


def test_values_are_learned_from_the_data_where_the_graph_does_not_tell(tmp_path: Path) -> None:
    given = {"ids": np.array([100, 103, 101, 102, 103])}
    data, inputs, folder = export(_needs_even_ids(), tmp_path, given)
    assert data["dynamic_batch"]
    assert inputs[0].values == (100, 103)
    runs_at(folder, inputs, 1, 2)


def test_without_data_the_error_names_the_input_and_the_remedy_helps(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StageFailure) as caught:
        export(_needs_even_ids(), tmp_path / "a")
    assert caught.value.code == "inference_failed"
    assert "'ids'" in str(caught.value.remedy)
    assert "data set in `validation`" in str(caught.value.remedy)
    (tmp_path / "b").mkdir()
    export(_needs_even_ids(), tmp_path / "b", {"ids": np.array([100, 101])})


def test_a_batch_that_the_model_really_does_not_take_is_fixed_and_said(tmp_path: Path) -> None:
    net = GraphBuilder(23)
    net.add("Reshape", "x", net.ints(1, 8), outputs=["y"])
    model = cases.finished(net, [("x", F, ["n", 8])], [("y", F, ["n", 8])])
    data, inputs, _ = export(model, tmp_path, {"x": np.zeros((5, 8), np.float32)})
    assert fixed_batch(inputs) == 1
    assert any("fixed at 1" in note for note in data["notes"])


def test_a_random_original_is_told(tmp_path: Path) -> None:
    data, *_ = export(cases.CASES["random_original"]().model, tmp_path)
    assert not data["checks"]["repeats_itself"]["passed"]
    assert data["checks"]["repeats_itself"]["output"] == "logits"
    assert any("random" in note for note in data["notes"])


def test_what_the_data_contradict_is_taken_apart(tmp_path: Path) -> None:
    case = cases.dup_dim_symbol("dim")
    for axis in (2, 3):
        case.model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "side"
    data, inputs, _ = export(case.model, tmp_path, case.data)
    assert inputs[0].shape == ("n", 3, "x_dim_2", "x_dim_3")
    assert any("by the data" in note for note in data["notes"])


@pytest.mark.parametrize(
    ("shapes", "axes"),
    [
        ({"x": ("batch", 3)}, {"x": 0}),
        ({"x": ("a", 3), "y": ("b", 4)}, {"x": 0, "y": 0}),
        ({"ids": ("batch_size", "seq"), "past": (2, "batch_size", 8)}, {"ids": 0, "past": 1}),
        ({"x": ("t", "N", 8)}, {"x": 1}),
        ({"x": (1, 512), "state": (2, 1, 128), "rate": ()}, {"x": 0, "state": 1, "rate": None}),
        ({"x": ("n", 8), "anchors": (100, 4)}, {"x": 0, "anchors": None}),
        ({"x": ("n_unbatched", 8)}, {"x": None}),
        ({"x": ("?", 3, "?", "?")}, {"x": 0}),
    ],
)
def test_batch_axes_are_read_off_the_symbols(shapes: dict[str, Any], axes: dict[str, Any]) -> None:
    assert batch_axes([TensorSpec(n, "float32", s) for n, s in shapes.items()]) == axes


def test_dimensions_that_are_computed_of_others_follow_them() -> None:
    inputs = [
        TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),
        TensorSpec("attention_mask", "int64", ("batch_size", "past_sequence_length + sequence_length")),
        TensorSpec("past", "float32", ("batch_size", 4, "past_sequence_length", 16)),
    ]
    found = synthetic_shapes(inputs, 3, {"past": {"opt": [3, 4, 7, 16]}})
    assert found == {"input_ids": (3, 32), "attention_mask": (3, 39), "past": (3, 4, 7, 16)}


@pytest.mark.parametrize("name", ["lstm_lengths", "lstm_state"])
def test_openvino_is_not_asked_for_lengths_that_it_ignores(name: str, tmp_path: Path) -> None:
    """Its plug-in computes every sequence at its full length; where there are no lengths, its answers are right."""
    case = cases.CASES[name]()
    _, _, folder = export(case.model, tmp_path)
    (out := tmp_path / "engine").mkdir()
    backend = backends()["openvino"]()
    if name == "lstm_lengths":
        with pytest.raises(StageFailure) as caught:
            backend.build(folder, out, {}, Notes())
        assert (caught.value.code, caught.value.tensor) == ("unsupported_op", "lengths")
        return
    session = backend.load(out, backend.build(folder, out, {}, Notes())["runtime"])
    original = backends()["onnxruntime"]().load(folder, {})
    for feeds in case.held.values():
        for output, wanted in original.run(feeds).items():
            np.testing.assert_allclose(session.run(feeds)[output], wanted, atol=1e-5)
