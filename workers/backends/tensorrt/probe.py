"""What TensorRT and which GPU this machine has, found out without starting CUDA in this process.

A child asks the driver. Without a driver TensorRT's runtime still returns an object, which takes the process down when
it is freed; and a process that has started CUDA must not fork any more.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from app.domain.failures import FailureKind, StageFailure

_TIMEOUT_S = 60.0

# CUDA driver API; attributes 75 and 76 are the compute capability. Only the standard library: the child starts fast
# and says the same where no CUDA package is installed.
_CHILD = """
import ctypes, json, re, sys
def out(**facts):
    print(json.dumps(facts)); sys.stdout.flush()
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    out(error="no NVIDIA driver: " + str(error)); raise SystemExit
code = cuda.cuInit(0)
if code:
    out(error="the NVIDIA driver answers error %d" % code, code=code); raise SystemExit
count, version, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
code = cuda.cuDeviceGetCount(ctypes.byref(count)) or cuda.cuDriverGetVersion(ctypes.byref(version))
if code or not count.value:
    out(error="the NVIDIA driver finds no GPU", code=code); raise SystemExit
name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
cuda.cuDeviceGet(ctypes.byref(device), 0)
cuda.cuDeviceGetName(name, 256, device)
cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
capability = []
for attribute in (75, 76):
    value = ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    capability.append(str(value.value))
driver = ""
try:
    found = re.search(r"(\\d+\\.\\d+(?:\\.\\d+)?)", open("/proc/driver/nvidia/version").readline())
    driver = found.group(1) if found else ""
except OSError:
    pass
out(name=name.value.decode(errors="replace"), compute_capability=".".join(capability), memory_bytes=total.value,
    cuda="%d.%d" % (version.value // 1000, version.value % 1000 // 10), driver=driver, devices=count.value)
"""


@dataclass(frozen=True)
class Gpu:
    """The first visible GPU. `compute_capability` as "9.0"; `cuda`: the newest version that the driver knows.
    `devices`: 0 for one that is built for and is not here; its memory is not known (0)."""

    name: str
    compute_capability: str
    memory_bytes: int
    cuda: str
    driver: str
    devices: int = 1

    @classmethod
    def elsewhere(cls, compute_capability: str) -> Gpu:
        return cls(f"any GPU of compute capability {compute_capability}", compute_capability, 0, "", "", 0)

    @property
    def here(self) -> bool:
        return self.devices > 0

    def supports(self, major: int, minor: int = 0) -> bool:
        return capability(self.compute_capability) >= (major, minor)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def capability(text: str) -> tuple[int, int]:
    """ "8.9" → (8, 9); (0, 0) for what is no compute capability."""
    major, _, minor = str(text).partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() and (minor or "0").isdigit() else (0, 0)


@functools.cache
def probe_gpu() -> Gpu | str:
    """The GPU, or why there is none. Asked once per process (about 0.1 s)."""
    return gpu_from(ask_driver())


def ask_driver() -> Mapping[str, Any]:
    """The child's answer; `{"error": …}` also where it crashed or hung."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=dict(os.environ),
        )
        answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return {"error": f"the NVIDIA driver could not be asked: {type(error).__name__}"}
    if not isinstance(answer, dict):
        return {"error": f"asking the NVIDIA driver ended with status {done.returncode}"}
    return answer


def gpu_from(answer: Mapping[str, Any]) -> Gpu | str:
    if "error" in answer:
        return str(answer["error"])
    fields = ("name", "compute_capability", "memory_bytes", "cuda", "driver", "devices")
    return Gpu(**{k: answer[k] for k in fields})


def require_gpu() -> Gpu:
    """Raises StageFailure(`gpu_unavailable`)."""
    found = probe_gpu()
    if isinstance(found, str):
        raise StageFailure(
            "gpu_unavailable",
            f"TensorRT needs an NVIDIA GPU with its driver; {found}.",
            FailureKind.INFRASTRUCTURE,
            remedy="Run the worker on a machine where nvidia-smi lists a GPU (docs/gpu.md).",
            cacheable=False,
        )
    return found
