"""How much of a GPU's memory an engine takes: by how much what is in use there grew while it was loaded and run.

The driver counts: weights, activations, workspace, the libraries' own memory and the CUDA context (NVML's
`nvmlDeviceGetMemoryInfo`). A worker has its GPU for itself while it measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.devices import gpus
from workers.kernel import backends


class DeviceMemory:
    """Since this object was made. For an engine on the CPU, or where the driver does not tell, nothing is known."""

    def __init__(self, backend: str, hardware: Mapping[str, Any]) -> None:
        known = backends().get(backend)
        card = (hardware.get("gpu") or {}) if known is not None and known.device != "cpu" else {}
        self._uuid: str | None = card.get("uuid")
        self._before = self._used_mb()

    def grown_mb(self) -> float | None:
        """MB (10⁶ bytes), or None."""
        now = self._used_mb()
        return None if now is None or self._before is None else max(0.0, now - self._before)

    def _used_mb(self) -> float | None:
        return None if self._uuid is None else gpus.memory_used_mb(self._uuid)


def limited_mb(figures: Mapping[str, Any]) -> float | None:
    """What `constraints.max_memory_mb` limits, of a benchmark's figures of one engine: the GPU's memory where it runs
    on one, else that of its process."""
    on_gpu = figures.get("gpu_memory_mb")
    value = figures.get("peak_memory_mb") if on_gpu is None else on_gpu
    return None if value is None else float(value)
