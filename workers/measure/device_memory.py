"""How much of its device's memory an engine takes: by how much what is in use there grew while it was loaded and
run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers import devices


class DeviceMemory:
    """Since this object was made. For an engine on the machine's own processor, or where the driver does not tell,
    nothing is known."""

    def __init__(self, backend: str, hardware: Mapping[str, Any]) -> None:
        self._device = devices.of_backend(backend)
        self._hardware = hardware
        self._before = self._device.memory_used_mb(hardware)

    def grown_mb(self) -> float | None:
        """MB (10⁶ bytes), or None."""
        now = self._device.memory_used_mb(self._hardware)
        return None if now is None or self._before is None else max(0.0, now - self._before)


def limited_mb(figures: Mapping[str, Any]) -> float | None:
    """What `constraints.max_memory_mb` limits, of a benchmark's figures of one engine: the GPU's memory where it runs
    on one, else that of its process."""
    on_gpu = figures.get("gpu_memory_mb")
    value = figures.get("peak_memory_mb") if on_gpu is None else on_gpu
    return None if value is None else float(value)
