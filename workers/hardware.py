"""What this machine is, and what about it could explain a difference between two measurements."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from workers.devices import ACCELERATORS
from workers.devices.cuda import gpus

# Instruction sets that decide which kernels an inference library takes (x86 and Arm).
ISA_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "avx_vnni", "avx_vnni_int8", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
CXX = ("g++", "clang++")  # whose code can be loaded beside torch's, the preferred one first
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe(gpu: str = "") -> dict[str, Any]:
    """This machine: id, kind, cpu_model, isa, cores (that this process may use), cpu_quota, memory_bytes, os, governor,
    affinity, gpu, cxx (the C++ compiler that engines are compiled with).

    `memory_bytes` is the smaller of the machine's memory and the container's limit; `cpu_quota` is the container's
    limit of CPU time in CPUs (2.5), None without one. `gpu` is the one GPU of this worker, chosen as
    `devices.cuda.gpus.selected(gpu)`; with one, `kind` is "gpu" and the id is the GPU's. Never raises: what cannot be
    read is None.
    """
    card = gpus.selected(gpu)
    cpu = _cpuinfo()
    affinity = _affinity()
    memory = psutil.virtual_memory().total
    limit = _cgroup_memory_limit()
    model = cpu["model"] or platform.processor() or platform.machine() or "unknown"
    return {
        "id": f"gpu-{gpus.slug(str(card['name']))}" if card else f"cpu-{_slug(model)}-{len(affinity)}c",
        "kind": "gpu" if card else "cpu",
        "gpu": card,
        "cpu_model": model,
        "cpu_family": cpu["family"],
        "machine": platform.machine(),
        "isa": cpu["isa"],
        "cores": len(affinity),
        "cpu_quota": _cgroup_cpu_quota(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_machine": psutil.cpu_count(logical=True),
        "affinity": affinity,
        "governor": _read(_GOVERNOR),
        "memory_bytes": memory if limit is None else min(memory, limit),
        "os": f"{platform.system()} {platform.release()}",
        "hypervisor": cpu["hypervisor"],
        "python": platform.python_version(),
        "cxx": _cxx(),
    }


def fingerprint(description: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what decides an engine's speed here: CPU model and family, ISA flags, usable cores and the
    container's CPU quota; with a GPU also its name, compute capability, memory, driver, CUDA and TensorRT versions.

    Two machines of the same kind share it; memory, kernel version and governor are not part of it."""
    names = ("kind", "cpu_model", "cpu_family", "machine", "isa", "cores", "cpu_quota")
    parts = {k: description.get(k) for k in names}
    for accelerator in ACCELERATORS:
        parts |= accelerator.facts_of_speed(description)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def conditions(description: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What could explain a difference, as it stands now: load, affinity, governor, clock in MHz, memory in MB (10⁶
    bytes), quotas; and those of the accelerators that `description` has (a GPU's clocks, say)."""
    memory = psutil.virtual_memory()
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        frequency = None
    return {
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "affinity": _affinity(),
        "governor": _read(_GOVERNOR),
        "mhz": round(frequency.current) if frequency and frequency.current else None,
        "memory_available_mb": round(memory.available / 1e6),
        "cgroup_cpu_quota": _cgroup_cpu_quota(),
        "cgroup_memory_limit_mb": None if (limit := _cgroup_memory_limit()) is None else round(limit / 1e6),
        "processes_running": _processes_running(),
        **{k: v for a in ACCELERATORS for k, v in a.conditions(description or {}).items()},
    }


def instruction_sets() -> list[str]:
    """Those of `ISA_FLAGS` that the processor has."""
    return list(_cpuinfo()["isa"])


def _cpuinfo() -> dict[str, Any]:
    text = _read(_CPUINFO) or ""
    first = text.split("\n\n", 1)[0]
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first.splitlines())}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    family = [fields.get(k, "") for k in ("vendor_id", "cpu family", "model", "stepping", "CPU part")]
    return {
        "model": fields.get("model name") or fields.get("Model") or None,
        "family": "/".join(part for part in family if part) or None,
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "hypervisor": "hypervisor" in flags,
    }


def _cxx() -> str | None:
    """The first line of what the compiler says of itself; None where there is none."""
    path = next((found for name in CXX if (found := shutil.which(name))), None)
    if path is None:
        return None
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.splitlines()[0].strip() if told else None


def _affinity() -> list[int]:
    try:
        return sorted(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on this system
        return list(range(os.cpu_count() or 1))


def _slug(text: str) -> str:
    text = re.sub(r"\((?:r|tm|c)\)|\bcpu\b|\bprocessor\b|@.*$", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:48] or "unknown"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _cgroup_memory_limit() -> int | None:
    """Bytes, or None where nothing limits this process (cgroup v2, then v1)."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(_CGROUP / name)
        if text and text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def _cgroup_cpu_quota() -> float | None:
    """CPUs that the container may use, or None without a quota (cgroup v2, then v1)."""
    text = _read(_CGROUP / "cpu.max")
    if text:
        parts = text.split()
    else:
        parts = [_read(_CGROUP / f"cpu/cpu.cfs_{k}_us") or "" for k in ("quota", "period")]
    try:
        quota, period = int(parts[0]), int(parts[1])
    except (ValueError, IndexError):  # "max", or no cgroup
        return None
    return round(quota / period, 2) if quota > 0 and period > 0 else None


def _processes_running() -> int | None:
    """Runnable threads on the whole machine, this one included (4th field of /proc/loadavg)."""
    text = _read(Path("/proc/loadavg"))
    try:
        return int((text or "").split()[3].split("/")[0])
    except (IndexError, ValueError):
        return None
