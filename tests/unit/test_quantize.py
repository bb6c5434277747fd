"""quantize: which nodes become quantized in the produced graphs, calibration, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from app.domain.failures import FailureKind, StageFailure
from tests.factories import architectures
from workers import hardware
from workers.candidates import INT8_FLAGS
from workers.graph import int8, onnx_files
from workers.graph.calibrate import statistics as calibration
from workers.graph.onnx_graph import model_specs
from workers.graph.precision import floats
from workers.graph.prepare import prepare
from workers.kernel import Reporter, StageContext, StageResult, backends
from workers.stages.quantize import Quantize, QuantizeOptions
from workers.stages.simplify import Simplify, SimplifyOptions

DIMS = {"sequence": 12, "time": 6}


class Quiet(Reporter):
    def progress(self, fraction: float, message: str = "") -> None:
        assert 0 <= fraction <= 1

    def note(self, message: str, **facts: Any) -> None:
        pass


def dataset(model: ModelProto, samples: int = 32, seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for spec in model_specs(model)[0]:
        shape = [samples, *(d if isinstance(d, int) else DIMS[d] for d in spec.shape[1:])]
        if spec.name == "input_ids":
            arrays[spec.name] = rng.integers(0, 64, shape)
        elif spec.dtype == "int64":
            arrays[spec.name] = np.full(shape, int("mask" in spec.name), np.int64)
        else:
            arrays[spec.name] = rng.normal(size=shape).astype(np.float32)
    return arrays


# Seven bits where sums of products of eight saturate, as jobs have it: what is compared is the engine's answer.
SEVEN_BITS = not INT8_FLAGS & set(hardware.describe()["isa"])


class Bench:
    """A model in a folder, its simplified form, and the stage run on it."""

    def __init__(self, tmp_path: Path, model: ModelProto, *, simplified: bool = True, fusions: bool = False) -> None:
        self.root = tmp_path
        self.model = model
        self.source = tmp_path / "source"
        self.source.mkdir()
        onnx.save(model, self.source / "model.onnx")
        if simplified:
            workspace = tmp_path / "simplify"
            workspace.mkdir()
            ctx = StageContext({"model": self.source}, workspace, tmp_path / "simplified", Quiet(), {})
            Simplify().run(ctx, SimplifyOptions(fusions=fusions))
            self.source = tmp_path / "simplified" / "model"
        self.data = dataset(model)
        self.calibration = tmp_path / "calibration"
        self.calibration.mkdir()
        np.savez(self.calibration / "data.npz", **self.data)
        self.runs = 0
        self.out = tmp_path

    def run(self, recipe: str, *, ranges: Path | None = None, data: bool = True, **options: Any) -> StageResult:
        self.runs += 1
        workspace = self.root / f"workspace{self.runs}"
        workspace.mkdir()
        self.out = self.root / f"out{self.runs}"
        inputs = {"model": self.source}
        if ranges is not None:
            inputs["ranges"] = ranges
        elif recipe == "static_int8" and data:
            inputs["calibration"] = self.calibration
        ctx = StageContext(inputs, workspace, self.out, Quiet(), {})
        options.setdefault("reduce_range", SEVEN_BITS)
        return Quantize().run(ctx, QuantizeOptions(recipe=recipe, **options))  # type: ignore[arg-type]  # also bad ones

    def made(self) -> ModelProto:
        model = onnx.load(self.out / "model" / "model.onnx")
        onnx.checker.check_model(model)
        assert model_specs(model)[0] == model_specs(self.model)[0]
        assert list(model.graph.output) == list(self.model.graph.output)
        return model

    def error(self) -> float:
        """Largest difference of any output from the source's, relative to its largest magnitude."""
        backend = backends()["onnxruntime"]()
        feeds = self.data
        expected = backend.load(self.source, {}).run(feeds)
        actual = backend.load(self.out / "model", {}).run(feeds)
        return max(float(np.abs(actual[k] - v).max() / np.abs(v).max()) for k, v in expected.items())


