"""The original's outputs, kept once: `validate` with them answers as without, and refuses what is not theirs."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.domain.failures import FailureKind, StageFailure
from workers.hardware import describe
from workers.kernel import Session, StageContext, TensorSpec, backends
from workers.measure.stored import OutputWriter, StoredOutputs, spec_json
from workers.stages.reference_outputs import ReferenceOutputs, ReferenceOutputsOptions
from workers.stages.validate import Validate, ValidateOptions

from .test_data import archive, shard_bytes
from .test_validate import Quiet, dataset, linear


def context(
    tmp_path: Path, inputs: Mapping[str, Path], *, out: str = "out", deadline: float | None = None
) -> StageContext:
    return StageContext(inputs, tmp_path, tmp_path / out, Quiet(), describe(), deadline)


def kept(
    tmp_path: Path, inputs: Mapping[str, Path], *, out: str = "kept", deadline: float | None = None, **options: Any
) -> tuple[dict[str, Any], Path, bool]:
    ctx = context(tmp_path, inputs, out=out, deadline=deadline)
    result = ReferenceOutputs().run(ctx, ReferenceOutputsOptions(**options))
    json.dumps(dict(result.data), allow_nan=False)
    assert result.outputs == ("outputs",)
    return dict(result.data), tmp_path / out / "outputs", result.reusable


def judged(tmp_path: Path, inputs: Mapping[str, Path], **options: Any) -> dict[str, Any]:
    given = {"backend": "onnxruntime", **options}
    return dict(Validate().run(context(tmp_path, inputs), ValidateOptions(**given)).data)


class NoOriginal:
    """Lets the engine's folder load and not the original's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, original: Path) -> None:
        backend = backends()["onnxruntime"]
        load = backend.load

        def guarded(this: Any, folder: Path, runtime: Mapping[str, Any]) -> Session:
            assert folder != original, "the original was loaded"
            return load(this, folder, runtime)

        monkeypatch.setattr(backend, "load", guarded)


@pytest.mark.parametrize("options", [{}, {"batch": 3}, {"reshape": 1}])
@pytest.mark.parametrize("with_data", [True, False])
def test_the_answer_is_the_same_and_the_original_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], with_data: bool
) -> None:
    model, engine = linear(tmp_path / "model", **options), linear(tmp_path / "engine", scale=0.9, **options)
    inputs = {"model": model}
    if with_data:
        inputs |= {"data": dataset(tmp_path / "data"), "calibration": dataset(tmp_path / "cal", n=7)}
    facts, expected, reusable = kept(tmp_path, inputs, max_samples=40)
    assert reusable
    assert facts["stored"]
    assert facts["complete"]
    assert facts["bytes"] > 0
    plain = judged(tmp_path, inputs | {"engine": engine}, max_samples=40)
    NoOriginal(monkeypatch, model)
    fast = judged(tmp_path, inputs | {"engine": engine, "expected": expected}, max_samples=40)
    assert fast == plain
    assert fast["complete"]
    assert (facts["samples"], facts["batch_size"]) == (fast["samples"], fast["batch_size"])
    assert facts["samples_digest"] == fast["samples_digest"]


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    inputs = {"model": linear(tmp_path / "model"), "data": dataset(tmp_path / "data")}
    folders = [kept(tmp_path, inputs, out=name)[1] for name in "ab"]
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()


@pytest.mark.parametrize(
    ("fault", "code"),
    [("nan", "output_nan"), ("inf", "output_inf"), ("fewer", "wrong_shape"), ("fails", "inference_failed")],
)
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("batch", ["batch", 8])
def test_one_bad_sample_in_a_hundred_is_caught(
    tmp_path: Path, fault: str, code: str, stored: bool, batch: int | str
) -> None:
    inputs = {"model": linear(tmp_path / "model", batch=batch), "data": dataset(tmp_path / "data")}
    if stored:
        inputs["expected"] = kept(tmp_path, inputs)[1]
    inputs["engine"] = inputs["model"]
    for above in (0.985, 0.505) if fault in ("nan", "inf") else (0.985,):
        runtime = {"fault": fault, "above": above}
        data = judged(tmp_path, inputs, backend="test-altered", runtime=runtime)
        assert data["broken"]["code"] == code
        assert (data["loss_percent"], data["metrics"]) == (None, {})
        if above == 0.985 and fault in ("nan", "inf"):
            assert "sample 99" in data["broken"]["detail"]


