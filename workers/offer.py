"""What a worker offers on its machine: backends, and the queues that it takes jobs from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from app.queue.messages import SPECIAL_FORMATS, device_of_kind, queue_for
from workers import devices, kernel
from workers.libraries import model_formats

log = structlog.get_logger(__name__)


def backends_of(hardware: Mapping[str, Any]) -> list[kernel.BackendInfo]:
    """Those that can run here."""
    infos = [_probed(backend, hardware) for backend in kernel.backends().values()]
    return [info for info in infos if info is not None]


def queues_of(backends: Sequence[kernel.BackendInfo], hardware: Mapping[str, Any]) -> list[str]:
    """Of each device that these backends run on, of its kind, and of this very hardware; by model format."""
    names = {d for b in backends for d in b.devices} | {devices.HOST.name}
    kinds = [device_of_kind(a.name, k) for a in devices.ACCELERATORS if a.name in names and (k := a.kind(hardware))]
    return [
        queue_for(device, machine, model_format)
        for model_format in ("onnx", *(f for f in SPECIAL_FORMATS if f in model_formats()))
        for device, machine in (*((d, None) for d in sorted([*names, *kinds])), ("", str(hardware["id"])))
    ]


def _probed(backend: type[kernel.Backend], hardware: Mapping[str, Any]) -> kernel.BackendInfo | None:
    """What it offers here. One that breaks its contract and raises takes the worker down no more than one that is not
    there."""
    try:
        return backend().probe(hardware)
    except Exception:
        log.exception("probe_failed", backend=backend.name)
        return None
