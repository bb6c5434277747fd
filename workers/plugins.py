"""Backends and stages from other packages. An installed distribution names its classes as entry points:

    [project.entry-points."anneal.backends"]
    toy = "anneal_toy:ToyBackend"

One that cannot be used (an import that fails, a name that is taken, a method that is missing) is left out and told, in
the worker's log and in its capabilities; everything else goes on.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from dataclasses import asdict, dataclass
from typing import Any

from workers import devices, kernel

BACKENDS, STAGES = "anneal.backends", "anneal.stages"
_BASES: dict[str, type[Any]] = {BACKENDS: kernel.Backend, STAGES: kernel.Stage}
_LONGEST_PROBLEM = 500


@dataclass(frozen=True)
class Plugin:
    """One entry point. `problem`: why it cannot be used; None where it can."""

    group: str
    name: str
    distribution: str
    version: str
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@functools.cache
def load(group: str) -> tuple[Plugin, ...]:
    """Import what is installed in this group, once per process; what can be used is registered then. Never raises."""
    points = sorted(importlib.metadata.entry_points(group=group), key=lambda p: p.name)
    return tuple(_loaded(point) for point in points)


def found() -> list[Plugin]:
    """All that are installed."""
    return [plugin for group in _BASES for plugin in load(group)]


def _loaded(point: importlib.metadata.EntryPoint) -> Plugin:
    before = kernel.registered()
    try:
        named = point.load()
        problem = _why_not(named, _BASES[point.group])
    except (Exception, SystemExit) as error:  # whatever it is that runs at its import
        named, problem = None, f"{type(error).__name__}: {error}"[:_LONGEST_PROBLEM]
    kernel.unregister(kernel.registered() - before)  # what else its module defines: each has an entry point of its own
    dist = point.dist
    if problem is None:
        named.distribution = dist.name if dist else ""
        kernel.register(named)
    return Plugin(point.group, point.name, dist.name if dist else "", dist.version if dist else "", problem)


def _why_not(named: Any, base: Any) -> str | None:
    if not (isinstance(named, type) and issubclass(named, base)):
        return f"it names {named!r}, which is no {base.__name__}"[:_LONGEST_PROBLEM]
    cls: Any = named
    if inspect.isabstract(cls):
        return f"{cls.__name__} lacks {', '.join(sorted(cls.__abstractmethods__))}"
    needed = ("name", "engine_format") if base is kernel.Backend else ("name", "Options")
    missing = [name for name in needed if not hasattr(cls, name)]
    if missing:
        return f"{cls.__name__} lacks {', '.join(missing)}"
    known = [a.name for a in devices.ACCELERATORS]
    if base is kernel.Backend and cls.device not in known:
        return f"{cls.__name__} runs on {cls.device!r}; this service knows {', '.join(known)}"
    return None
