"""The benchmark's judge, its runner and its accounts: what decides the figures that are quoted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, save

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [n for n in sys.modules if n == "_engines_summary" or n == "_common" or n.split(".")[0] == "peers"]:
        del sys.modules[name]


def test_top1_counts_against_labels_and_not_against_the_original() -> None:
    from peers.judge import loss

    original = {"logits": np.eye(4, dtype=np.float32)}
    engine = {"logits": np.eye(4, dtype=np.float32)[[1, 0, 2, 3]]}
    assert loss({"logits": "top1"}, original, engine, np.arange(4))["loss_percent"] == 50
    assert loss({"logits": "top1"}, original, engine, np.array([1, 0, 2, 3]))["loss_percent"] == -50


def test_the_worst_output_decides() -> None:
    from peers.judge import loss

    original = {"a": np.ones((4, 3), np.float32), "b": np.ones((4, 2), np.float32)}
    found = loss({"a": "cosine", "b": "normalized_error"}, original, {**original, "b": original["b"] * 1.1}, None)
    assert found["output"] == "b"
    assert found["loss_percent"] == pytest.approx(10, abs=1e-3)


@pytest.mark.parametrize("engine", [{}, {"y": np.ones((4, 2), np.float32)}, {"y": np.full((4, 3), np.nan, np.float32)}])
def test_a_broken_output_loses_everything(engine: dict[str, Any]) -> None:
    from peers.judge import loss

    found = loss({"y": "cosine"}, {"y": np.ones((4, 3), np.float32)}, engine, None)
    assert found["loss_percent"] == 100
    assert found["broken"]


def entry(p50: float, ratio: float, loss: float = 0.0, **more: Any) -> dict[str, Any]:
    at = {"p50_ms": p50, "ratio": {"ratio": ratio, "low": ratio, "high": ratio}}
    return {"batches": {"1": at, "8": at}, "accuracy": {"loss_percent": loss, "broken": None}, "error": None, **more}


def test_a_peer_that_fails_or_loses_too_much_is_no_best_and_counts_as_one() -> None:
    from _engines_summary import best_peer, means, summary

    engines = {
        "ort": entry(10, 1.0),
        "ort-static": entry(2, 0.2, loss=5.0),
        "openvino": entry(5, 0.5),
        "nncf": {"error": "no", "seconds": 1},
        "anneal": entry(5.05, 0.505, versus_best={b: {"ratio": 1.01, "low": 1.0, "high": 1.02} for b in ("1", "8")}),
    }
    models = {"m": {"label": "M", "engines": engines}}
    assert best_peer(engines, "1") == ("openvino", 0.5)
    text = means(models)
    (row,) = (line for line in text.splitlines() if "QDQ" in line)
    assert row.split()[-6:] == ["1.000", "|", "1", "of", "1", "|"]
    assert "OpenVINO): 1.010; goal ≤ 0.9: **missed**" in text
    assert "2 of 2" in summary(models)


def test_a_runner_answers_outputs_and_times_and_a_broken_engine_is_an_error(tmp_path: Path) -> None:
    from peers.contest import figures, measure

    model, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    node = helper.make_node("Relu", ["x"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([node], "g", [x], [y])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), model)
    values = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    np.savez(data, x=values, labels=np.zeros(20, np.int64))
    specs = {
        "ort": {"kind": "onnxruntime", "file": str(model)},
        "none": {"kind": "onnxruntime", "file": str(tmp_path / "missing.onnx")},
    }
    found = measure(specs, data, tmp_path, (1, 8), 0.1)
    assert np.array_equal(found["ort"]["outputs"]["y"], np.maximum(values, 0))
    shown = figures(found["ort"]["rounds"][8], found["ort"]["rounds"][8])
    assert shown["ratio"]["ratio"] == 1
    assert shown["p50_ms"] > 0
    assert "missing.onnx" in found["none"]["error"]


def test_an_engine_of_ours_that_loses_too_much_has_missed_the_goal() -> None:
    from _engines_summary import summary

    engines = {"ort": entry(10, 1.0), "anneal": entry(1, 0.1, loss=2.0)}
    assert "0 of 2" in summary({"m": {"label": "M", "engines": engines}})


def test_pixels_agree_by_their_class_and_samples_may_lie_along_another_axis(tmp_path: Path) -> None:
    from peers.judge import agreement
    from peers.runner import rows

    maps = np.zeros((2, 3, 4, 4), np.float32)
    maps[:, 1] = 1.0
    other = maps.copy()
    other[0, 2, 0, 0] = 2.0
    assert agreement(maps, other) == pytest.approx(100 / 32)
    state = np.arange(24).reshape(2, 4, 3)
    assert np.array_equal(rows(state, 1, [3]), state[:, 3:])
    assert np.array_equal(rows(state, 0, [1]), state[1:])
    assert rows(np.asarray(16000), None, [3]) == 16000
