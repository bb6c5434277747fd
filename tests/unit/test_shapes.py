"""Which shapes engines are timed and judged at, and what that says of them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from app.domain.spec import OptimizationSpec
from app.jobs.report_page import report_page
from tests.factories.onnx_models import conv_net, make_model, tensor, transformer_block, value
from workers.hardware import describe
from workers.kernel import Reporter, StageContext, TensorSpec
from workers.measure.fitting import fitted
from workers.measure.inputs import DISTINCT, InputSource
from workers.measure.shapes import at_batch, free_axes, layouts, timed_shapes, with_sizes
from workers.pipeline.select import Tried, judge
from workers.pipeline.shape_rules import not_kept, shape_table
from workers.stages.benchmark import Benchmark, BenchmarkOptions

IDS = (TensorSpec("input_ids", "int64", ("batch", "seq")), TensorSpec("mask", "int64", ("batch", "seq")))


class Quiet(Reporter):
    def progress(self, fraction: float, message: str = "") -> None: ...

    def note(self, message: str, **facts: Any) -> None: ...


def shards(folder: Path, *arrays: Mapping[str, Any]) -> Path:
    """A data set of several shards; the folder that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        for i, shard in enumerate(arrays):
            buffer = BytesIO()
            np.savez(buffer, **shard)
            archive.writestr(f"{i}.npz", buffer.getvalue())
    return folder


def ids(count: int, length: int, seed: int = 0) -> dict[str, Any]:
    drawn = np.random.default_rng(seed).integers(10, 50, (count, length))
    return {"input_ids": drawn, "attention_mask": np.ones((count, length), np.int64)}


# Which shapes


def test_axes_of_one_name_move_together_and_unnamed_ones_alone() -> None:
    assert free_axes(IDS) == {"seq": [("input_ids", 1), ("mask", 1)]}
    picture = (TensorSpec("x", "float32", ("n", 3, "?", "?")),)
    assert free_axes(picture) == {"x[2]": [("x", 2)], "x[3]": [("x", 3)]}
    fixed = (TensorSpec("x", "float32", ("n", 16)),)
    assert free_axes(fixed) == {}


def test_what_is_computed_of_other_axes_follows_them() -> None:
    decoder = (
        TensorSpec("ids", "int64", ("b", "s")),
        TensorSpec("mask", "int64", ("b", "past + s")),
        TensorSpec("key", "float32", ("b", 4, "past", 8)),
    )
    assert set(free_axes(decoder)) == {"s", "past"}
    base = {"ids": (1, 1), "mask": (1, 33), "key": (1, 4, 32, 8)}
    assert with_sizes(decoder, base, {"past": 0}, None) == {"ids": (1, 1), "mask": (1, 1), "key": (1, 4, 0, 8)}


def test_the_batch_goes_where_its_axis_is() -> None:
    state = (TensorSpec("x", "float32", ("batch", "t", 8)), TensorSpec("state", "float32", (2, "batch", 16)))
    axes = {"state": 1}
    assert set(free_axes(state, axes)) == {"t"}
    assert at_batch(state, {"x": (1, 9, 8), "state": (2, 1, 16)}, 5, axes) == {"x": (5, 9, 8), "state": (2, 5, 16)}


def test_the_datas_own_shapes_come_first(tmp_path: Path) -> None:
    file = (
        shards(
            tmp_path, *({"input_ids": np.ones((n, t)), "mask": np.ones((n, t))} for n, t in ((3, 5), (9, 20), (2, 70)))
        )
        / "data.zip"
    )
    found = timed_shapes(IDS, layouts(file, IDS), {"input_ids": {"min": [1, 1], "opt": [1, 2], "max": [1, 3]}})
    assert found.typical.dims["input_ids"] == (1, 20)
    assert [(s.label, s.dims["mask"], s.in_use) for (s,) in found.others] == [
        ("short", (1, 5), True),
        ("long", (1, 70), True),
    ]


