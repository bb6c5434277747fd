"""This machine's NVIDIA GPUs: by NVML where nvidia-ml-py is installed, else by nvidia-smi. No CUDA context is started:
the caller may fork. Never raises: a machine without GPUs has none."""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.metadata
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

_SMI_LIMIT_S = 20.0
_SMI_FACTS = {
    "name": "name",
    "uuid": "uuid",
    "compute_capability": "compute_cap",
    "memory_mib": "memory.total",
    "driver": "driver_version",
}
_SMI_STATE = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "sm_mhz_max": "clocks.max.sm",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "memory_used_mib": "memory.used",
    "utilization_percent": "utilization.gpu",
    "throttle_mask": "clocks_throttle_reasons.active",
}
# Bits of NVML's clock event reasons that slow a GPU down under load (idle, and clocks that the user set, do not count).
_THROTTLED = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


def selected(wanted: str = "") -> dict[str, Any] | None:
    """The one GPU that this worker uses, or None. `wanted`: an index or a UUID (or its beginning); empty = the first of
    `CUDA_VISIBLE_DEVICES`, or the machine's first."""
    found = machine_gpus()
    named = wanted.strip()
    if not named:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            named = visible.split(",")[0].strip()
            if named in ("", "-1", "NoDevFiles"):
                return None
    if not named:
        return found[0] if found else None
    if named.isdecimal():
        return next((g for g in found if g["index"] == int(named)), None)
    return next((g for g in found if str(g["uuid"]).startswith(named)), None)


@functools.cache
def _machine_gpus() -> tuple[dict[str, Any], ...]:
    with contextlib.suppress(Exception):
        return tuple(_by_nvml())
    with contextlib.suppress(Exception):
        return tuple(_by_smi())
    return ()


def machine_gpus() -> list[dict[str, Any]]:
    """All GPUs: index, name, uuid, compute_capability ("9.0"), memory_bytes, driver, cuda (the newest version that the
    driver runs, "13.0"), tensorrt (installed version or None). What is not known is None."""
    return [dict(gpu, tensorrt=_tensorrt()) for gpu in _machine_gpus()]


def state(uuid: str) -> dict[str, Any]:
    """What could explain a difference between two measurements on this GPU, as it stands now: clocks in MHz, its
    temperature in °C, power in W, memory in use, utilization in %, and `throttled`, the reasons that slow it down."""
    with contextlib.suppress(Exception):
        return _nvml_state(uuid)
    with contextlib.suppress(Exception):
        rows = _smi(_SMI_STATE, uuid)
        values = {k: _number(v) for k, v in rows[0].items() if k != "throttle_mask"}
        mask = rows[0].get("throttle_mask") or "0"
        used = values.pop("memory_used_mib", None)
        memory = None if used is None else round(used * (1 << 20) / 1e6)
        return {**values, "memory_used_mb": memory, "throttled": reasons(int(mask, 16))}
    return {}


def reading(uuid: str) -> dict[str, float]:
    """`memory_used_bytes`, `utilization_ratio` and `temperature_celsius` by NVML, without what it does not tell. It is
    asked again and again: nvidia-smi, a process of a second or so, is not started for it."""
    with contextlib.suppress(Exception):
        now = _nvml_state(uuid)
        used, busy, warm = now["memory_used_mb"], now["utilization_percent"], now["temperature_c"]
        told = {
            "memory_used_bytes": None if used is None else used * 1e6,
            "utilization_ratio": None if busy is None else busy / 100,
            "temperature_celsius": warm,
        }
        return {name: float(value) for name, value in told.items() if value is not None}
    return {}


