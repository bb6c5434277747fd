"""OpenVINO's fused attention against orders of calls: what the installed version of the plug-in gets wrong where the
first call has keys of length 1, the backend recognises and builds without (`workers.graph.ir.faults`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper

from tests.factories import onnx_models as models
from tests.factories.architectures import GraphBuilder
from workers.backends.openvino import OpenVinoBackend
from workers.graph.ir import faults
from workers.graph.ir import files as ir
from workers.graph.ir.library import compile_model, fuse_common, read_model
from workers.graph.nncf import quantize as nncf_quantize
from workers.hardware import describe
from workers.kernel import Reporter

F = TensorProto.FLOAT
HEADS, SIZE = 2, 8
WIDTH = HEADS * SIZE
ORDERS = (
    ((1, 1), (1, 2), (1, 16), (1, 40), (4, 40), (4, 1), (3, 64)),
    ((4, 1), (4, 16), (1, 16)),
    ((1, 2), (1, 16), (2, 1), (1, 64)),
)  # (batch, length) of one call after the other
Feeds = dict[str, Any]
Make = Callable[[np.random.Generator, int, int], Feeds]


class Quiet(Reporter):
    def progress(self, fraction: float, message: str = "") -> None: ...

    def note(self, message: str, **facts: Any) -> None: ...


def attention(kind: str) -> tuple[ModelProto, Make]:
    """One attention over [batch, length, 16], written as `kind` says."""
    net = GraphBuilder(3)
    inputs: list[tuple[str, list[Any]]] = [("x", ["batch", "length", WIDTH])]
    q, k, v = (net.linear("x", name, WIDTH, WIDTH) for name in "qkv")
    if kind != "one head":
        split = net.ints(0, -1, HEADS, SIZE)
        q, k, v = (net.add("Reshape", t, split) for t in (q, k, v))
        q, v = (net.add("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
        k = net.add("Transpose", k, perm=[0, 2, 3, 1])
    else:
        k = net.add("Transpose", k, perm=[0, 2, 1])
    if kind == "past":
        inputs += [("keys", ["batch", HEADS, SIZE, "past"]), ("values", ["batch", HEADS, "past", SIZE])]
        k, v = net.add("Concat", "keys", k, axis=3), net.add("Concat", "values", v, axis=2)
    scores = net.add("MatMul", q, k)
    scale = net.constant("scale", 0.35)
    if kind != "no scale":
        scores = net.add("Mul", scores, scale)
    if kind == "rounded":
        step, zero = net.constant("step", 0.02), net.constant("zero", 128, np.uint8)
        scores = net.add("DequantizeLinear", net.add("QuantizeLinear", scores, step, zero), step, zero)
    if kind == "mask":
        inputs.append(("mask", ["batch", "length"]))
        away = net.add("Sub", net.constant("one", 1.0), net.add("Unsqueeze", "mask", net.ints(1, 2)))
        scores = net.add("Add", scores, net.add("Mul", away, net.constant("low", -1e4)))
    if kind == "causal":
        table = net.constant("triangle", np.triu(np.full((64, 64), -1e4, np.float32), 1))
        length = net.add("Slice", net.add("Shape", "x"), net.ints(1), net.ints(2))
        ends = net.add("Concat", length, length, axis=0)
        scores = net.add("Add", scores, net.add("Slice", table, net.ints(0, 0), ends, net.ints(0, 1)))
    if kind == "bias of a head":
        scores = net.add("Add", scores, net.weight("bias", (1, HEADS, 1, 1)))
    if kind == "clipped":
        scores = net.add("Relu", scores)
    if kind == "folded heads":
        shape = net.add("Shape", scores)
        flat = net.add(
            "Reshape",
            scores,
            net.add("Concat", net.ints(-1), net.add("Slice", shape, net.ints(2), net.ints(4)), axis=0),
        )
        weights = net.add("Reshape", net.add("Softmax", flat, axis=-1), shape)
    elif kind == "spelled out":
        powers = net.add("Exp", net.add("Sub", scores, net.add("ReduceMax", scores, axes=[-1])))
        weights = net.add("Div", powers, net.add("ReduceSum", powers, net.ints(-1)))
    else:
        weights = net.add("Softmax", scores, axis=-1)
    found = net.add("MatMul", weights, v)
    if kind != "one head":
        found = net.add("Reshape", net.add("Transpose", found, perm=[0, 2, 1, 3]), net.ints(0, -1, WIDTH))
    net.linear(found, "out", WIDTH, WIDTH)
    net.nodes[-1].output[0] = "y"
    made = net.model([helper.make_tensor_value_info(n, F, s) for n, s in inputs], [models.value("y", None)])

    def feeds(rng: np.random.Generator, batch: int, length: int) -> Feeds:
        sizes = {"batch": batch, "length": 1 if kind == "past" else length, "past": length - 1}
        found = {n: rng.standard_normal([sizes.get(d, d) for d in s]).astype(np.float32) for n, s in inputs}
        return {n: np.ones_like(a) if n == "mask" else a for n, a in found.items()}

    return made, feeds


KINDS = (
    *("plain", "one head", "no scale", "past", "rounded", "clipped", "spelled out", "folded heads"),
    *("mask", "causal", "bias of a head"),
)


def worst(run: Callable[[Feeds], Any], wanted: Any, make: Make, order: tuple[tuple[int, int], ...]) -> float:
    """The largest relative error over the calls; infinite where one is not a number."""
    found = 0.0
    for seed, (batch, length) in enumerate(order):
        feeds = make(np.random.default_rng(seed), batch, length)
        expected, got = wanted.run(None, feeds)[0], run(feeds)
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        found = max(found, error if np.isfinite(error) else np.inf)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_order_of_calls_is_answered_right(kind: str, tmp_path: Path) -> None:
    model, make = attention(kind)
    wanted = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    backend = OpenVinoBackend()
    (tmp_path / "engine").mkdir()
    built = backend.build(models.folder(model, tmp_path / "model"), tmp_path / "engine", {}, Quiet())
    switched_off = built["runtime"].get("snippets") is False

    # By itself: where it answers wrong, the backend must have seen that it would.
    plain = 0.0
    for order in ORDERS:
        request = compile_model(read_model(tmp_path / "engine" / "model.xml"), {"INFERENCE_PRECISION_HINT": "f32"})
        request = request.create_infer_request()
        plain = max(plain, worst(lambda feeds, r=request: r.infer(feeds).to_tuple()[0], wanted, make, order))
    assert switched_off or plain < 1e-2

    limits = {"f32": 0.02 if kind == "rounded" else 1e-3}
    offered = backend.probe(describe())
    assert offered is not None
    if "bf16" in offered.precisions:
        limits["bf16"] = 0.1
    for precision, limit in limits.items():
        runtime = {**built["runtime"], "inference_precision": precision}
        for order in ORDERS:
            session = backend.load(tmp_path / "engine", runtime)
            assert worst(lambda feeds, s=session: s.run(feeds)["y"], wanted, make, order) < limit, (precision, order)
            session.close()


def test_only_what_is_at_risk_is_switched_off() -> None:
    """Masked attention, fixed lengths and networks without attention keep the plug-in's fused kernels."""

    def seen(model: ModelProto) -> bool:
        read = read_model(model.SerializeToString())
        fuse_common(read)
        return faults.first_call_decides(read)

    assert {k for k in KINDS if seen(attention(k)[0])} == set(KINDS) - {"mask", "causal", "bias of a head"}
    model, _ = attention("plain")
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (None, 32, None), strict=True):
        if size:
            dim.dim_value = size
    assert not seen(model)
    assert not seen(models.conv_net())
    assert not seen(models.mlp())


@pytest.mark.parametrize("kind", ["plain", "past"])
def test_calibration_does_not_depend_on_its_first_sample(kind: str, tmp_path: Path) -> None:
    """NNCF infers by itself: with a first sample of length 1 it saw ranges twenty times too wide."""
    model, make = attention(kind)
    samples = [make(np.random.default_rng(n), 1, n) for n in (1, 20, 40, 33, 17)]
    models.folder(model, tmp_path / "model")
    found = []
    for ordered in (samples, samples[::-1]):
        read, _, _ = ir.read_onnx(tmp_path / "model")
        quantized = nncf_quantize.quantize(
            read,
            lambda given=ordered: given,
            len(samples),
            preset="mixed",
            model_type=None,
            method="minmax",
            smooth_quant_alpha=None,
            fast_bias_correction=True,
            excluded=[],
            progress=lambda _: None,
        )
        ends = [
            [end.get_node().get_data().ravel() for end in node.input_values()[1:3]]
            for node in quantized.get_ordered_ops()
            if node.get_type_name() == "FakeQuantize" and node.input_value(1).get_node().get_type_name() == "Constant"
        ]
        found.append(np.concatenate([value for pair in ends for value in pair]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-2)
