"""Tables of classes by name: who may stand in one."""

from __future__ import annotations

from typing import Any


class AlreadyRegistered(Exception):
    """Two stages or two backends claim the same name, or to be the reference for one kind of artifact."""


def enter(table: dict[str, type[Any]], cls: type[Any]) -> None:
    """`cls` under its `name`; one without is a base of others. Raises `AlreadyRegistered`."""
    name = vars(cls).get("name")
    if not isinstance(name, str):
        return
    there = table.get(name)
    if there is not None and (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
        raise AlreadyRegistered(f"{name!r} is already registered by {there.__module__}")
    if getattr(cls, "reference", False):
        for other in table.values():
            if other.reference and other.engine_format == cls.engine_format and other is not there:
                raise AlreadyRegistered(f"{other.name!r} is already the reference for {cls.engine_format!r}")
    table[name] = cls