def ops(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def initializers(model: ModelProto) -> dict[str, TensorProto]:
    return {i.name: i for i in model.graph.initializer}


def fails(code: str, kind: FailureKind = FailureKind.MODEL) -> Any:
    return pytest.raises(StageFailure, check=lambda e: e.code == code and e.kind == kind and bool(e.remedy))


# Dynamic int8


def test_dynamic_int8_quantizes_matrix_products_only(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.bert())
    result = bench.run("dynamic_int8")
    made = bench.made()
    # 2 layers x (4 attention + 2 feed-forward) projections and the head; products of activations stay in float32
    assert result.data["qdq_by_op"] == {"MatMulInteger": 13}
    assert result.data["quantized_nodes"] == 13
    assert ops(made)["MatMul"] == 4
    assert ops(made)["Gather"] == 4
    weights = {n.input[1] for n in made.graph.node if n.op_type == "MatMulInteger"}
    assert {initializers(made)[w].data_type for w in weights} == {TensorProto.INT8}
    scales = [initializers(made)[w.removesuffix("_quantized") + "_scale"].dims for w in weights]
    assert all(len(dims) == 1 and dims[0] > 1 for dims in scales)  # one per channel
    assert result.data["size_bytes"] < 0.7 * result.data["size_bytes_before"]
    assert bench.error() < 0.05


def test_dynamic_int8_leaves_convolutions_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.residual_cnn())
    result = bench.run("dynamic_int8", op_types=["Conv", "MatMul", "Gemm"])
    assert ops(bench.made())["ConvInteger"] == 0
    assert ops(bench.made())["Conv"] == 5
    assert result.data["qdq_by_op"] == {"MatMulInteger": 1}
    with fails("nothing_to_quantize"):
        bench.run("dynamic_int8", op_types=["Conv"])


def test_dynamic_int8_of_a_recurrent_layer(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.lstm())
    assert bench.run("dynamic_int8").data["qdq_by_op"] == {"DynamicQuantizeLSTM": 1, "MatMulInteger": 1}
    assert bench.error() < 0.05


def test_dynamic_int8_of_fused_attention(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.bert(), fusions=True)
    assert bench.run("dynamic_int8").data["qdq_by_op"] == {"MatMulInteger": 7, "QAttention": 2}
    assert bench.error() < 0.05


def test_excluded_nodes_stay(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.bert())
    (head,) = [n.name for n in onnx.load(bench.source / "model.onnx").graph.node if n.op_type == "Gemm"]
    result = bench.run("dynamic_int8", exclude_nodes=[head])
    assert result.data["qdq_by_op"] == {"MatMulInteger": 12}
    result = bench.run("static_int8", exclude_nodes=[head])
    assert "Gemm" not in result.data["qdq_by_op"]
    with fails("unknown_node", FailureKind.REQUEST):
        bench.run("dynamic_int8", exclude_nodes=["nobody"])


# Static int8


def test_static_int8_of_a_cnn(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.residual_cnn())
    result = bench.run("static_int8")
    made = bench.made()
    counts = result.data["qdq_by_op"]
    assert counts == {"Add": 2, "Conv": 5, "Flatten": 1, "Gemm": 1, "GlobalAveragePool": 1, "MaxPool": 1}
    assert ops(made)["Relu"] == 0  # an unsigned range from zero up is the ReLU
    producers = {o: n for n in made.graph.node for o in n.output}
    for conv in (n for n in made.graph.node if n.op_type == "Conv"):
        activation, weight, bias = (producers[name] for name in conv.input)
        assert activation.op_type == weight.op_type == bias.op_type == "DequantizeLinear"
        assert initializers(made)[activation.input[2]].data_type == TensorProto.UINT8
        quantized = initializers(made)[weight.input[0]]
        assert quantized.data_type == TensorProto.INT8
        assert helper.get_node_attr_value(weight, "axis") == 0
        assert list(initializers(made)[weight.input[1]].dims) == [quantized.dims[0]]
        assert initializers(made)[bias.input[0]].data_type == TensorProto.INT32
    assert result.data["calibration"]["samples"] == 32
    assert bench.error() < 0.05