def test_then_the_jobs_then_custom(tmp_path: Path) -> None:
    file = shards(tmp_path, {"input_ids": np.ones((3, 20)), "mask": np.ones((3, 20))}) / "data.zip"
    ranges = {"input_ids": {"min": [1, 2], "opt": [1, 16], "max": [8, 64]}}
    job = timed_shapes(IDS, None, ranges)
    assert job.typical.dims["mask"] == (1, 16)
    assert [(s.label, s.dims["mask"], s.in_use) for (s,) in job.others] == [
        ("min", (1, 2), True),
        ("max", (1, 64), True),
    ]
    custom = timed_shapes(IDS, None, None)
    assert [[s.dims["mask"][1] for s in way] for way in custom.others] == [[1, 2, 4, 8], [128, 64]]
    assert all(s.in_use for way in custom.others for s in way)
    beside = timed_shapes(IDS, layouts(file, IDS), None)
    assert beside.typical.dims["mask"] == (1, 20)
    assert not any(s.in_use for way in beside.others for s in way)  # the data know one, and one only
    picture = timed_shapes((TensorSpec("x", "float32", ("n", 3, "h", "w")),), None, None)
    assert [way[0].dims["x"] for way in picture.others] == [(1, 3, 64, 64), (1, 3, 320, 320)]


def test_samples_are_cut_and_repeated_with_their_own_values() -> None:
    specs = (TensorSpec("ids", "int64", ("b", "t")), TensorSpec("attention_mask", "int64", ("b", "t")))
    given = {"ids": np.arange(40, 60).reshape(2, 10), "attention_mask": np.array([[1] * 10, [1] * 3 + [0] * 7])}
    cut = fitted(specs, given, {"ids": (2, 1), "attention_mask": (2, 1)}, offset=4)
    assert cut["ids"].tolist() == [[44], [54]]
    assert cut["attention_mask"].tolist() == [[1], [1]]  # a sample without any token is none
    longer = fitted(specs, given, {"ids": (2, 25), "attention_mask": (2, 25)}, offset=4)
    assert set(longer["ids"][0]) == set(given["ids"][0])


def test_ids_are_the_datas_however_few(tmp_path: Path) -> None:
    spec = (TensorSpec("ids", "int64", ("b", "t")),)
    file = shards(tmp_path, {"ids": np.array([[40, 41, 42]])}) / "data.zip"
    feeds, words = InputSource(file, spec, (), None, 0).typical([1, 2])
    assert "random" not in words
    assert len(feeds[2]) == DISTINCT
    assert all(set(f["ids"].ravel()) == {40, 41, 42} for f in feeds[2])


# Timing


def benchmark(tmp_path: Path, folder: Path, **more: Any) -> Mapping[str, Any]:
    inputs = {"baseline": folder, "engine.same": folder, **({"data": more.pop("data")} if "data" in more else {})}
    ctx = StageContext(inputs, tmp_path, tmp_path / "out", Quiet(), describe())
    options = {"engines": [{"id": "same", "backend": "onnxruntime"}], "batch_sizes": [1], "min_seconds": 0.1}
    return (
        Benchmark()
        .run(ctx, BenchmarkOptions(**{**options, "cold": False, "every_shape": True, "rounds": 5, **more}))
        .data
    )


def test_lengths_of_the_data_are_timed_beside_the_most_frequent(tmp_path: Path) -> None:
    onnx.save(transformer_block(), _made(tmp_path / "m") / "model.onnx")
    data = shards(tmp_path / "d", ids(4, 3), ids(12, 16), ids(2, 60))
    found = benchmark(tmp_path, tmp_path / "m", data=data, essential=1)
    assert found["shape"]["dims"]["input_ids"] == [1, 16]
    engine = found["engines"]["same"]
    assert [(s["label"], s["dims"]["input_ids"], s["in_use"]) for s in engine["shapes"]] == [
        ("short", [1, 3], True),
        ("long", [1, 60], True),
    ]
    assert all(s["p50_ms"] > 0 and s["speedup"]["low"] <= s["speedup"]["ratio"] for s in engine["shapes"])
    assert found["engines"]["baseline"]["shapes"][0]["speedup"]["ratio"] == 1.0
    rows = shape_table(OptimizationSpec(model_id="m"), found, found["engines"]["baseline"], engine, "1")
    assert [r["label"] for r in rows] == ["typical", "short", "long"]
    assert all(r["original_ms"] and r["latency_ms"] for r in rows)


