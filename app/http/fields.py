"""What a field that is none should have been called: the names that are allowed where it stands."""

from __future__ import annotations

import types
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

_MOST_NAMES = 40


def unknown_field(model: Any, steps: Sequence[str | int]) -> str:
    """The message for an unknown field at `steps` below `model`, which is the type of a request's body."""
    allowed = allowed_names(model, steps[:-1])
    if not allowed:
        return "there is no such field"
    given = str(steps[-1]).lower()
    words = {*given.split("_")}
    # max_loss means max_accuracy_loss_percent, although max_samples has more letters in common.
    close = [name for name in allowed if len(words) > 1 and words <= {*name.split("_")}]
    close = close or get_close_matches(given, allowed, n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]}?" if close else "."
    return f"there is no such field{meant} Fields here: {', '.join(allowed[:_MOST_NAMES])}"


def allowed_names(model: Any, steps: Sequence[str | int]) -> list[str]:
    """The fields of the model at `steps`; empty where no model stands there."""
    found = _models(model)
    for step in steps:
        found = [below for kind in found for below in _below(kind, step)]
    models = [kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return list(dict.fromkeys(field.alias or name for kind in models for name, field in kind.model_fields.items()))


def _below(kind: Any, step: str | int) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(step))
        return _models(field.annotation) if field is not None else []
    arguments = get_args(kind)  # of a list its items, of a dictionary its values
    return _models(arguments[-1]) if arguments else []


def _models(annotation: Any) -> list[Any]:
    """What a value of this type may be, without what stands around it."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _models(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _models(part)]
    return [annotation]
