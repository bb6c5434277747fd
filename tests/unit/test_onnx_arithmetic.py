"""Which arithmetic of a graph a narrower runtime would change: on real graphs, against what OpenVINO then answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper

from app.domain.spec import OptimizationSpec
from tests.factories import architectures
from tests.factories import onnx_models as models
from tests.factories.architectures import GraphBuilder
from tests.unit.test_trt_build import Recorder
from workers.backends.openvino import OpenVinoBackend
from workers.candidates import Case
from workers.graph.onnx_arithmetic import describe_arithmetic
from workers.kernel import backends

F, D, I32, I64, U8, B = (
    *(TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8),
    TensorProto.BOOL,
)
Body = Callable[[GraphBuilder], str]


def made(body: Body, *, name: str = "ids", dtype: int = I64, out: int = F, opset: int = 17) -> ModelProto:
    """One input [batch, length], one output of whatever shape."""
    net = GraphBuilder(0)
    last = body(net)
    net.add("Identity", last, outputs=["y"])
    model = net.model([models.value(name, ["batch", "length"], dtype)], [models.value("y", None, out)])
    model.opset_import[0].version = opset
    return model


def looked_up(net: GraphBuilder, ids: str) -> str:
    return net.add("Gather", net.weight("table", (149, 8)), ids)


def wide(model: ModelProto) -> list[str]:
    return [str(entry["op"]) for entry in describe_arithmetic(model)["integers"]]


# Bounded: by what they select, by their types, by sizes, by names


def positions(net: GraphBuilder) -> str:
    """Buckets of relative positions, as T5 has them: integers through floats and back, of sizes alone."""
    size = net.add("Squeeze", net.add("Slice", net.add("Shape", "ids"), net.ints(1), net.ints(2)), net.ints(0))
    steps = net.add("Range", net.constant("zero", 0, np.int64), size, net.constant("one", 1, np.int64))
    away = net.add(
        "Abs", net.add("Sub", net.add("Unsqueeze", steps, net.ints(0)), net.add("Unsqueeze", steps, net.ints(1)))
    )
    far = net.add("Log", net.add("Cast", net.add("Add", away, net.constant("one", 1, np.int64)), to=F))
    bucket = net.add("Min", net.add("Cast", far, to=I64), net.constant("last", 7, np.int64))
    bias = net.add("Gather", net.weight("buckets", (8, 1)), bucket)
    return net.add("MatMul", net.add("Squeeze", bias, net.ints(2)), looked_up(net, "ids"))


def padded(net: GraphBuilder) -> str:
    """Positions that count what is no padding, as RoBERTa does: ids are compared, and bounded by the table."""
    real = net.add("Cast", net.add("Not", net.add("Equal", "ids", net.constant("pad", 1, np.int64))), to=I64)
    place = net.add("Mul", net.add("CumSum", real, net.constant("axis", 1, np.int64)), real)
    return net.add("Add", looked_up(net, "ids"), net.add("Gather", net.weight("places", (200, 8)), place))


def shifted(net: GraphBuilder) -> str:
    ids = net.add(
        "Unsqueeze", net.add("Cast", net.add("Add", "ids", net.constant("by", 3, np.int64)), to=I32), net.ints(0)
    )
    return looked_up(net, net.add("Squeeze", ids, net.ints(0)))


def masked(net: GraphBuilder) -> str:
    kept = net.add("Cast", net.add("Unsqueeze", "attention_mask", net.ints(1)), to=F)
    return net.add("Mul", net.add("Sub", net.constant("one", 1.0), kept), net.constant("low", -1e4))


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (lambda net: looked_up(net, "ids"), {}),
        (positions, {}),
        (padded, {}),
        (shifted, {}),
        (masked, {"name": "attention_mask"}),
        (lambda net: net.add("Cast", "ids", to=F), {"dtype": I32}),
        (lambda net: net.add("Cast", net.add("ArgMax", "ids", axis=1), to=F), {"dtype": F}),
        (lambda net: net.add("Shape", "ids"), {"out": I64}),
        (lambda net: net.add("Cast", "ids", to=F), {"dtype": U8}),
    ],
    ids=["table", "positions", "padding", "shifted", "mask", "int32 to float", "argmax", "shape", "uint8"],
)
def test_what_is_bounded_is_kept(body: Body, options: dict[str, Any]) -> None:
    assert wide(made(body, **options)) == []


def test_whole_networks() -> None:
    for model in (architectures.bert(), architectures.gpt2(), architectures.vit(), architectures.lstm(), models.lstm()):
        assert wide(model) == []
        assert describe_arithmetic(model)["float64"] == []
    assert describe_arithmetic(architectures.bert())["assumed"] == ["attention_mask"]
    for model in (models.with_if(), models.with_loop(), models.with_function(), models.quantized_mlp()):
        assert describe_arithmetic(model) == {"float64": [], "integers": [], "assumed": []}


# What cannot be bounded: told, and OpenVINO does answer otherwise

UNBOUNDED: dict[str, tuple[Body, dict[str, Any], list[str], Any]] = {
    "mod": (
        lambda net: looked_up(net, net.add("Mod", "ids", net.constant("n", 149, np.int64))),
        {},
        ["Mod"],
        [[5, (1 << 24) + 1, 3_000_000_019]],
    ),
    "int32 mod": (
        lambda net: looked_up(net, net.add("Mod", "ids", net.constant("n", 149, np.int32))),
        {"dtype": I32},
        ["Mod"],
        [[5, (1 << 24) + 1, (1 << 30) + 3]],
    ),
    "compared": (
        lambda net: net.add("Cast", net.add("Less", "ids", net.constant("n", 100, np.int64)), to=F),
        {},
        ["Less"],
        [[5, 1 << 31, (1 << 40) + 3]],
    ),
    "summed": (
        lambda net: net.add("Cast", net.add("ReduceSum", "ids", net.ints(1)), to=F),
        {"dtype": I64},
        ["ReduceSum", "Cast"],
        [[1 << 31, 1 << 31, 4]],
    ),
    "moved, then cast": (
        lambda net: net.add("Cast", net.add("Unsqueeze", "ids", net.ints(0)), to=F),
        {},
        ["Cast"],
        [[1 << 40, 5, 1 << 31]],
    ),
    "given back": (lambda net: net.add("Neg", "ids"), {"out": I64}, ["Neg", "None"], [[1 << 40, 5]]),
    "uint8 wraps": (
        lambda net: net.add("Cast", net.add("Add", "ids", net.constant("n", 100, np.uint8)), to=F),
        {"dtype": U8},
        ["Add"],
        [[200, 5]],
    ),
    "boolean": (lambda net: net.add("Cast", net.add("Cast", "ids", to=B), to=F), {}, ["Cast"], [[1 << 40, 0, 5]]),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_is_not_bounded_is_told(name: str, tmp_path: Path) -> None:
    body, options, ops, values = UNBOUNDED[name]
    model = made(body, **options)
    assert [str(e["op"]) for e in describe_arithmetic(model)["integers"]] == ops
    # What the engine would answer is not what the original does: none of these is a false alarm.
    feeds = {"ids": np.asarray(values, models_dtype(options.get("dtype", I64)))}
    expected = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, feeds
    )
    (tmp_path / "engine").mkdir()
    backend = OpenVinoBackend()
    built = backend.build(models.folder(model, tmp_path / "model"), tmp_path / "engine", {}, Recorder())
    found = backend.load(tmp_path / "engine", built["runtime"]).run(feeds)
    assert not np.array_equal(found["y"], expected[0])


def models_dtype(kind: int) -> Any:
    return helper.tensor_dtype_to_np_dtype(kind)


def test_only_a_whole_bound_counts() -> None:
    """Ids of which a part selects are not bounded by that, nor are those that only a branch looks up."""
    part = made(
        lambda net: net.add(
            "Add",
            net.add("ReduceSum", looked_up(net, net.add("Slice", "ids", net.ints(0), net.ints(1), net.ints(1)))),
            net.add("Cast", net.add("Mod", "ids", net.constant("n", 7, np.int64)), to=F),
        )
    )
    assert wide(part) == ["Mod"]
    whole = made(
        lambda net: net.add(
            "Add",
            net.add("ReduceSum", looked_up(net, "ids")),
            net.add("Cast", net.add("Mod", "ids", net.constant("n", 7, np.int64)), to=F),
        )
    )
    assert wide(whole) == []


def test_doubles() -> None:
    twice = made(lambda net: net.add("Mul", "ids", net.constant("two", 2.0, np.float64)), dtype=D, out=D)
    assert set(describe_arithmetic(twice)["float64"]) >= {"ids", "y"}
    # Between two casts, too; and not where constants alone are of that type.
    inner = made(
        lambda net: net.add("Cast", net.add("Sqrt", net.add("Cast", "ids", to=D)), to=F),
        dtype=F,
    )
    assert describe_arithmetic(inner)["float64"]
    constant = made(
        lambda net: net.add("Mul", "ids", net.add("Cast", net.constant("two", 2.0, np.float64), to=F)), dtype=F
    )
    assert describe_arithmetic(constant)["float64"] == []


# What the backends make of it


@pytest.mark.parametrize(
    ("arithmetic", "kept"),
    [
        ({}, {"ov-fp32", "trt-fp32", "ort-fp32"}),
        ({"float64": ["x"]}, {"ort-fp32"}),
        ({"integers": [{"node": "mod", "op": "Mod", "tensor": "x", "inputs": ["x"]}]}, {"ort-fp32"}),
        ({"integers": [{"node": None, "op": None, "tensor": "y", "inputs": ["x"]}]}, {"ort-fp32"}),
    ],
    ids=["nothing", "float64", "node", "output"],
)
def test_only_what_keeps_the_arithmetic_is_lossless(arithmetic: dict[str, Any], kept: set[str]) -> None:
    case = Case(
        OptimizationSpec(model_id="mdl_x"),
        {"MatMul": 4},
        "other",
        arithmetic=arithmetic,
        hardware={"gpu": {"compute_capability": "9.0"}},
    )
    found = {c.id: c for n in ("openvino", "tensorrt", "onnxruntime") for c in backends()[n]().propose(case).candidates}
    assert {i for i, c in found.items() if c.lossless} == kept
    for candidate in found.values():
        narrowing = bool(arithmetic) and candidate.backend != "onnxruntime"
        assert bool(candidate.narrows) == narrowing
