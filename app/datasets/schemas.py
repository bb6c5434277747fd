"""Data sets as clients see them."""

from __future__ import annotations

from pydantic import Field

from app.blobs.retention import Policy
from app.db.orm import Dataset
from app.schemas import Expiring, ItemPage, Tensor


class DatasetOut(Expiring):
    name: str
    filename: str
    format: str = Field(examples=["npz", "zip", "tar"])
    sha256: str
    size_bytes: int
    samples: int
    arrays: list[Tensor] = Field(description="The shape is that of one sample, without the first axis")

    @classmethod
    def of(cls, row: Dataset, policy: Policy) -> DatasetOut:
        self = f"/v1/datasets/{row.id}"
        return cls(
            id=row.id,
            created_at=row.created_at,
            expires_at=policy.until("datasets", row.created_at),
            name=row.name,
            filename=row.filename,
            format=row.format,
            sha256=row.sha256,
            size_bytes=row.size_bytes,
            samples=row.samples,
            arrays=[Tensor.model_validate(array) for array in row.arrays],
            links={"self": self, "download": f"{self}/download"},
        )


class DatasetPage(ItemPage[DatasetOut]):
    """Uploaded data sets."""
