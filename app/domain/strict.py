"""What every part of a job's spec is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.domain.limits import INT32_MAX

Dimension = Annotated[int, Field(ge=1, le=INT32_MAX)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class Strict(BaseModel):
    """Unknown fields and numbers that are none are refused; what was said does not change. The string below a field is
    its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