def test_what_belongs_to_another_comparison_is_refused(tmp_path: Path) -> None:
    inputs = {"model": linear(tmp_path / "model"), "data": dataset(tmp_path / "data")}
    _, expected, _ = kept(tmp_path, inputs)
    _, random, _ = kept(tmp_path, {"model": inputs["model"]}, out="random", seed=1)
    other = {"model": linear(tmp_path / "other", scale=2), "data": dataset(tmp_path / "more", n=60)}
    wrong: list[tuple[dict[str, Path], dict[str, Any], Path]] = [
        (inputs | {"model": other["model"]}, {}, expected),
        (inputs | {"data": other["data"]}, {}, expected),
        (inputs, {"max_samples": 9}, expected),
        (inputs, {"part": "validation"}, expected),
        (inputs | {"calibration": other["data"]}, {}, expected),
        (inputs, {"baseline_runtime": {"threads": 1}}, expected),
        ({"model": inputs["model"]}, {"seed": 2}, random),
        ({"model": inputs["model"]}, {"seed": 1}, expected),
        (inputs, {}, random),
    ]
    for given, options, folder in wrong:
        if given.get("calibration") is not None:  # the last 60 of 100 share no sample with the first but their digest
            with np.load(inputs["data"] / "d.npz") as arrays:
                np.savez(given["calibration"] / "d.npz", x=arrays["x"][:10])
        with pytest.raises(StageFailure) as caught:
            judged(tmp_path, given | {"engine": given["model"], "expected": folder}, **options)
        assert (caught.value.code, caught.value.kind) == ("expected_mismatch", FailureKind.REQUEST)
        assert caught.value.remedy


@pytest.mark.parametrize("damage", ["index", "zip", "missing"])
def test_damaged_ones_are_refused(tmp_path: Path, damage: str) -> None:
    inputs = {"model": linear(tmp_path / "model"), "data": dataset(tmp_path / "data")}
    _, expected, _ = kept(tmp_path, inputs)
    if damage == "index":
        (expected / "index.json").write_text("{}")
    elif damage == "zip":
        (expected / "outputs.zip").write_bytes(b"PK\x05\x06 nothing")
    else:
        (expected / "outputs.zip").unlink()
    with pytest.raises(StageFailure) as caught:
        judged(tmp_path, inputs | {"engine": inputs["model"], "expected": expected})
    assert caught.value.code == "expected_mismatch"


def test_too_much_to_keep_is_not_kept_and_validate_runs_the_original(tmp_path: Path) -> None:
    inputs = {"model": linear(tmp_path / "model"), "data": dataset(tmp_path / "data")}
    facts, expected, _ = kept(tmp_path, inputs, max_bytes=1000)
    assert (facts["stored"], facts["samples"], facts["complete"]) == (False, 0, True)
    assert "1000" in facts["reason"]
    assert [p.name for p in expected.iterdir()] == ["index.json"]
    plain = judged(tmp_path, inputs | {"engine": inputs["model"]})
    assert judged(tmp_path, inputs | {"engine": inputs["model"], "expected": expected}) == plain


def test_text_is_not_kept(tmp_path: Path) -> None:
    writer = OutputWriter(tmp_path, 1 << 20)
    assert not writer.add({"y": np.array(["a", "b"], object)}, 2, 2)
    writer.close(["y"], {"batch_size": 2, "inputs": [], "outputs": [spec_json(TensorSpec("y", "string", ("n",)))]})
    assert not StoredOutputs(tmp_path).stored
    assert "object" in (writer.reason or "")


