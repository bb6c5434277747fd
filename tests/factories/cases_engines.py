"""Further cases: what engines get wrong though every number looks right. Importing this registers them."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from tests.factories.architectures import GraphBuilder
from tests.factories.cases import I64, Array, F, Feeds, ModelCase, case, finished, floats

_WIDTH, _HEADS = 192, 6
_OPENVINO = {"target": {"backends": ["openvino"]}, "precisions": ["fp32"]}  # what is tempted to ship, in little time


def _encoder(net: GraphBuilder, x: str, layers: int, dtype: type = np.float32) -> str:
    """Encoder layers without a mask, and the mean over the tokens."""

    def weight(name: str, *shape: int) -> str:
        std = 0.02 if len(shape) == 1 else 1.4 / shape[0] ** 0.5
        return net.constant(name, net.rng.normal(0, std, shape), dtype)

    def normed(x: str, name: str) -> str:
        ones = net.constant(f"{name}.gain", np.ones(_WIDTH), dtype)
        return net.add("LayerNormalization", x, ones, weight(f"{name}.bias", _WIDTH), axis=-1)

    for i in range(layers):
        heads = net.ints(0, 0, _HEADS, _WIDTH // _HEADS)
        parts = []
        for p in "qkv":
            dense = net.add("MatMul", x, weight(f"{i}.{p}", _WIDTH, _WIDTH))
            split = net.add("Reshape", net.add("Add", dense, weight(f"{i}.{p}.b", _WIDTH)), heads)
            parts.append(net.add("Transpose", split, perm=[0, 2, 3, 1] if p == "k" else [0, 2, 1, 3]))
        root = net.constant("root", (_WIDTH // _HEADS) ** 0.5, dtype)
        scores = net.add("Div", net.add("MatMul", *parts[:2]), root)
        found = net.add("MatMul", net.add("Softmax", scores, axis=-1), parts[2])
        merged = net.add("Reshape", net.add("Transpose", found, perm=[0, 2, 1, 3]), net.ints(0, 0, _WIDTH))
        x = normed(net.add("Add", x, net.add("MatMul", merged, weight(f"{i}.o", _WIDTH, _WIDTH))), f"{i}.n1")
        wide = net.add("Relu", net.add("MatMul", x, weight(f"{i}.up", _WIDTH, 4 * _WIDTH)))
        x = normed(net.add("Add", x, net.add("MatMul", wide, weight(f"{i}.down", 4 * _WIDTH, _WIDTH))), f"{i}.n2")
    return net.add("MatMul", net.add("ReduceMean", x, axes=[1], keepdims=0), weight("head", _WIDTH, 6))


@case
def first_length_1(name: str) -> ModelCase:
    """Attention without a mask over any length: OpenVINO's fused kernels answer nonsense once the first call had 1."""
    net = GraphBuilder(20)
    logits = _encoder(net, net.add("Gather", net.weight("table", (150, _WIDTH), 1.0), "input_ids"), 2)
    net.add("Identity", logits, outputs=["logits"])
    model = finished(net, [("input_ids", I64, ["batch", "seq"])], [("logits", F, ["batch", 6])])

    def make(batch: int, length: int) -> Feeds:
        return {"input_ids": np.random.default_rng(batch * 1000 + length).integers(0, 150, (batch, length))}

    held = {f"b{b}t{t}": make(b, t) for b, t in ((1, 1), (1, 40), (4, 20), (2, 8), (3, 100))}
    return ModelCase(name, model, held, make(160, 20), _OPENVINO)


@case
def cross_batch(name: str) -> ModelCase:
    """The first axis is a set, not a batch: all of it is folded into one sequence, with one answer for the set."""
    net = GraphBuilder(21)
    whole = net.add("Reshape", "points", net.constant("whole", (1, -1, 8), np.int64))
    q, k, v = (net.add("MatMul", whole, net.weight(p, (8, 16), 0.5)) for p in "qkv")
    scores = net.add("Softmax", net.add("MatMul", q, net.add("Transpose", k, perm=[0, 2, 1])), axis=-1)
    seen = net.add("ReduceMax", net.add("MatMul", scores, v), axes=[1], keepdims=0)
    net.add("MatMul", seen, net.weight("head", (16, 5)), outputs=["logits"])
    model = finished(net, [("points", F, ["n", 8])], [("logits", F, [1, 5])])

    def make(n: int) -> Feeds:
        return {"points": floats(np.random.default_rng(n), n, 8)}

    return ModelCase(name, model, {f"b{n}": make(n) for n in (1, 3, 7, 40)}, make(200), _OPENVINO)


@case
def double_without_data(name: str) -> ModelCase:
    """float64 timestamps of 1.7e9 s, of which float32 keeps 128 s; no data, and large enough that float32 is faster."""
    net, size = GraphBuilder(22), 320

    def double(label: str, values: object) -> str:
        return net.constant(label, values, np.float64)

    day = double("day", 86400.0)
    time = net.add("Sub", "seconds", net.add("Mul", net.add("Floor", net.add("Div", "seconds", day)), day))
    parts = [
        net.add("Sin", net.add("Mul", time, double("per_day", 2 * np.pi / 86400))),
        net.add("Cos", net.add("Mul", time, double("per_minute", 2 * np.pi / 60))),
    ]
    x = net.add("Concat", *parts, axis=1)
    for i, before in enumerate((2, size, size, size)):
        weights = double(f"w{i}", net.rng.normal(0, (2 / before) ** 0.5, (before, size)))
        x = net.add("Relu", net.add("MatMul", x, weights))
    net.add("MatMul", x, double("head", net.rng.normal(0, size**-0.5, (size, 2))), outputs=["y"])
    kind = TensorProto.DOUBLE
    model = finished(net, [("seconds", kind, ["n", 1])], [("y", kind, ["n", 2])])

    def make(rng: np.random.Generator, n: int) -> Feeds:
        return {"seconds": rng.integers(1_700_000_000, 1_703_000_000, (n, 1)).astype(np.float64)}

    return ModelCase(name, model, {f"b{n}": make(np.random.default_rng(n), n) for n in (1, 3, 7)}, spec=_OPENVINO)


@case
def large_ids_without_data(name: str) -> ModelCase:
    """64-bit ids taken modulo 149 before a float16 transformer; no data."""
    net = GraphBuilder(23)
    constants = {"by": 31, "shift": 7, "rows": 149}
    a, b, c = (net.constant(label, number, np.int64) for label, number in constants.items())
    row = net.add("Mod", net.add("Add", net.add("Mul", "input_ids", a), b), c)
    table = net.constant("table", net.rng.normal(0, 1, (150, _WIDTH)), np.float16)
    net.add("Identity", _encoder(net, net.add("Gather", table, row), 2, np.float16), outputs=["logits"])
    half = TensorProto.FLOAT16
    model = finished(net, [("input_ids", I64, ["batch", "seq"])], [("logits", half, ["batch", 6])])

    def make(most: int, batch: int = 2, length: int = 20) -> Feeds:
        ids: Array = np.random.default_rng(most % 97).integers(0, most, (batch, length))
        return {"input_ids": ids}

    held = {"small": make(10), "million": make(10**6), "billion": make(2 * 10**9), "2_40": make(1 << 40)}
    return ModelCase(name, model, held | {"b1t1": make(10, 1, 1)}, spec=_OPENVINO)
