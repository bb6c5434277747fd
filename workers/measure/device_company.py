"""What disturbs the devices while engines are timed on them, where they are other than the machine's own processor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from workers import devices


class DeviceCompany:
    """Of one benchmark: made before its engines are loaded, asked after every round. Who is on a device then is
    somebody else. `names`: the engines' backends."""

    def __init__(self, names: Iterable[str], hardware: Mapping[str, Any]) -> None:
        used = dict.fromkeys(devices.of_backend(name) for name in names)
        self._watches = [watch for a in used if (watch := a.company(hardware)) is not None]

    def __call__(self) -> str | None:
        """What disturbed a device since the last call; None where nothing did, or nothing tells."""
        told = [watch() for watch in self._watches]
        return next((reason for reason in told if reason is not None), None)