def test_a_shape_that_the_original_refuses_is_left_out_and_said(tmp_path: Path) -> None:
    """A table of 40 positions: 32 fit, 128 and 64 do not."""
    positions = np.random.default_rng(0).normal(size=(1, 40, 8))
    nodes = [
        onnx.helper.make_node("Shape", ["x"], ["length"], start=1, end=2),
        onnx.helper.make_node("Slice", ["positions", "zero", "length", "one"], ["here"]),
        onnx.helper.make_node("Add", ["x", "here"], ["y"]),
    ]
    weights = [tensor("positions", positions), tensor("zero", [0], np.int64), tensor("one", [1], np.int64)]
    onnx.save(
        make_model(nodes, [value("x", ["b", "t", 8])], [value("y", ["b", "t", 8])], weights),
        _made(tmp_path / "m") / "model.onnx",
    )
    found = benchmark(tmp_path, tmp_path / "m")
    assert [s["label"] for s in found["engines"]["same"]["shapes"]] == ["short"]
    (left,) = found["skipped_shapes"]
    assert left["label"] == "long"
    assert "does not take" in left["reason"]


def test_a_picture_size_is_told_where_it_is_fixed(tmp_path: Path) -> None:
    onnx.save(conv_net(), _made(tmp_path / "m") / "model.onnx")
    found = benchmark(tmp_path, tmp_path / "m")
    assert len(found["shape"]["dims"]["input"]) == 4
    assert "shapes" not in found["engines"]["same"]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# What it says


def _at(label: str, ratio: float, *, in_use: bool = True, **more: Any) -> dict[str, Any]:
    gain = {"ratio": ratio, "low": ratio * 0.97, "high": ratio * 1.03}
    return {
        "label": label,
        "dims": {"ids": [1, 512]},
        "batch": 1,
        "in_use": in_use,
        "p50_ms": 1.0,
        "speedup": gain,
        "throughput_ratio": gain,
        **more,
    }


def _tried(name: str, ratio: float, *shapes: dict[str, Any]) -> Tried:
    figures = {
        "batches": {"1": _at("typical", ratio) | {"throughput_qps": 1.0}},
        "shapes": list(shapes),
        "size_bytes": 1,
    }
    accuracy = {"loss_percent": 0.0, "loss_ci": [0.0, 0.0], "samples": 500, "broken": None, "source": "dataset"}
    return Tried(name, "fp32", True, accuracy=accuracy, figures=figures)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        (_at("long", 0.8), "slower at the long shape (ids [1, 512]): 0.80x"),
        (_at("long", 1.5) | {"undisturbed": False}, "not known to be no slower at the long shape (ids [1, 512])"),
        (
            {k: v for k, v in _at("short", 1).items() if k not in ("speedup", "throughput_ratio")}
            | {"failed": {"detail": "no"}},
            "fails at the short",
        ),
    ],
)
def test_an_engine_that_is_slower_at_a_shape_in_use_does_not_ship(shape: dict[str, Any], why: str) -> None:
    spec = OptimizationSpec(model_id="m")
    quick, steady = _tried("quick", 3.0, shape), _tried("steady", 1.5, _at("long", 1.4))
    verdict = judge(spec, _tried("baseline", 1.0), [quick, steady], {"1": {"ratio": 1.0, "low": 0.99, "high": 1.01}})
    assert verdict.picked == "steady"
    assert any(why in reason for reason in quick.reasons)


def test_at_a_shape_that_nobody_uses_it_is_told() -> None:
    spec = OptimizationSpec(model_id="m")
    quick = _tried("quick", 3.0, _at("long", 0.8, in_use=False))
    verdict = judge(spec, _tried("baseline", 1.0), [quick], {"1": {"ratio": 1.0, "low": 0.99, "high": 1.01}})
    assert verdict.picked == "quick"
    assert quick.figures is not None
    assert not_kept(spec, quick.figures, in_use=False)
    typical = {**_at("typical", 1.0), "why": "x"}
    original = {"batches": {"1": {"p50_ms": 3.0}}, "shapes": [_at("long", 1.0, in_use=False)]}
    rows = shape_table(spec, {"shape": typical}, original, quick.figures, "1")
    assert [r["holds"] for r in rows] == [True, False]
    page = report_page({"final_metrics": {"batch_size": 1, "shape": {"ids": [1, 512]}}, "shapes": rows}, "j")
    assert "Measured at batch size 1, with ids 1×512." in page
    assert "where neither data nor job are" in page