def test_static_int8_of_a_transformer_touches_only_matrix_products(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.bert())
    result = bench.run("static_int8")
    assert result.data["qdq_by_op"] == {"Gemm": 1, "MatMul": 16}
    made = bench.made()
    producers = {o: n.op_type for n in made.graph.node for o in n.output}
    rounded = {n.input[0] for n in made.graph.node if n.op_type == "QuantizeLinear"}
    for node in made.graph.node:
        if node.op_type in ("Add", "Softmax", "Div", "Mul", "Sub", "ReduceMean", "Erf", "Gather"):
            assert "DequantizeLinear" not in {producers.get(name) for name in node.input}
        if node.op_type in ("MatMul", "Gemm"):
            assert {producers.get(name) for name in node.input} == {"DequantizeLinear"}
            assert node.output[0] not in rounded  # sums and norms read the product before any rounding
    assert bench.error() < 0.1


def test_depthwise_convolutions_per_channel(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.depthwise_cnn())
    assert bench.run("static_int8").data["qdq_by_op"]["Conv"] == 7
    assert bench.error() < 0.06


def test_signed_symmetric_activations_and_per_tensor_weights(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.residual_cnn())
    bench.run("static_int8", activations="int8", per_channel=False)
    made = bench.made()
    zero_points = [
        initializers(made)[n.input[2]] for n in made.graph.node if n.op_type == "QuantizeLinear" and len(n.input) > 2
    ]
    assert {z.data_type for z in zero_points} == {TensorProto.INT8}
    assert all(not numpy_helper.to_array(z).any() for z in zero_points)
    scales = [initializers(made)[n.input[1]] for n in made.graph.node if n.op_type == "DequantizeLinear"]
    assert all(int(np.prod(s.dims)) == 1 for s in scales)


def test_reduced_range_keeps_weights_in_seven_bits(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.residual_cnn())
    bench.run("static_int8", reduce_range=True)
    weights = [numpy_helper.to_array(i) for i in bench.made().graph.initializer if i.data_type == TensorProto.INT8]
    assert max(int(np.abs(w.astype(int)).max()) for w in weights if w.ndim == 4) <= 64


def test_static_int8_of_a_fused_gpt2(tmp_path: Path) -> None:
    """Shape inference knows no types behind the contrib ops; the runtime does."""
    bench = Bench(tmp_path, architectures.gpt2(), fusions=True)
    assert bench.run("static_int8").data["qdq_by_op"] == {"Gemm": 2, "MatMul": 5}
    assert bench.error() < 0.1


def test_infinite_masks_keep_their_nodes_in_float(tmp_path: Path) -> None:
    model = architectures.residual_cnn()
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.full(10, -np.inf, np.float32), "infinite"))
    graph.node.append(helper.make_node("Add", ["logits", "infinite"], ["masked"], name="mask"))
    graph.output.append(helper.make_tensor_value_info("masked", TensorProto.FLOAT, ["batch", 10]))
    bench = Bench(tmp_path, model)
    result = bench.run("static_int8")
    assert result.data["excluded_nodes"] == ["mask"]
    assert result.data["qdq_by_op"]["Conv"] == 5
    assert result.data["trial_run"] == {"batch": 1, "finite": False}


# Calibration


def test_the_ranges_are_an_artifact_that_replaces_the_data(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.residual_cnn())
    first = bench.run("static_int8", method="percentile", percentile=99.0)
    model, ranges = (bench.out / "model" / "model.onnx").read_bytes(), bench.out / "ranges"
    written = json.loads((ranges / "ranges.json").read_text())
    assert (written["method"], written["percentile"], written["samples"]) == ("percentile", 99.0, 32)
    assert all(low <= 0 <= high for low, high in written["tensors"].values())
    second = bench.run("static_int8", ranges=ranges)
    assert (bench.out / "model" / "model.onnx").read_bytes() == model
    assert (bench.out / "ranges" / "ranges.json").read_bytes() == (ranges / "ranges.json").read_bytes()
    assert second.data["calibration"] == first.data["calibration"] | {"reused": True}


