"""Upload sessions as clients see them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from app.db.orm import Upload
from app.domain.upload_state import UploadState
from app.schemas import Filename, Resource
from app.storage.base import StoredPart
from app.uploads.parts import part_count

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class UploadIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    filename: Filename
    size_bytes: int = Field(ge=1, le=2**62)
    sha256: Sha256 | None = Field(default=None, description="Verified when the upload is completed")


class PartOut(BaseModel):
    number: int
    size_bytes: int


class PartUrl(BaseModel):
    number: int
    size_bytes: int = Field(description="What the part must have, exactly")
    url: str = Field(description="PUT it here; on S3 presigned")


class UploadError(BaseModel):
    """Why the session was aborted by the service."""

    model_config = ConfigDict(extra="allow")

    code: str
    detail: str
    remedy: str | None = None


class UploadOut(Resource):
    filename: str
    size_bytes: int
    sha256: str | None = Field(description="As declared; once completed, as computed")
    status: str = Field(examples=[*dict.fromkeys(state.public.value for state in UploadState)])
    error: UploadError | None = None
    part_size: int = Field(description="Bytes of each part but the last")
    parts: int = Field(description="How many parts there are to send")
    part_urls: list[str] = Field(description="PUT part 1, 2, … to these; on S3 they are presigned and bypass the API")
    received_parts: list[PartOut]
    expires_at: datetime

    @classmethod
    def of(cls, row: Upload, urls: list[str], received: Sequence[StoredPart]) -> UploadOut:
        self = f"/v1/uploads/{row.id}"
        return cls(
            id=row.id,
            created_at=row.created_at,
            filename=row.filename,
            size_bytes=row.size_bytes,
            sha256=row.sha256,
            status=UploadState(row.status).public,
            error=None if row.error is None else UploadError.model_validate(row.error),
            part_size=row.part_size,
            parts=part_count(row),
            part_urls=urls,
            received_parts=[PartOut(number=part.number, size_bytes=part.size_bytes) for part in received],
            expires_at=row.expires_at,
            links={"self": self, "complete": f"{self}/complete"},
        )
