"""The validate stage on real models and data sets: figures, and a gate that fails closed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.domain.failures import FailureKind, StageFailure
from workers.candidates import Candidate, Case, Proposal
from workers.hardware import describe
from workers.kernel import Backend, BackendInfo, Reporter, Session, StageContext, backends
from workers.measure.pieces import SYNTHETIC_SAMPLES, folder_digest
from workers.stages.validate import Validate, ValidateOptions

CLASSES = 4


class AlteredSession(Session):
    """A real session whose outputs are altered: `fault` names how, for samples with x[0] above `above`."""

    def __init__(self, inner: Session, runtime: Mapping[str, Any]) -> None:
        self._inner, self._runtime = inner, runtime
        self.inputs, self.outputs = inner.inputs, inner.outputs

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        out = self._inner.run(feeds)
        y, rows = out["y"], feeds["x"][:, 0] > self._runtime.get("above", -1e9)
        match self._runtime["fault"]:
            case "nan" | "inf" as word:
                y[rows] = float(word)
            case "roll":
                y[rows] = np.roll(y[rows], 1, axis=-1)
            case "missing":
                del out["y"]
            case "shape":
                out["y"] = y[:, :2]
            case "fewer":
                out["y"] = y[: max(1, len(y) - 1)] if rows.any() else y
            case "dtype":
                out["y"] = y.astype(np.float64)
            case "fails":
                raise StageFailure("inference_failed", "it does not run")
        return out


class AlteredBackend(Backend):
    name: ClassVar[str] = "test-altered"
    engine_format: ClassVar[str] = "onnx"

    def propose(self, case: Case) -> Proposal:
        return Proposal()

    def variants(self, case: Case, candidate: Candidate) -> tuple[Candidate, ...]:
        return ()

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:
        return dict(runtime)

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        return None  # no worker offers it

    def build(self, model: Path, out: Path, options: Mapping[str, Any], reporter: Reporter) -> dict[str, Any]:
        raise NotImplementedError

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        return AlteredSession(backends()["onnxruntime"]().load(engine, {}), runtime)

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        return ""


class Quiet(Reporter):
    def progress(self, fraction: float, message: str = "") -> None:
        assert 0 <= fraction <= 1

    def note(self, message: str, **facts: Any) -> None:
        assert message


def linear(folder: Path, *, scale: float = 1.0, batch: int | str = "batch", reshape: int = 0) -> Path:
    """y = x[:, :4] · scale: the class is where x is largest."""
    weight = numpy_helper.from_array((np.eye(6, CLASSES) * scale).astype(np.float32), "w")
    nodes, weights, last = [helper.make_node("MatMul", ["x", "w"], ["h"])], [weight], "h"
    if reshape:
        weights.append(numpy_helper.from_array(np.array([reshape, CLASSES], np.int64), "s"))
        nodes.append(helper.make_node("Reshape", ["h", "s"], ["r"]))
        last = "r"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, CLASSES])],
        weights,
    )
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    onnx.save(model, folder / "model.onnx")
    return folder


def dataset(folder: Path, n: int = 100, **extra: Any) -> Path:
    folder.mkdir()
    x = np.random.default_rng(1).standard_normal((n, 6)).astype(np.float32)
    x[:, 0] = np.arange(n) / n  # which samples a fault strikes
    arrays = {"x": x, "labels": x[:, :CLASSES].argmax(axis=1), **extra}
    np.savez(folder / "d.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(
        fault: str | None = None,
        *,
        above: float = -1e9,
        model: Path | None = None,
        engine: Path | None = None,
        inputs: Mapping[str, Path] | None = None,
        deadline: float | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        model = model or linear(tmp_path / "model")
        given: dict[str, Any] = {"backend": "onnxruntime"}
        if fault is not None:
            given = {"backend": "test-altered", "runtime": {"fault": fault, "above": above}}
        ctx = StageContext(
            {"model": model, "engine": engine or model, **(inputs or {})},
            tmp_path,
            tmp_path / "out",
            Quiet(),
            describe(),
            deadline,
        )
        data = dict(Validate().run(ctx, ValidateOptions(**{**given, **options})).data)
        json.dumps(data, allow_nan=False)
        return data

    return run


def test_the_same_engine_loses_nothing(judged: Callable[..., Any], tmp_path: Path) -> None:
    data = judged(inputs={"data": dataset(tmp_path / "data")})
    assert (data["metric"], data["kind"], data["source"], data["output"]) == ("top1", "labels", "dataset", "y")
    assert (data["baseline_value"], data["value"], data["loss_percent"]) == (1.0, 1.0, 0.0)
    assert (data["samples"], data["distinct"], data["enough_samples_for"]) == (100, 100, 3.0)
    assert data["loss_ci"] == pytest.approx([-3.62, 3.62], abs=0.01)
    assert (data["bound_percent"], data["confidence"]) == (pytest.approx(2.95, abs=0.01), 0.95)
    assert data["outputs"]["y"]["max_abs_diff"] == 0
    assert data["broken"] is None
    assert data["engine_digest"] == folder_digest(tmp_path / "model")
    assert len(data["samples_digest"]) == 64


def test_a_worse_engine_shows_its_loss(judged: Callable[..., Any], tmp_path: Path) -> None:
    data = judged("roll", above=0.895, inputs={"data": dataset(tmp_path / "data")})  # the last 10 of 100
    assert data["loss_percent"] == 10
    assert 0 < data["loss_ci"][0] < 10 < data["loss_ci"][1]
    assert data["outputs"]["y"]["agreement"] == 0.9


def test_without_data_the_original_is_the_truth(judged: Callable[..., Any], tmp_path: Path) -> None:
    data = judged()
    assert (data["metric"], data["kind"], data["source"]) == ("agreement", "synthetic", "synthetic")
    assert data["samples"] == SYNTHETIC_SAMPLES >= 16
    assert data["loss_percent"] == 0
    assert data["samples_digest"] is None
    half = judged(model=tmp_path / "model", engine=linear(tmp_path / "half", scale=0.5), metric="normalized_error")
    assert half["loss_percent"] == pytest.approx(50)
    assert half["value"] == pytest.approx(0.5)
    assert judged("roll", model=tmp_path / "model")["loss_percent"] > 50


def test_references_judge_where_there_are_no_labels(judged: Callable[..., Any], tmp_path: Path) -> None:
    y = np.load(dataset(tmp_path / "plain") / "d.npz")["x"][:, :CLASSES]
    folder = dataset(tmp_path / "data", labels=None, y=y)
    data = judged("roll", above=0.895, inputs={"data": folder}, metric="top1")
    assert (data["metric"], data["kind"], data["loss_percent"]) == ("top1", "references", 10)
    data = judged("roll", above=0.895, model=tmp_path / "model", inputs={"data": folder})
    assert (data["metric"], data["kind"]) == ("normalized_error", "references")  # `y` may be scores, or numbers
    assert data["loss_percent"] > 10
    data = judged(model=tmp_path / "model", inputs={"data": folder}, metric="normalized_error")
    assert (data["kind"], data["baseline_value"], data["loss_percent"]) == ("references", 0, 0)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("nan", "output_nan"),
        ("inf", "output_inf"),
        ("missing", "output_missing"),
        ("shape", "wrong_shape"),
        ("dtype", "wrong_dtype"),
        ("fails", "inference_failed"),
    ],
)
def test_the_gate_fails_closed(judged: Callable[..., Any], tmp_path: Path, fault: str, code: str) -> None:
    data = judged(fault, above=0.985, inputs={"data": dataset(tmp_path / "data")})  # the last sample only
    assert data["broken"]["code"] == code
    assert data["loss_percent"] is None
    assert data["value"] is None
    if fault in ("nan", "inf"):
        assert "sample 99" in data["broken"]["detail"]


def test_an_engine_that_does_not_load_is_broken(judged: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.onnx").write_bytes(b"junk")
    assert judged(engine=tmp_path / "bad")["broken"]["code"] == "load_failed"
    with pytest.raises(StageFailure):
        judged(model=tmp_path / "bad", engine=tmp_path / "model")


@pytest.mark.parametrize("options", [{"batch": 3}, {"reshape": 1}])
def test_models_with_a_batch_of_their_own(judged: Callable[..., Any], tmp_path: Path, options: dict[str, Any]) -> None:
    data = judged(
        "roll",
        above=0.895,
        model=linear(tmp_path / "own", **options),
        inputs={"data": dataset(tmp_path / "data")},
    )
    assert (data["samples"], data["units"], data["loss_percent"]) == (100, 100, 10)
    assert data["batch_size"] == options.get("batch", 1)


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ({"labels": np.full(100, CLASSES)}, "labels_out_of_range"),
        ({"labels": np.full(100, -1)}, "labels_out_of_range"),
        ({"labels": np.zeros((100, 2), int)}, "labels_mismatch"),
        ({"labels": np.zeros(99, int)}, "dataset_shape_mismatch"),
        ({"labels": np.zeros(100)}, "dataset_dtype_mismatch"),
        ({"x": np.full((100, 6), np.nan, np.float32)}, "dataset_not_finite"),
    ],
)
def test_data_that_is_wrong(judged: Callable[..., Any], tmp_path: Path, extra: dict[str, Any], code: str) -> None:
    with pytest.raises(StageFailure) as caught:
        judged(inputs={"data": dataset(tmp_path / "data", **extra)})
    assert (caught.value.code, caught.value.kind) == (code, FailureKind.DATA)


def test_a_metric_that_does_not_fit_is_refused(judged: Callable[..., Any]) -> None:
    with pytest.raises(StageFailure) as caught:
        judged(metric="top1")
    assert (caught.value.code, caught.value.kind) == ("metric_mismatch", FailureKind.REQUEST)


def test_what_a_deadline_leaves_undefined_is_not_the_datas_fault(judged: Callable[..., Any], tmp_path: Path) -> None:
    one = linear(tmp_path / "own", batch=1)
    data = {"data": dataset(tmp_path / "data", labels=None)}
    late = time.monotonic() - 1
    with pytest.raises(StageFailure) as caught:
        judged(model=one, inputs=data, metric="spearman", deadline=late)
    assert (caught.value.code, caught.value.kind, caught.value.cacheable) == (
        "metric_undefined", FailureKind.MODEL, False)  # fmt: skip
    assert judged(model=one, inputs=data, metric="spearman")["samples"] == 100


def test_samples_that_calibrated_do_not_judge(judged: Callable[..., Any], tmp_path: Path) -> None:
    data = dataset(tmp_path / "data")
    with np.load(data / "d.npz") as arrays:
        (tmp_path / "cal").mkdir()
        np.savez(tmp_path / "cal" / "c.npz", x=arrays["x"][:30])
    found = judged(inputs={"data": data, "calibration": tmp_path / "cal"})
    assert (found["samples"], found["left_out"]) == (70, 30)
    with pytest.raises(StageFailure) as caught:
        judged(model=tmp_path / "model", inputs={"data": data, "calibration": data})
    assert caught.value.code == "dataset_empty"


def test_one_part_and_a_limit(judged: Callable[..., Any], tmp_path: Path) -> None:
    data = dataset(tmp_path / "data")
    part = judged(inputs={"data": data}, part="validation")
    assert 20 < part["samples"] < 80
    few = judged(model=tmp_path / "model", inputs={"data": data}, max_samples=5)
    assert (few["samples"], few["enough_samples_for"]) == (5, 60.0)


def test_one_hot_labels_are_classes(judged: Callable[..., Any], tmp_path: Path) -> None:
    """Not a multi-label task at logit 0: there two of the four logits are positive on the average."""
    data = dataset(tmp_path / "numbers")
    with np.load(data / "d.npz") as arrays:
        x, labels = arrays["x"], arrays["labels"]
    for dtype in (np.float32, np.int64, bool):
        (tmp_path / np.dtype(dtype).name).mkdir()
        np.savez(tmp_path / np.dtype(dtype).name / "d.npz", x=x, labels=np.eye(CLASSES, dtype=dtype)[labels])
    plain = judged("roll", above=0.9, inputs={"data": data})
    for name in ("float32", "int64", "bool"):
        model = tmp_path / "model"
        found = judged("roll", above=0.9, model=model, inputs={"data": tmp_path / name})
        assert (found["metric"], found["kind"], found["loss_percent"]) == ("top1", "labels", plain["loss_percent"])
        assert "one-hot" in found["why"]
        assert judged(model=model, inputs={"data": tmp_path / name}, metric="macro_f1")["baseline_value"] == 1.0
        assert judged(model=model, inputs={"data": tmp_path / name}, metric="rmse")["metric"] == "rmse"
    several = np.eye(CLASSES, dtype=np.float32)[labels]
    several[50] = [1, 1, 0, 0]  # one row with two: labels of a multi-label task
    assert judged(model=model, inputs={"data": dataset(tmp_path / "several", labels=several)})["metric"] == "macro_f1"


@pytest.mark.parametrize("form", ["classes", "one-hot", "targets", "binary"])
@pytest.mark.parametrize("wrong", ["shuffled", None])
def test_labels_that_the_original_does_not_know_are_told(
    judged: Callable[..., Any], tmp_path: Path, form: str, wrong: str | None
) -> None:
    data = dataset(tmp_path / "data", labels=None)
    with np.load(data / "d.npz") as arrays:
        x = arrays["x"]
    labels = {
        "classes": x[:, :CLASSES].argmax(axis=1),
        "one-hot": np.eye(CLASSES, dtype=np.float32)[x[:, :CLASSES].argmax(axis=1)],
        "targets": x[:, :CLASSES],
        "binary": (x[:, :CLASSES] > 0).astype(np.int64),
    }[form]
    order = np.random.default_rng(3).permutation(len(x)) if wrong else np.arange(len(x))
    (tmp_path / "given").mkdir()
    np.savez(tmp_path / "given" / "d.npz", x=x, labels=labels[order])
    found = judged(inputs={"data": tmp_path / "given"})
    assert bool(found["warnings"]) == (wrong is not None)
    if wrong and form != "targets":
        assert "does not know these labels" in found["warnings"][0]


def test_labels_that_begin_at_one_are_told_how_to_mend(judged: Callable[..., Any], tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", labels=None)
    with np.load(data / "d.npz") as arrays:
        x = arrays["x"][arrays["x"][:, :CLASSES].argmax(axis=1) < CLASSES - 1]
    (tmp_path / "given").mkdir()
    np.savez(tmp_path / "given" / "d.npz", x=x, labels=x[:, :CLASSES].argmax(axis=1) + 1)
    warnings = judged(inputs={"data": tmp_path / "given"})["warnings"]
    assert "right in 0.0 %" in warnings[0]
    assert "With one less than each label the original would be right in 100 %" in warnings[1]


def test_the_bound_is_asked_for_a_confidence_and_counts_equal_samples_once(
    judged: Callable[..., Any], tmp_path: Path
) -> None:
    data = dataset(tmp_path / "data")
    sure = judged(inputs={"data": data}, confidence=0.99, max_loss_percent=1.0)
    assert sure["bound_percent"] == pytest.approx(100 * (1 - 0.01 ** (1 / 100)), rel=1e-4)
    assert 440 <= sure["samples_needed"] <= 475  # ln 0.01 / ln 0.99 = 459
    with np.load(data / "d.npz") as arrays:
        (tmp_path / "twice").mkdir()
        np.savez(tmp_path / "twice" / "d.npz", x=np.tile(arrays["x"], (2, 1)), labels=np.tile(arrays["labels"], 2))
    twice = judged(model=tmp_path / "model", inputs={"data": tmp_path / "twice"}, confidence=0.99)
    assert (twice["samples"], twice["distinct"]) == (200, 100)
    assert twice["bound_percent"] == pytest.approx(sure["bound_percent"], rel=0.05)
    two = judged(model=tmp_path / "model", inputs={"data": data}, max_samples=2)
    assert two["bound_percent"] > 70, "two samples prove nothing"
