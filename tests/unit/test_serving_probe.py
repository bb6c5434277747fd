"""What is found out about real models before they are served: who depends on the batch, who may be filled up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.factories import onnx_models as models
from workers.kernel import TensorSpec
from workers.serving.defaults import settings_of, why_one_by_one
from workers.serving.probe import Run, depends_on_batch, padding

RNG = np.random.default_rng(0)


def runner(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Sequence[Any] = ()) -> Run:
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, dict(feeds)), strict=True))


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs, [output], name=output, **attributes)


X = models.value("x", ["n", 4])
SAMPLES = [{"x": RNG.normal(size=(1, 4)).astype(np.float32)} for _ in range(2)]


@pytest.mark.parametrize(
    ("nodes", "outputs", "words"),
    [
        ([node("Relu", ["x"], "y")], [models.value("y", ["n", 4])], None),
        (
            [node("Softmax", ["x"], "y", axis=0)],  # over the batch
            [models.value("y", ["n", 4])],
            "changes with what else is in its batch",
        ),
        ([node("ReduceMean", ["x"], "y", keepdims=0)], [models.value("y", [])], "no row for each sample"),
        (
            [node("Relu", ["x"], "y"), node("Transpose", ["x"], "t", perm=[1, 0])],
            [models.value("y", ["n", 4]), models.value("t", [4, "n"])],
            "output t has no row for each sample",
        ),
    ],
    ids=["rows", "softmax over the batch", "mean", "batch on another axis"],
)
def test_who_depends_on_the_batch(nodes: list[Any], outputs: list[Any], words: str | None) -> None:
    found = depends_on_batch(runner(nodes, [X], outputs), SAMPLES, ["x"], 1e-3)
    assert (found is None) if words is None else (found is not None and words in found)


def by_size(small: Run, large: Run, most: int) -> Run:
    return lambda feeds: (small if len(feeds["x"]) <= most else large)(feeds)


@pytest.mark.parametrize(
    ("most", "small", "large", "words"),
    [
        (4, "Relu", "Neg", None),  # what two engines answer differs by what their verdict allows
        (1, "Softmax", "Neg", None),  # of one sample by itself
        (1, "Relu", "Softmax", "changes with what else is in its batch"),
        (4, "Relu", "Softmax", "changes with what else is in its batch"),
        (4, "Softmax", "Relu", "changes with what else is in its batch"),
    ],
)
def test_of_two_engines_each_is_tried_at_the_batches_that_it_answers(
    most: int, small: str, large: str, words: str | None
) -> None:
    runs = [
        runner([node(op, ["x"], "y", **({"axis": 0} if op == "Softmax" else {}))], [X], [models.value("y", ["n", 4])])
        for op in (small, large)
    ]
    found = depends_on_batch(by_size(*runs, most), SAMPLES, ["x"], 1e-3, (), [(1, most), (most + 1, None)])
    assert (found is None) if words is None else (found is not None and words in found)


def test_a_batch_that_the_engine_does_not_take() -> None:
    one = runner([node("Relu", ["x"], "y")], [models.value("x", [1, 4])], [models.value("y", [1, 4])])
    assert "does not take 3 samples at once" in str(depends_on_batch(one, SAMPLES, ["x"], 1e-3))


def test_random_outputs_are_asked_for_their_shape_only() -> None:
    noisy = runner([node("RandomNormalLike", ["x"], "y")], [X], [models.value("y", ["n", 4])])
    assert depends_on_batch(noisy, SAMPLES, ["x"], 1e-3) is not None
    assert depends_on_batch(noisy, SAMPLES, ["x"], 1e-3, ["y"]) is None


IDS = models.value("ids", ["n", "length"], TensorProto.INT64)
MASK = models.value("mask", ["n", "length"], TensorProto.FLOAT)
TABLE = models.tensor("table", RNG.normal(size=(50, 8)).astype(np.float32))
EMBEDDED = [node("Gather", ["table", "ids"], "tokens")]
SENTENCES = [
    {"ids": RNG.integers(1, 50, (1, length)), "mask": np.ones((1, length), np.float32)} for length in (3, 7, 8, 12)
]
BUCKETS = {"ids": {1: (8, 16)}, "mask": {1: (8, 16)}}


def test_a_model_that_minds_its_mask_may_be_filled_up() -> None:
    """Tokens, and the mean of those that count: sentences share batches, and get their own length back."""
    nodes = [
        *EMBEDDED,
        node("Unsqueeze", ["mask", "last"], "wide"),
        node("Mul", ["tokens", "wide"], "counted"),
        node("ReduceSum", ["counted", "one"], "total", keepdims=0),
        node("ReduceSum", ["mask", "one"], "length", keepdims=1),
        node("Div", ["total", "length"], "mean"),
    ]
    axes = [numpy_helper.from_array(np.array([at]), name) for name, at in (("last", 2), ("one", 1))]
    outputs = [models.value("counted", ["n", "length", 8]), models.value("mean", ["n", 8])]
    run = runner(nodes, [IDS, MASK], outputs, [TABLE, *axes])
    found = padding(run, SENTENCES, BUCKETS, "fp32")
    assert (found.refused, found.pad) == ({}, BUCKETS)
    assert found.cut == {"counted": {1: ("ids", 1)}}


def test_a_model_that_looks_at_all_of_it_may_not() -> None:
    nodes = [*EMBEDDED, node("Add", ["mask", "mask"], "unused"), node("ReduceMean", ["tokens"], "mean", axes=[1])]
    outputs = [models.value("mean", ["n", 1, 8]), models.value("unused", ["n", "length"])]
    found = padding(runner(nodes, [IDS, MASK], outputs, [TABLE]), SENTENCES, BUCKETS, "fp32")
    assert found.pad == {}
    assert "output mean changes when it is filled up" in found.refused["ids"]


def test_a_convolution_reaches_over_the_end() -> None:
    """The rows that come back have the right shape; the last one saw other neighbours."""
    weight = models.tensor("w", RNG.normal(size=(1, 1, 3)).astype(np.float32))
    bias = [node("Add", ["x", "b"], "moved"), node("Conv", ["moved", "w"], "y", pads=[1, 1])]
    run = runner(
        bias,
        [models.value("x", ["n", 1, "length"])],
        [models.value("y", ["n", 1, "length"])],
        [weight, models.tensor("b", np.float32(1))],
    )
    found = padding(run, [{"x": RNG.normal(size=(1, 1, 6)).astype(np.float32)}], {"x": {2: (8,)}}, "fp32")
    assert "changes" in found.refused["x"]


def test_what_cannot_be_tried_is_not_filled_up() -> None:
    nodes = [*EMBEDDED, node("Relu", ["mask"], "y")]
    outputs = [models.value("tokens", ["n", "length", 8]), models.value("y", ["n", "length"])]
    run = runner(nodes, [IDS, MASK], outputs, [TABLE])
    found = padding(run, SENTENCES, {"ids": {1: (2,)}, "mask": {1: (2,)}}, "fp32")
    assert "nothing could be tried" in found.refused["mask"]
    alone = padding(run, SENTENCES, {"ids": {1: (8,)}}, "fp32")
    assert alone.pad == {"ids": {1: (8,)}}, "they need not be of one length here"
    apart = [*EMBEDDED, node("Concat", ["ids", "ids"], "twice", axis=1)]
    run = runner(apart, [IDS], [models.value("twice", ["n", "long"], TensorProto.INT64)], [TABLE])
    found = padding(run, [{"ids": s["ids"]} for s in SENTENCES], {"ids": {1: (8,)}}, "fp32")
    assert "does not follow" in found.refused["ids"]


def specs(*shape: int | str) -> list[TensorSpec]:
    return [TensorSpec("x", "float32", shape)]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (("layers", "batch", 8), "lies along axis 1"),
        ((4, 8), "takes batches of 4 only"),
        (("batch", 8), None),
    ],
)
def test_what_the_inputs_tell(shape: tuple[int | str, ...], words: str | None) -> None:
    inputs, measured = specs(*shape), {"figures": {"batches": {"1": {}, "8": {}}}}
    why = why_one_by_one(inputs)
    found = settings_of(inputs, measured, why)
    if words is None:
        assert (why, found.max_batch, found.reason, found.batch_axis) == (None, 8, None, {"x": 0})
    else:
        assert (found.max_batch, found.batch_axis) == (1, {"x": None})
        assert words in str(why)
        assert found.reason == f"requests are served one by one: {why}"


def test_settings_keep_to_what_was_measured() -> None:
    batches = {"figures": {"batches": {"1": {}, "8": {}}}}
    inputs = specs("batch", 8)
    assert settings_of(inputs, {"figures": {"batches": {"1": {}}}}, None).max_batch == 1
    limited = {**batches, "engine": {"accepts": {"x": [[1, 4], None]}}}
    assert settings_of(inputs, limited, None).max_batch == 4
    deployed = {**batches, "deployment": {"instances": 2, "threads_per_instance": 1}}
    found = settings_of(inputs, deployed, None)
    assert (found.instances, found.threads) == (2, 1)
    tuned = {"instances": 1, "max_batch": 16, "max_delay_ms": 2.0, "preferred_batches": [8], "batch_axis": {"x": 0}}
    found = settings_of(inputs, {"deployment": {"instances": 2, "serving": {"settings": tuned}}}, None)
    assert (found.instances, found.max_batch, found.preferred_batches) == (1, 16, (8,))
    apart = settings_of(inputs, {"deployment": {"serving": {"settings": tuned}}}, "output y changes")
    assert (apart.max_batch, apart.preferred_batches, apart.batch_axis) == (1, (), {"x": None})
