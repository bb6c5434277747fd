"""NVIDIA GPUs: the accelerator (here), the driver's facts (`gpus`), and one interface over CUDA (`runtime`)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from workers.candidates import Case
from workers.devices.accelerator import Accelerator, Hardware
from workers.devices.cuda import gpus

_SHARE = 0.85  # of a GPU's memory: each process has a CUDA context of its own
# Of the GPU's time, by the largest sample: what an idle server's heartbeat does not reach.
MOST_BUSY_PERCENT = 5
_DEVICE_FILES = ("nvidia*", "dxg", "nvhost*", "nvmap")  # a server's or desktop's, Windows', a Jetson's
_OWN_DOING = ("power cap",)  # what an engine that works hard meets by itself, on every such card


class UnknownGpu(Exception):
    """The GPU that this worker was given is none of the machine's."""


def compute_capability(hardware: Hardware) -> float:
    """Of the worker's GPU, e.g. 9.0; 0 where there is none."""
    try:
        return float((hardware.get("gpu") or {}).get("compute_capability") or 0)
    except (TypeError, ValueError, AttributeError):
        return 0.0


class Cuda(Accelerator):
    """The worker's one GPU, `hardware["gpu"]`."""

    name: ClassVar[str] = "cuda"
    baseline_backend: ClassVar[str] = "onnxruntime-cuda"
    # A GPU's clocks follow its load: between the turns of a small engine they fall, and a call takes half as long
    # again. That is no company (which the driver tells, as it does throttling), and the rounds' ratios cancel it.
    most_drift: ClassVar[float] = 2.0
    # The rounds' ratios scatter with the clocks: quiet, by 1.20 to 1.27.
    most_wide: ClassVar[float] = 1.3
    tells_parts: ClassVar[bool] = True
    int8_activations: ClassVar[Literal["uint8", "int8"]] = "int8"
    triton_group: ClassVar[str] = "KIND_GPU"
    pod_resource: ClassVar[str | None] = "nvidia.com/gpu"

    def label(self, hardware: Hardware) -> str | None:
        return str(_card(hardware).get("name") or "") or None

    def lock(self, hardware: Hardware) -> str | None:
        return re.sub(r"[^A-Za-z0-9-]+", "-", str(_card(hardware).get("uuid") or self.name))

    def memory_bytes(self, hardware: Hardware, limit: float) -> float:
        own = _card(hardware).get("memory_bytes")
        return min(limit, _SHARE * own) if own else limit

    def wanted(self, hardware: Hardware, case: Case) -> Iterator[str]:  # noqa: ARG002
        return iter(())

    def kind(self, hardware: Hardware) -> str | None:
        return str(_card(hardware).get("compute_capability") or "") or None

    def facts_of_speed(self, hardware: Hardware) -> dict[str, Any]:
        card = _card(hardware)
        return {"gpu": gpus.facts_of_speed(card)} if card else {}

    def device_files(self, hardware: Hardware) -> Sequence[str]:
        if not _card(hardware):
            return ()
        return sorted(str(path) for pattern in _DEVICE_FILES for path in Path("/dev").glob(pattern))

    def conditions(self, hardware: Hardware) -> dict[str, Any]:
        card = _card(hardware)
        return {"gpu": gpus.state(str(card["uuid"]))} if card else {}

    def memory_used_mb(self, hardware: Hardware) -> float | None:
        """As the driver counts: weights, activations, workspace, the libraries' own memory and the CUDA context (NVML's
        `nvmlDeviceGetMemoryInfo`). A worker has its GPU for itself while it measures."""
        uuid = _card(hardware).get("uuid")
        return None if uuid is None else gpus.memory_used_mb(str(uuid))

    def reading(self, hardware: Hardware) -> dict[str, float]:
        uuid = _card(hardware).get("uuid")
        return {} if uuid is None else gpus.reading(str(uuid))

    def company(self, hardware: Hardware) -> Callable[[], str | None] | None:
        uuid = _card(hardware).get("uuid")
        return None if uuid is None else _Company(str(uuid))


class _Company:
    """Processes that were on a GPU before, and what slows it down. By NVML where it tells; held against a stand-in of
    it in the tests. Who comes later is an engine of the measurement; processes in a container do not know their own ids
    as the driver counts them."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self._strangers = gpus.processes(uuid)
        self._since = time.time()

    def __call__(self) -> str | None:
        since, self._since = self._since, time.time()
        slowed = [r for r in gpus.state(self._uuid).get("throttled") or () if r not in _OWN_DOING]
        if slowed:
            return f"the GPU was slowed down ({', '.join(slowed)})"
        busy = gpus.busy_processes(self._uuid, since)
        others = [share for pid, share in busy.items() if pid in self._strangers and share > MOST_BUSY_PERCENT]
        return f"other processes took {max(others)} % of the GPU's time" if others else None


def confine(hardware: Hardware, asked: str) -> None:
    """Let this process's children see the worker's one GPU and no other; or none, for which it holds no lock. `asked`:
    the setting that names it. Raises `UnknownGpu` where it names none of this machine."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # CUDA's numbers are nvidia-smi's
    card = _card(hardware)
    if asked and not card:
        raise UnknownGpu(f"WORKER_GPU={asked} names no GPU of this machine: `nvidia-smi -L` lists them.")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(card["uuid"]) if card else "-1"


def _card(hardware: Hardware) -> Mapping[str, Any]:
    return hardware.get("gpu") or {}
