"""Engines that are several (`kernel.Backend.members`): which libraries they take, and what their bundle runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.artifacts import BY_BATCH, CHAINED
from workers.kernel import Backend, backends


def names_of(backend: str, runtime: Mapping[str, Any]) -> tuple[str, ...]:
    """This backend, and those of the engines that it loads with this `runtime`."""
    kind = backends().get(backend)
    return (backend, *(m.backend for m in kind.members(runtime))) if kind is not None else (backend,)


def chooser_of(device: str) -> type[Backend] | None:
    """The backend that puts engines of this device side by side."""
    return next((b for b in backends().values() if b.engine_format == BY_BATCH and b.device == device), None)


def linker_of(device: str) -> type[Backend]:
    """The backend that calls engines of this device one after the other."""
    return next(b for b in backends().values() if b.engine_format == CHAINED and b.device == device)


def scripts_of(backend: str, runtime: Mapping[str, Any]) -> dict[str, str]:
    """The `infer.py` of a bundle, and of each engine in it where those are several: file → source."""
    known = backends()
    kind = known[backend]()
    found = {"infer.py": kind.infer_script(runtime)}
    for member in kind.members(runtime):
        found[f"{member.folder}/infer.py"] = known[member.backend]().infer_script(member.runtime)
    return found