def test_both_stop_at_the_deadline_after_one_batch(tmp_path: Path) -> None:
    inputs = {"model": linear(tmp_path / "model"), "data": dataset(tmp_path / "data")}
    facts, expected, reusable = kept(tmp_path, inputs, deadline=0.0)
    assert (facts["complete"], facts["samples"], reusable) == (False, 16, False)
    inputs["engine"] = linear(tmp_path / "engine", scale=0.9)
    options = ValidateOptions(backend="onnxruntime")
    for given in (inputs, inputs | {"expected": expected}):
        result = Validate().run(context(tmp_path, given, deadline=0.0), options)
        assert not result.reusable
        assert (result.data["complete"], result.data["samples"], result.data["units"]) == (False, 16, 16)
        assert "16 of 100" in result.data["notes"][-1]
    whole = judged(tmp_path, inputs)  # what was kept goes as far as it goes; the original answers the rest
    assert judged(tmp_path, inputs | {"expected": expected}) == whole
    assert (whole["complete"], whole["samples"]) == (True, 100)


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    """A model with wide outputs: 32 and 1,024 samples take the same."""
    graph = helper.make_graph(
        [helper.make_node("Tile", ["x", "r"], ["hidden"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", 8 * 4096])],
        [helper.make_tensor("r", TensorProto.INT64, [2], [1, 4096])],
    )
    model = tmp_path / "wide"
    model.mkdir()
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    proto.ir_version = 10
    onnx.save(proto, model / "model.onnx")
    peaks = []
    for n in (32, 1024):
        folder = tmp_path / f"d{n}"
        folder.mkdir()
        np.savez(folder / "d.npz", x=np.random.default_rng(0).standard_normal((n, 8)).astype(np.float32))
        inputs = {"model": model, "data": folder}
        tracemalloc.start()
        facts, expected, _ = kept(tmp_path, inputs, out=f"kept{n}")
        assert facts["stored"]
        data = judged(tmp_path, inputs | {"engine": model, "expected": expected}, metric="normalized_error")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (data["samples"], data["loss_percent"]) == (n, 0)
    assert peaks[1] < 1.1 * peaks[0] + 2e7, peaks  # the draws of 1,024 samples


def test_figures_by_the_users_measure(tmp_path: Path) -> None:
    inputs = {"model": linear(tmp_path / "model"), "data": dataset(tmp_path / "data")}
    inputs["engine"] = inputs["model"]
    inputs["expected"] = kept(tmp_path, inputs)[1]
    runtime = {"fault": "roll", "above": 0.895}
    data = judged(tmp_path, inputs, backend="test-altered", runtime=runtime)
    assert set(data["metrics"]) == {"top1", "macro_f1", "agreement", "kl"}
    assert (data["metrics"]["top1"]["loss_percent"], data["metrics"]["agreement"]["loss_percent"]) == (10, 10)
    for metric in ("macro_f1", "kl", "agreement", "spearman", "psnr"):
        asked = judged(tmp_path, inputs, backend="test-altered", runtime=runtime, metric=metric)
        assert asked["metric"] == metric
        assert asked["loss_percent"] > 1
        assert asked["loss_ci"][0] < asked["loss_percent"] < asked["loss_ci"][1]


def test_targets_of_the_outputs_shape(tmp_path: Path) -> None:
    model, engine = linear(tmp_path / "model"), linear(tmp_path / "engine", scale=0.9)
    noise = np.random.default_rng(3).standard_normal((100, 6))
    x = np.load(dataset(tmp_path / "x") / "d.npz")["x"]
    truth = x[:, :4] + 0.1 * noise[:, :4]
    for labels, metric in ((truth, "r2"), (truth > 0, "macro_f1"), ((truth > 0).astype(np.float32), "macro_f1")):
        inputs = {"model": model, "engine": engine, "data": dataset(tmp_path / f"{labels.dtype}", labels=labels)}
        data = judged(tmp_path, inputs)
        assert (data["metric"], data["kind"]) == (metric, "labels")
        assert (data["loss_percent"] > 0.5) is (metric == "r2")
        assert {"mae", "rmse", "normalized_error"} <= set(data["metrics"])


@pytest.mark.parametrize("size", [6, 9])
def test_a_segmentation_model(tmp_path: Path, size: int) -> None:
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32)[:, :, None, None], "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["scores"])],
        "segments",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [weight],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    proto.ir_version = 10
    (tmp_path / "m").mkdir()
    onnx.save(proto, tmp_path / "m" / "model.onnx")
    x = np.random.default_rng(0).standard_normal((30, 4, 6, 6)).astype(np.float32)
    maps = np.resize(x.argmax(axis=1), (30, size, size)).astype(np.uint8)
    (tmp_path / "d").mkdir()
    np.savez(tmp_path / "d" / "d.npz", x=x, labels=maps)
    inputs = {"model": tmp_path / "m", "engine": tmp_path / "m", "data": tmp_path / "d"}
    if size != 6:
        for metric in ("auto", "mean_iou"):
            with pytest.raises(StageFailure) as caught:
                judged(tmp_path, inputs, metric=metric)
            assert (caught.value.code, caught.value.tensor) == ("labels_mismatch", "labels")
        return
    data = judged(tmp_path, inputs)
    assert (data["metric"], data["value"], data["samples"]) == ("mean_iou", 1.0, 30)
    assert "along axis 1" in data["why"]


@pytest.mark.parametrize(
    ("metric", "extra", "code"),
    [
        ("top5", {}, "metric_mismatch"),
        ("mean_iou", {}, "metric_mismatch"),
        ("r2", {}, "labels_mismatch"),
        ("r2", {"labels": None}, "metric_mismatch"),
        ("macro_f1", {"labels": np.linspace(0, 1, 100)}, "dataset_dtype_mismatch"),
        ("macro_f1", {"labels": np.full((100, 4), 0.5)}, "metric_undefined"),
        ("r2", {"labels": np.full((100, 4), 0.5)}, "metric_undefined"),
    ],
)
def test_a_metric_that_fits_neither_outputs_nor_data(
    tmp_path: Path, metric: str, extra: dict[str, Any], code: str
) -> None:
    model = linear(tmp_path / "model")
    with pytest.raises(StageFailure) as caught:
        judged(tmp_path, {"model": model, "engine": model, "data": dataset(tmp_path / "d", **extra)}, metric=metric)
    assert caught.value.code == code
    assert caught.value.kind in (FailureKind.REQUEST, FailureKind.DATA)
    assert caught.value.remedy


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_what_calibrated_never_judges_also_out_of_shards(tmp_path: Path, suffix: str) -> None:
    """The same samples, spread over shards, in another order, byte order and memory order."""
    model = linear(tmp_path / "model")
    with np.load(dataset(tmp_path / "whole") / "d.npz") as arrays:
        x, labels = arrays["x"], arrays["labels"]
    order = np.random.default_rng(0).permutation(100)
    pieces = [order[:40], order[40:70], order[70:]]
    forms = (x.astype(">f4"), np.asfortranarray(x), x)
    members = {
        f"{i}.npz": shard_bytes(x=f[p], labels=labels[p]) for i, (p, f) in enumerate(zip(pieces, forms, strict=True))
    }
    for name in ("data", "cal"):
        (tmp_path / name).mkdir()
    archive(tmp_path / "data" / f"d{suffix}", members)
    np.savez(tmp_path / "cal" / "c.npz", x=x[:30])
    inputs = {"model": model, "data": tmp_path / "data", "calibration": tmp_path / "cal"}
    facts, expected, _ = kept(tmp_path, inputs)
    assert (facts["samples"], facts["left_out"]) == (70, 30)
    for given in (inputs, inputs | {"expected": expected}):
        found = judged(tmp_path, given | {"engine": model})
        assert (found["samples"], found["left_out"], found["metric"]) == (70, 30, "top1")
    sides = [
        kept(tmp_path, {"model": model, "data": tmp_path / "data"}, out=part, part=part)[0]
        for part in ("calibration", "validation")
    ]
    assert sum(s["samples"] for s in sides) == 100
    assert sides[0]["samples_digest"] != sides[1]["samples_digest"]
    (tmp_path / "cal" / "c.npz").unlink()
    archive(tmp_path / "cal" / f"all{suffix}", {f"z{n}": content for n, content in members.items()})
    for stage in (lambda: kept(tmp_path, inputs, out="none"), lambda: judged(tmp_path, inputs | {"engine": model})):
        with pytest.raises(StageFailure) as caught:
            stage()
        assert (caught.value.code, caught.value.kind) == ("dataset_empty", FailureKind.DATA)
        assert "All 100 samples" in caught.value.detail