def processes(uuid: str) -> set[int]:
    """Ids of the processes that have a CUDA context on this GPU, as the host counts them; empty where NVML does not
    tell."""
    with contextlib.suppress(Exception), _nvml() as nvml:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        return {int(p.pid) for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    return set()


def busy_processes(uuid: str, since_s: float) -> dict[int, int]:
    """Process id (the host's) → the largest share of the GPU's time in % that it had since then (seconds since the
    epoch), by NVML's samples; empty where nothing tells."""
    found: dict[int, int] = {}
    with contextlib.suppress(Exception), _nvml() as nvml:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        for sample in nvml.nvmlDeviceGetProcessUtilization(handle, int(since_s * 1e6)):
            found[int(sample.pid)] = max(found.get(int(sample.pid), 0), int(sample.smUtil))
    return found


def memory_used_mb(uuid: str) -> float | None:
    """Memory in use on this GPU, of all processes, in MB (10⁶ bytes); None where the driver does not tell."""
    used = state(uuid).get("memory_used_mb")
    return None if used is None else float(used)


def reasons(mask: int) -> list[str]:
    return [words for bit, words in _THROTTLED.items() if mask & bit]


def slug(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` → `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48] or "unknown"


def facts_of_speed(gpu: Mapping[str, Any]) -> dict[str, Any]:
    """What decides an engine's speed, and whether it loads at all, on this GPU."""
    return {k: gpu.get(k) for k in ("name", "compute_capability", "memory_bytes", "driver", "cuda", "tensorrt")}


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _by_nvml() -> Iterator[dict[str, Any]]:
    with _nvml() as nvml:
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            yield {
                "index": index,
                "name": _text(nvml.nvmlDeviceGetName(handle)),
                "uuid": _text(nvml.nvmlDeviceGetUUID(handle)),
                "compute_capability": f"{major}.{minor}",
                "memory_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
                "driver": _text(nvml.nvmlSystemGetDriverVersion()),
                "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
            }


def _nvml_state(uuid: str) -> dict[str, Any]:
    with _nvml() as nvml:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)

        def asked(function: str, *args: Any) -> Any:
            try:
                return getattr(nvml, function)(handle, *args)
            except (nvml.NVMLError, AttributeError):  # not every GPU tells everything
                return None

        power, limit = asked("nvmlDeviceGetPowerUsage"), asked("nvmlDeviceGetEnforcedPowerLimit")
        memory, use = asked("nvmlDeviceGetMemoryInfo"), asked("nvmlDeviceGetUtilizationRates")
        mask = asked("nvmlDeviceGetCurrentClocksEventReasons")
        if mask is None:
            mask = asked("nvmlDeviceGetCurrentClocksThrottleReasons")
        return {
            "sm_mhz": asked("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "memory_mhz": asked("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "sm_mhz_max": asked("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
            "temperature_c": asked("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "power_w": None if power is None else round(power / 1e3, 1),
            "power_limit_w": None if limit is None else round(limit / 1e3, 1),
            "memory_used_mb": None if memory is None else round(memory.used / 1e6),
            "utilization_percent": None if use is None else use.gpu,
            "throttled": None if mask is None else reasons(int(mask)),
        }


def _by_smi() -> Iterator[dict[str, Any]]:
    cuda = re.search(r"CUDA Version\s*:\s*([\d.]+)", _run_smi("-q") or "")
    for index, row in enumerate(_smi(_SMI_FACTS)):
        memory = _number(row["memory_mib"])
        yield {
            "index": index,
            "name": row["name"],
            "uuid": row["uuid"],
            "compute_capability": row["compute_capability"] or None,
            "memory_bytes": None if memory is None else int(memory) << 20,
            "driver": row["driver"] or None,
            "cuda": cuda.group(1) if cuda else None,
        }


def _smi(fields: Mapping[str, str], uuid: str | None = None) -> list[dict[str, str]]:
    where = [] if uuid is None else [f"--id={uuid}"]
    text = _run_smi(f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits", *where)
    rows = csv.reader((text or "").splitlines(), skipinitialspace=True)
    return [dict(zip(fields, (cell.strip() for cell in row), strict=True)) for row in rows if row]


def _run_smi(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=_SMI_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:  # "[N/A]"
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _tensorrt() -> str | None:
    for name in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None
