"""Shapes that several resources share."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Item = TypeVar("Item")
UploadName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Filename = Annotated[str, StringConstraints(min_length=1, max_length=255)]


class Resource(BaseModel):
    """What every resource has. Times are RFC 3339 in UTC."""

    id: str
    created_at: datetime
    links: dict[str, str] = Field(description="Paths of this API that belong to the resource")


class Expiring(Resource):
    """A resource that a policy may delete."""

    expires_at: datetime | None = Field(
        default=None, description="When the tenant's retention deletes it; not before a job that uses it has ended"
    )


class ItemPage(BaseModel, Generic[Item]):
    """One page, newest first."""

    items: list[Item]
    next_cursor: str | None = Field(description="`cursor` of the next page; null on the last one")


class Tensor(BaseModel):
    """Lower-case dtype as ONNX names it (`float32`, `int64` …); a symbolic dimension is a string."""

    model_config = ConfigDict(extra="allow")

    name: str
    dtype: str
    shape: list[int | str | None] | None


class FromUpload(BaseModel):
    """Make the resource out of a completed upload session."""

    model_config = ConfigDict(extra="forbid")

    name: UploadName | None = None
    upload_id: str = Field(pattern="^[a-z]{3}_[0-9a-zA-Z]{1,60}$")
