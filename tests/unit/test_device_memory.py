"""What an engine takes of a GPU's memory, and which memory the job's limit is about."""

from __future__ import annotations

import pytest

from workers.devices.cuda import gpus
from workers.measure.deployment import choose
from workers.measure.device_memory import DeviceMemory, limited_mb

GPU = {"gpu": {"uuid": "GPU-1"}}


def test_it_is_what_came_into_use_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([4000.0, 4900.0, 3000.0])
    monkeypatch.setattr(gpus, "memory_used_mb", lambda uuid: next(used))
    memory = DeviceMemory("onnxruntime-cuda", GPU)
    assert memory.grown_mb() == 900.0
    assert memory.grown_mb() == 0.0, "somebody else gave memory back: nothing is less than nothing"


@pytest.mark.parametrize(
    ("backend", "hardware"), [("onnxruntime", GPU), ("onnxruntime-cuda", {"gpu": None}), ("none", GPU)]
)
def test_on_a_cpu_nothing_is_asked(backend: str, hardware: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "memory_used_mb", lambda uuid: pytest.fail("asked"))
    assert DeviceMemory(backend, hardware).grown_mb() is None


def test_a_driver_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "state", lambda uuid: {"memory_used_mb": None})
    assert DeviceMemory("tensorrt", GPU).grown_mb() is None


@pytest.mark.parametrize(
    ("figures", "value"),
    [
        ({"peak_memory_mb": 2500.0, "gpu_memory_mb": 700.0}, 700.0),
        ({"peak_memory_mb": 120.0, "gpu_memory_mb": None}, 120.0),
        ({}, None),
    ],
)
def test_the_limit_is_on_the_memory_where_the_engine_runs(figures: dict[str, float], value: float | None) -> None:
    assert limited_mb(figures) == value


def test_a_deployment_on_a_gpu_is_chosen_by_its_memory() -> None:
    common = {"status": "measured", "threads": 1, "runtime": {}, "reasons": {}, "p99_ms": 2.0, "batch": 1}
    one = {"id": "1x1@1", "instances": 1, "p50_ms": 1.0, "throughput_qps": 1000.0, "gpu_memory_mb": 900.0}
    two = {"id": "2x1@1", "instances": 2, "p50_ms": 1.2, "throughput_qps": 1500.0, "gpu_memory_mb": 1800.0}
    table = [{**common, **c, "memory_mb": 3000.0} for c in (one, two)]
    chosen = choose(table, "throughput", max_memory_mb=1000.0)
    assert chosen.best is not None
    assert chosen.best["id"] == "1x1@1"
    assert "GPU memory ≤ 1000" in chosen.reason
