"""Options of a backend, from JSON to their model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from app.domain.failures import FailureKind, StageFailure

OptionsT = TypeVar("OptionsT", bound=BaseModel)


def parsed(cls: type[OptionsT], options: Mapping[str, Any], whose: str) -> OptionsT:
    """`whose`: the library, as its messages name it. Raises StageFailure(`invalid_backend_options`)."""
    try:
        return cls.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise StageFailure(
            "invalid_backend_options",
            f"Option {name!r} of {whose} is not valid: {first['msg']}.",
            FailureKind.REQUEST,
            remedy=f"Use {', '.join(cls.model_fields)}.",
        ) from None
