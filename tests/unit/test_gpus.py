"""GPUs as NVML and nvidia-smi tell of them, and what a machine without any is."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.domain.failures import FailureKind, StageFailure
from workers import devices, hardware
from workers.devices.cuda import apis as cuda_apis
from workers.devices.cuda import gpus
from workers.devices.cuda import runtime as cuda_runtime
from workers.measure.device_company import DeviceCompany

SMI = """#!/bin/sh
case "$*" in
  -q) echo "CUDA Version                              : 13.0" ;;
  *uuid*) echo "NVIDIA H100 80GB HBM3, GPU-aa11, 9.0, 81559, 580.159.04"
          echo "NVIDIA L4, GPU-bb22, 8.9, 23034, 580.159.04" ;;
  *GPU-aa11*) echo "1410, 2619, 1980, 61, 387.7, 700.00, 4482, 82, 0x0000000000000044" ;;
  *) echo "345, 2619, [N/A], 44, [N/A], 700.00, 500, 0, 0x0000000000000001" ;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose `nvidia-smi` tells of two GPUs, and no NVML."""
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "_nvml", _no_nvml)
    gpus._machine_gpus.cache_clear()
    yield
    gpus._machine_gpus.cache_clear()


def _no_nvml() -> Any:
    raise ImportError("no pynvml")


def test_the_gpu_makes_the_workers_hardware(smi: None) -> None:
    machine = hardware.describe()
    assert (machine["id"], machine["kind"]) == ("gpu-nvidia-h100-80gb-hbm3", "gpu")
    assert machine["gpu"] == {
        "index": 0,
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": "GPU-aa11",
        "compute_capability": "9.0",
        "memory_bytes": 81559 << 20,
        "driver": "580.159.04",
        "cuda": "13.0",
        "tensorrt": machine["gpu"]["tensorrt"],
    }
    assert devices.named("cuda").lock(machine) == "GPU-aa11"


@pytest.mark.parametrize(
    ("setting", "visible", "expected"),
    [
        ("", None, "GPU-aa11"),
        ("1", None, "GPU-bb22"),
        ("GPU-bb", None, "GPU-bb22"),
        ("", "1,0", "GPU-bb22"),
        ("", "GPU-bb22", "GPU-bb22"),
        ("0", "1", "GPU-aa11"),
        ("", "", None),
        ("", "-1", None),
        ("7", None, None),
    ],
)
def test_a_worker_has_one_gpu(
    smi: None, monkeypatch: pytest.MonkeyPatch, setting: str, visible: str | None, expected: str | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = gpus.selected(setting)
    assert (found and found["uuid"]) == expected


def test_the_fingerprint_follows_what_decides_speed(smi: None) -> None:
    machine = hardware.describe()

    def changed(**facts: Any) -> bool:
        return hardware.fingerprint({**machine, "gpu": {**machine["gpu"], **facts}}) != hardware.fingerprint(machine)

    assert changed(name="NVIDIA L4")
    assert changed(compute_capability="8.9")
    assert changed(driver="590.1")
    assert changed(cuda="13.1")
    assert changed(tensorrt="11.4.0")
    assert not changed(uuid="GPU-cc33", index=3)


def test_the_state_names_what_slows_the_gpu_down(smi: None) -> None:
    now = hardware.conditions(hardware.describe())["gpu"]
    assert (now["sm_mhz"], now["temperature_c"], now["power_w"]) == (1410, 61, 387.7)
    assert now["memory_used_mb"] == 4700
    assert now["throttled"] == ["power cap", "hardware thermal slowdown"]
    other = gpus.state("GPU-bb22")
    assert other["throttled"] == []  # idle is no throttling
    assert other["power_w"] is None


def test_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpus, "_nvml", _no_nvml)
    gpus._machine_gpus.cache_clear()
    machine = hardware.describe()
    gpus._machine_gpus.cache_clear()
    assert machine["gpu"] is None
    assert machine["kind"] == "cpu"
    assert devices.HOST.lock(machine) is None
    assert "gpu" not in hardware.conditions(machine)
    assert gpus.state("GPU-aa11") == {}


def test_cuda_where_there_is_none_is_a_typed_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_apis, "PyCudaApi", _Absent)
    monkeypatch.setattr(cuda_apis, "BindingsApi", _Absent)
    with pytest.raises(StageFailure) as caught:
        cuda_runtime.Cuda()
    assert (caught.value.code, caught.value.kind) == ("cuda_unavailable", FailureKind.INFRASTRUCTURE)
    assert "`gpu`" in (caught.value.remedy or "")


class _Absent:
    name = "absent"

    def __init__(self) -> None:
        raise ImportError("libcuda.so.1: cannot open shared object file")


def test_probing_says_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_runtime._probed.cache_clear()
    monkeypatch.setattr(cuda_apis, "installed", lambda: False)
    with pytest.raises(StageFailure, match="Neither PyCUDA nor cuda-bindings"):
        cuda_runtime.probe()
    assert not cuda_runtime.available()
    cuda_runtime._probed.cache_clear()
    monkeypatch.setattr(cuda_apis, "installed", lambda: True)
    monkeypatch.setattr(cuda_runtime, "_PROBE", "import os; os.abort()")  # a driver that takes the process down
    with pytest.raises(StageFailure, match="its process ended with -6"):
        cuda_runtime.probe()
    cuda_runtime._probed.cache_clear()


class _Nvml:
    """What NVML tells of a GPU: processes, their shares, and what slows it down."""

    NVMLError = RuntimeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self) -> None:
        self.there = [100]
        self.shares: dict[int, int] = {}
        self.mask = 0

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self.there]

    def nvmlDeviceGetProcessUtilization(self, handle: str, since_us: int) -> list[Any]:
        if not self.shares:
            raise self.NVMLError("not found")
        return [SimpleNamespace(pid=pid, smUtil=share) for pid, share in self.shares.items()]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.mask


def test_company_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told = _Nvml()
    monkeypatch.setattr(gpus, "_nvml", lambda: contextlib.nullcontext(told))
    company = DeviceCompany(["onnxruntime-cuda"], {"gpu": {"uuid": "GPU-aa11"}})
    told.there = [100, 200]  # 200 came with the benchmark: an engine of its own
    assert company() is None
    told.shares = {200: 99, 100: 2}
    assert company() is None
    told.shares = {200: 60, 100: 40}
    assert company() == "other processes took 40 % of the GPU's time"
    told.shares = {200: 99}
    told.mask = 0x4  # a power cap is what the engine meets by itself
    assert company() is None
    told.mask = 0x40
    assert company() == "the GPU was slowed down (hardware thermal slowdown)"
    assert DeviceCompany(["onnxruntime"], {"gpu": {"uuid": "GPU-aa11"}})() is None
    monkeypatch.setattr(gpus, "_nvml", _no_nvml)
    monkeypatch.setattr(gpus, "_run_smi", lambda *_: None)
    assert DeviceCompany(["onnxruntime-cuda"], {"gpu": {"uuid": "GPU-aa11"}})() is None


def test_a_reading_for_metrics_is_nvml_s_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = _Nvml()
    machine = {"gpu": {"uuid": "GPU-aa11"}}
    monkeypatch.setattr(gpus, "_nvml", lambda: contextlib.nullcontext(told))
    assert devices.named("cuda").reading(machine) == {}, "what it does not tell is not there"
    monkeypatch.setattr(_Nvml, "nvmlDeviceGetMemoryInfo", lambda *_: SimpleNamespace(used=3_000_000_000), raising=False)
    monkeypatch.setattr(_Nvml, "nvmlDeviceGetUtilizationRates", lambda *_: SimpleNamespace(gpu=37), raising=False)
    monkeypatch.setattr(_Nvml, "nvmlDeviceGetTemperature", lambda *_: 61, raising=False)
    found = devices.named("cuda").reading(machine)
    assert found == {"memory_used_bytes": 3e9, "utilization_ratio": 0.37, "temperature_celsius": 61.0}
    assert devices.HOST.reading(machine) == devices.named("cuda").reading({}) == {}
    monkeypatch.setattr(gpus, "_nvml", _no_nvml)
    monkeypatch.setattr(gpus, "_run_smi", lambda *_: pytest.fail("a process for a scrape"))
    assert devices.named("cuda").reading(machine) == {}
