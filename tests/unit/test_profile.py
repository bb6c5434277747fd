"""Where an engine's time goes: medians by layer, told apart from what the profiler itself costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories import onnx_models as models
from workers.backends.onnxruntime.profile import layer_times
from workers.hardware import describe
from workers.kernel import LayerTime, Reporter, StageContext, backends
from workers.measure.layers import median_times
from workers.stages import profile as stage
from workers.stages.profile import Profile, ProfileOptions


class Notes(Reporter):
    def progress(self, fraction: float, message: str = "") -> None:
        pass

    def note(self, message: str, **facts: Any) -> None:
        pass


def trace(path: Path, runs: list[list[tuple[str, str, int]]]) -> Path:
    """As ONNX Runtime writes it: a `model_run` event for each run, and one for each call of a kernel."""
    events: list[dict[str, Any]] = [{"cat": "Session", "name": "model_loading_uri", "ts": 0, "dur": 5}]
    now = 10
    for run in runs:
        begun = now
        for name, op_type, took in run:
            events.append(
                {"cat": "Node", "name": f"{name}_kernel_time", "ts": now, "dur": took, "args": {"op_name": op_type}}
            )
            events.append({"cat": "Node", "name": f"{name}_fence_before", "ts": now, "dur": 900})
            now += took + 1
        events.append({"cat": "Session", "name": "model_run", "ts": begun, "dur": now - begun})
        now += 3
    path.write_text(json.dumps(events))
    return path


def test_one_preempted_run_is_not_the_engine(tmp_path: Path) -> None:
    """A mean of 20 runs once called Gelu 78 % of an engine of 0.024 ms."""
    usual = [("gelu", "Gelu", 4), ("fc", "MatMul", 16)]
    runs = [
        [("gelu", "Gelu", 500), ("fc", "MatMul", 500)],
        *[usual] * 10,
        [("gelu", "Gelu", 8000), *usual[1:]],
        *[usual] * 9,
    ]
    found = layer_times(trace(tmp_path / "trace.json", runs), 1)
    assert found == [LayerTime("fc", "MatMul", 0.016), LayerTime("gelu", "Gelu", 0.004)]


def test_what_a_loop_runs_is_added_up_in_each_run(tmp_path: Path) -> None:
    run = [("body", "MatMul", 5), ("body", "MatMul", 7), ("body", "MatMul", 6), ("last", "Add", 1)]
    found = layer_times(trace(tmp_path / "trace.json", [run] * 3), 1)
    assert [(t.name, round(t.ms, 6)) for t in found] == [("body", 0.018), ("last", 0.001)]
    assert median_times([]) == []


def profiled(name: str, tmp_path: Path) -> dict[str, Any]:
    backend, engine = backends()[name](), tmp_path / "engine"
    engine.mkdir()
    built = backend.build(models.folder(models.mlp(hidden=512), tmp_path / "model"), engine, {}, Notes())
    (tmp_path / "work").mkdir()
    context = StageContext({"engine": engine}, tmp_path / "work", tmp_path / "out", Notes(), describe())
    options = ProfileOptions(backend=name, runtime=built["runtime"], batch=4)
    return json.loads(json.dumps(dict(Profile().run(context, options).data), allow_nan=False))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_layers_of_a_real_engine(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "copy_bandwidth", lambda _threads: 1e10)
    monkeypatch.chdir(tmp_path)
    data = profiled(name, tmp_path)
    assert data["runs"] == 200
    assert data["layer_count"] >= 2
    assert sum(layer["share"] for layer in data["layers"]) == pytest.approx(1.0, abs=0.01)
    assert data["layers_ms"] == pytest.approx(sum(layer["ms"] for layer in data["layers"]), rel=0.01)
    assert (data["distorted"] is None) == (data["layers_ms"] <= 1.5 * data["inference_ms"] * (1 + 1e-6))


def test_the_profilers_own_cost_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [LayerTime("gelu", "Gelu", 412.0), LayerTime("fc", "MatMul", 100.0)]
    monkeypatch.setattr(type(backends()["onnxruntime"]()), "layer_times", lambda *_: slow)
    monkeypatch.setattr(stage, "copy_bandwidth", lambda _threads: 1e10)
    data = profiled("onnxruntime", tmp_path)
    assert "the layers take 512 ms together" in data["distorted"]
    assert data["layers"][0]["share"] == pytest.approx(0.8047, abs=1e-4)


def test_times_are_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of calls, of which one in ten takes a hundred times as long."""
    clock, calls = np.zeros(1), np.zeros(1, int)

    def call() -> None:
        calls[0] += 1
        clock[0] += 1e-1 if calls[0] % 10 == 0 else 1e-3

    monkeypatch.setattr(stage.time, "perf_counter", lambda: float(clock[0]))
    runs, median = stage._timed(call)
    assert runs >= 100
    assert median == pytest.approx(1.0)
