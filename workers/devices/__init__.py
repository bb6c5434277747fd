"""What differs by accelerator stands here, one module each: locks, facts, memory, baseline, company. Nothing else asks
which one it is."""

from __future__ import annotations

from collections.abc import Collection

from workers import kernel
from workers.devices.accelerator import Accelerator
from workers.devices.cpu import Cpu
from workers.devices.cuda import Cuda

HOST: Accelerator = Cpu()  # every machine has it
ACCELERATORS: tuple[Accelerator, ...] = (Cuda(), HOST)  # the preferred one first, where a job leaves it to us

_BY_NAME = {accelerator.name: accelerator for accelerator in ACCELERATORS}


def named(name: str) -> Accelerator:
    return _BY_NAME[name]


def preferred(names: Collection[str]) -> Accelerator:
    """Of those with these names; the machine's own processor where there is none of them."""
    return next((a for a in ACCELERATORS if a.name in names), HOST)


def of_backend(backend: str) -> Accelerator:
    """Where this backend's engines run; the machine's own processor where there is no such backend."""
    known = kernel.backends().get(backend)
    return HOST if known is None else named(known.device)