def test_ranges_of_another_graph_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    other = Bench(tmp_path / "a", architectures.depthwise_cnn())
    other.run("static_int8")
    bench = Bench(tmp_path, architectures.residual_cnn())
    with fails("ranges_mismatch", FailureKind.DATA) as caught:
        bench.run("static_int8", ranges=other.out / "ranges")
    assert caught.value.tensor


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "tensors": {"x": [0, NaN]}}', "\xff"])
def test_a_broken_ranges_file_is_refused(text: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.lstm())
    folder = tmp_path / "ranges"
    folder.mkdir()
    (folder / "ranges.json").write_bytes(text.encode("latin-1"))
    with fails("ranges_invalid", FailureKind.DATA):
        bench.run("static_int8", ranges=folder)


def test_min_max_is_exact_and_independent_of_batches(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    model = architectures.residual_cnn()
    onnx.save(model, folder / "model.onnx")
    prepared = prepare(folder / "model.onnx", folder)
    values = dataset(model, 13)["input"]
    found = calibration.calibrate(
        prepared,
        ["input", "logits"],
        lambda size: ({"input": values[i : i + size]} for i in range(0, 13, size)),
        method="minmax",
        percentile=99.99,
        symmetric=False,
    )
    logits = backends()["onnxruntime"]().load(folder, {}).run({"input": values})["logits"]
    assert found.samples == 13
    assert found.tensors["input"] == (float(values.min()), float(values.max()))
    np.testing.assert_allclose(found.tensors["logits"], (min(0, logits.min()), max(0, logits.max())), rtol=1e-5)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile", "mse"])
def test_calibration_holds_one_batch_at_a_time(method: Any, tmp_path: Path) -> None:
    model = architectures.residual_cnn()
    onnx.save(model, tmp_path / "model.onnx")
    prepared = prepare(tmp_path / "model.onnx", tmp_path)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most, passes = 0, 0

    class Tracked(np.ndarray[Any, Any]):
        pass

    def batches(size: int) -> Iterator[dict[str, Any]]:
        nonlocal most, passes
        passes += 1
        for seed in range(6):
            array = np.random.default_rng(seed).normal(size=(size, 3, 16, 16)).astype(np.float32).view(Tracked)
            alive.add(_Handle(array))
            most = max(most, sum(h.array() is not None for h in alive))
            yield {"input": array}

    class _Handle:
        def __init__(self, array: Any) -> None:
            self.array = weakref.ref(array)
            handles.append(self)

    handles: list[Any] = []
    tensors = ["input", "Conv_1_out", "logits"]
    found = calibration.calibrate(prepared, tensors, batches, method=method, percentile=99.9, symmetric=False)
    assert set(found.tensors) == set(tensors)
    assert passes == (1 if method == "minmax" else 2)
    assert most <= 2  # the one in use, and the one being made


def test_a_fixed_batch_takes_any_number_of_samples(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.residual_cnn(batch=5))
    result = bench.run("static_int8", method="entropy", max_samples=12)
    assert result.data["calibration"]["samples"] == 12
    assert result.data["trial_run"] == {"batch": 5, "finite": True}


def test_percentile_cuts_both_tails() -> None:
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    values[:20] = 50.0  # outliers
    counts = calibration.histogram(values, 50.0)
    assert counts.sum() == values.size
    low, high = calibration.percentile_range(counts, 50.0, 99.0)
    np.testing.assert_allclose((low, high), (-2.576, 2.576), atol=0.06)
    assert calibration.percentile_range(counts, 50.0, 100.0)[1] == 50.0


def test_entropy_clips_outliers_and_keeps_even_distributions() -> None:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=400_000).astype(np.float32)
    normal[:4] = 40.0
    clipped = calibration.entropy_threshold(calibration.histogram(normal, 40.0), 40.0, 128)
    assert 2.5 < clipped < 8
    even = rng.uniform(-1, 1, 100_000).astype(np.float32)
    assert calibration.entropy_threshold(calibration.histogram(even, 1.0), 1.0, 128) > 0.95
    constant = calibration.histogram(np.zeros(5, np.float32), 0.0)
    assert calibration.entropy_threshold(constant, 0.0, 128) == 0.0


