"""Uploaded models as clients see them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from app.blobs.retention import Policy
from app.db.orm import SourceModel
from app.schemas import Expiring, ItemPage, Tensor


class ModelOut(Expiring):
    name: str
    filename: str
    format: str = Field(examples=["onnx", "archive", "pt2"])
    sha256: str
    size_bytes: int
    inputs: list[Tensor]
    outputs: list[Tensor]
    opset: int | None
    detail: dict[str, Any] = Field(
        description="Producer, op counts, the outline (ops in order, repeated blocks once) and what else the file says"
    )

    @classmethod
    def of(cls, row: SourceModel, policy: Policy) -> ModelOut:
        self = f"/v1/models/{row.id}"
        return cls(
            id=row.id,
            created_at=row.created_at,
            expires_at=policy.until("models", row.created_at),
            name=row.name,
            filename=row.filename,
            format=row.format,
            sha256=row.sha256,
            size_bytes=row.size_bytes,
            inputs=[Tensor.model_validate(tensor) for tensor in row.inputs],
            outputs=[Tensor.model_validate(tensor) for tensor in row.outputs],
            opset=row.opset,
            detail=row.detail,
            links={
                "self": self,
                "download": f"{self}/download",
                "compatibility": f"{self}/compatibility",
                "jobs": f"/v1/jobs?model_id={row.id}",
            },
        )


class ModelPage(ItemPage[ModelOut]):
    """Uploaded models."""
