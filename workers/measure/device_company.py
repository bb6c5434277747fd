"""What disturbs a GPU while engines are timed on it: processes that were there before, and what slows it down. By NVML
where it tells; held against a stand-in of it in the tests."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from workers.devices import gpus
from workers.kernel import backends

# Of the GPU's time, by the largest sample: what an idle server's heartbeat does not reach.
MOST_BUSY_PERCENT = 5
_OWN_DOING = ("power cap",)  # what an engine that works hard meets by itself, on every such card


class DeviceCompany:
    """Of one benchmark: made before its engines are loaded, asked after every round. Who is on the GPU then is somebody
    else; processes in a container do not know their own ids as the driver counts them."""

    def __init__(self, names: Iterable[str], hardware: Mapping[str, Any]) -> None:
        known = backends()
        on_gpu = any(known[name].device != "cpu" for name in names if name in known)
        card = (hardware.get("gpu") or {}) if on_gpu else {}
        self._uuid: str | None = card.get("uuid")
        self._strangers = gpus.processes(self._uuid) if self._uuid else set()
        self._since = time.time()

    def __call__(self) -> str | None:
        """What disturbed the GPU since the last call; None where nothing did, or nothing tells."""
        if self._uuid is None:
            return None
        since, self._since = self._since, time.time()
        slowed = [r for r in gpus.state(self._uuid).get("throttled") or () if r not in _OWN_DOING]
        if slowed:
            return f"the GPU was slowed down ({', '.join(slowed)})"
        busy = gpus.busy_processes(self._uuid, since)
        others = [share for pid, share in busy.items() if pid in self._strangers and share > MOST_BUSY_PERCENT]
        return f"other processes took {max(others)} % of the GPU's time" if others else None
