"""What the service answers, typed: dicts as they came, whose known members are attributes too."""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any, ClassVar, Union

_ABSENT = object()


class Answer(dict[str, Any]):
    """A JSON object of the service: `answer["member"]` is what was sent, `answer.member` the same, typed.

    As attributes, objects are Answers themselves and times are `datetime`s; a member that an older service does not
    send has its default. Members that this version of the client does not know are there as items.
    """

    _defaults: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, *, defaults: Mapping[str, Any] | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls._defaults = {**cls._defaults, **(defaults or {})}

    def __getattr__(self, name: str) -> Any:
        hint = _hints(type(self)).get(name, _ABSENT)
        if hint is _ABSENT:
            raise AttributeError(f"{type(self).__name__} has no member {name!r}")
        if name in self:
            return _read(hint, self[name])
        if name in self._defaults:
            return copy.copy(self._defaults[name])
        if types.NoneType in typing.get_args(hint):
            return None
        raise AttributeError(f"The service sent no {name!r} with this {type(self).__name__}.")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is what the service answered; it has no attribute to set.")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_hints(type(self))})


class Manifest(Answer):
    """Inputs, stage keys, options, library versions and digests of a job: enough to run it again."""


@cache
def _hints(cls: type[Answer]) -> dict[str, Any]:
    return {name: hint for name, hint in typing.get_type_hints(cls).items() if not name.startswith("_")}


def _read(hint: Any, value: Any) -> Any:
    """The value as its annotation says; as it is where it is something else."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not types.NoneType]
        return _read(kinds[0], value) if value is not None and len(kinds) == 1 else value
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], item) for item in value]
    if origin is dict and isinstance(value, dict):
        return {name: _read(arguments[1], item) for name, item in value.items()}
    if isinstance(hint, type):
        if issubclass(hint, Answer) and isinstance(value, dict):
            return value if isinstance(value, hint) else hint(value)
        if hint is datetime and isinstance(value, str):
            return datetime.fromisoformat(value)
    return value