def test_squared_error_clips_outliers_at_both_ends() -> None:
    """Of all clipped ranges, the one found quantizes these very values best (up to the histogram's resolution)."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 100_000), [30.0, -20.0]]).astype(np.float32)
    found = calibration.mse_range(calibration.histogram(values, 30.0), 30.0, (-20.0, 30.0), symmetric=False)

    def error(low: float, high: float) -> float:
        scale = (high - low) / 255
        zero = round(-low / scale)
        rounded = (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale
        return float(((rounded - values) ** 2).mean())

    assert -20 < found[0] < -2
    assert 2 < found[1] < 30
    assert error(*found) < error(-20, 30)
    assert error(*found) < 1.1 * min(error(-a, b) for a in range(2, 21, 2) for b in range(2, 31, 2))
    low, high = calibration.mse_range(calibration.histogram(values, 30.0), 30.0, (-20.0, 30.0), symmetric=True)
    assert low == -high
    even = rng.uniform(0, 1, 100_000).astype(np.float32)
    assert calibration.mse_range(calibration.histogram(even, 1.0), 1.0, (0.0, 1.0), symmetric=False) == (0.0, 1.0)
    nothing = calibration.histogram(np.zeros(5, np.float32), 0.0)
    assert calibration.mse_range(nothing, 0.0, (0.0, 0.0), symmetric=False) == (0.0, 0.0)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile", "mse"])
def test_a_trained_network_keeps_its_accuracy(method: str, tmp_path: Path) -> None:
    model, images, labels = _digits()
    bench = Bench(tmp_path, model, simplified=False)
    train = slice(0, 400)
    np.savez(bench.calibration / "data.npz", image=images[train], labels=labels[train])
    bench.run("static_int8", method=method, max_samples=256)
    held_out = {"image": images[1000:]}
    backend = backends()["onnxruntime"]()
    scores = [
        float((backend.load(f, {}).run(held_out)["logits"].argmax(1) == labels[1000:]).mean())
        for f in (bench.source, bench.out / "model")
    ]
    assert scores[0] > 0.9
    assert scores[1] > scores[0] - 0.015


def _digits() -> tuple[ModelProto, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A convolution with random filters under a regression that is trained on scikit-learn's digits."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import RidgeClassifier

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    builder = architectures.GraphBuilder(0)
    y = builder.add("Conv", "image", builder.weight("conv.weight", (12, 1, 3, 3)), kernel_shape=[3, 3], pads=[1] * 4)
    y = builder.add("Flatten", builder.add("MaxPool", builder.add("Relu", y), kernel_shape=[2, 2], strides=[2, 2]))
    value = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])
    head = helper.make_tensor_value_info(y, TensorProto.FLOAT, ["batch", 12 * 16])
    features = _run_proto(builder.model([value], [head]), {"image": images})
    classifier = RidgeClassifier(alpha=1.0).fit(features[:1000], digits.target[:1000])
    weight = builder.constant("fc.weight", classifier.coef_.T)
    builder.add("Gemm", y, weight, builder.constant("fc.bias", classifier.intercept_), outputs=["logits"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])
    return builder.model([value], [logits]), images, digits.target


def _run_proto(model: ModelProto, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (values,) = session.run(None, feeds)
    return np.asarray(values)


# What is refused


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.residual_cnn())
    bench.run("static_int8")
    bench.source = bench.out / "model"
    for recipe in ("static_int8", "dynamic_int8"):
        with fails("already_quantized"):
            bench.run(recipe)


def test_a_half_precision_model_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, floats.to_low(architectures.residual_cnn(), "fp16").model, simplified=False)
    with fails("not_float32"):
        bench.run("static_int8")


def test_nothing_to_quantize(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    bench = Bench(tmp_path, model, simplified=False)
    for recipe in ("static_int8", "dynamic_int8"):
        with fails("nothing_to_quantize"):
            bench.run(recipe)


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=8)
    with fails("opset_too_old"):
        Bench(tmp_path, model, simplified=False).run("dynamic_int8")


def test_static_int8_needs_data(tmp_path: Path) -> None:
    with fails("calibration_data_missing", FailureKind.REQUEST):
        Bench(tmp_path, architectures.lstm()).run("static_int8", data=False)


def test_a_wrong_data_set_is_the_datas_failure(tmp_path: Path) -> None:
    bench = Bench(tmp_path, architectures.lstm())
    np.savez(bench.calibration / "data.npz", wrong=np.zeros((4, 3), np.float32))
    with pytest.raises(StageFailure, check=lambda e: e.kind == FailureKind.DATA):
        bench.run("static_int8")


def test_a_model_without_quantized_nodes_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(source: Path, out: Path, **options: object) -> None:
        out.write_bytes(source.read_bytes())

    monkeypatch.setattr(int8, "static_int8", nothing)
    with fails("not_quantized"):
        Bench(tmp_path, architectures.residual_cnn()).run("static_int8")


def test_a_result_that_does_not_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = int8.dynamic_int8

    def broken(source: Path, out: Path, **options: Any) -> None:
        genuine(source, out, **options)
        model = onnx.load(out)
        node = next(n for n in model.graph.node if n.op_type == "MatMulInteger")
        weight = next(i for i in model.graph.initializer if i.name == node.input[1])
        weight.CopyFrom(numpy_helper.from_array(np.zeros((3, 5), np.int8), weight.name))
        onnx.save(model, out)

    monkeypatch.setattr(int8, "dynamic_int8", broken)
    with fails("quantized_model_fails"):
        Bench(tmp_path, architectures.bert()).run("dynamic_int8")


def test_what_the_quantizer_raises_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(source: Path, out: Path, **options: object) -> None:
        raise KeyError("tensor")

    monkeypatch.setattr(int8, "dynamic_int8", crash)
    with fails("quantizer_failed"):
        Bench(tmp_path, architectures.lstm()).run("dynamic_int8")


# Files


@pytest.mark.parametrize("recipe", ["dynamic_int8", "static_int8"])
def test_large_models_go_through_external_data(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, architectures.bert())
    monkeypatch.setattr(onnx_files, "INLINE_LIMIT_BYTES", 20_000)
    bench.run(recipe)
    assert sorted(p.name for p in (bench.out / "model").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert bench.error() < 0.1


def test_weights_listed_as_inputs_do_not_become_inputs(tmp_path: Path) -> None:
    model = architectures.lstm()
    plain = architectures.lstm()
    model.graph.input.extend(
        helper.make_tensor_value_info(i.name, i.data_type, list(i.dims)) for i in model.graph.initializer
    )
    bench = Bench(tmp_path, model, simplified=False)
    bench.model = plain
    for recipe in ("dynamic_int8", "static_int8"):
        bench.run(recipe)
        assert [i.name for i in bench.made().graph.input] == ["sequence"]


def test_constant_nodes_count_as_weights(tmp_path: Path) -> None:
    model = architectures.lstm()
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    for tensor in reversed(tensors):
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    bench = Bench(tmp_path, model, simplified=False)
    assert bench.run("dynamic_int8").data["qdq_by_op"] == {"DynamicQuantizeLSTM": 1, "MatMulInteger": 1}


_DIGEST_SCRIPT = """
import sys
from pathlib import Path
from tests.factories import architectures
from tests.unit.test_quantize import Bench, digest_of_runs
print(digest_of_runs(Path(sys.argv[1])))
"""


def digest_of_runs(root: Path) -> str:
    sha = hashlib.sha256()
    bench = Bench(root, architectures.residual_cnn())
    for options in ({"recipe": "static_int8", "method": "entropy"}, {"recipe": "dynamic_int8"}):
        bench.run(**options)
        for file in sorted(bench.out.rglob("*.*")):
            sha.update(file.read_bytes())
    return sha.hexdigest()


def test_the_same_input_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    digests = set()
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        child = subprocess.run(
            [sys.executable, "-c", _DIGEST_SCRIPT, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(child.stdout.strip().splitlines()[-1])
    assert len(digests) == 1
