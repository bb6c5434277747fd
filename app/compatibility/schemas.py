"""What `GET /v1/models/{id}/compatibility` answers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from app.db.orm import Examination


class RefusedOut(BaseModel):
    """Something of the model that the backend does not take, and what to do about it."""

    code: str
    reason: str
    node: str | None = None
    op: str | None = None
    tensor: str | None = None
    remedy: str | None = None


class PrecisionOut(BaseModel):
    """Whether something of the graph can be in this precision, and what the device must have for it."""

    name: str
    admitted: bool
    reason: str | None = None
    needs: str | None = None
    how: str | None = Field(None, description="What was done to find out")


class BackendCompatibilityOut(BaseModel):
    """What one backend says. `accepted` is null while the answer is pending, or where it could not be told."""

    name: str
    status: str = Field(examples=["pending", "answered", "failed"])
    accepted: bool | None = None
    how: str | None = Field(None, description="What was done to find out")
    refused: list[RefusedOut] = []
    refused_count: int = 0
    precisions: list[PrecisionOut] = []
    changes: list[str] = Field([], description="What to change, so that it is taken")
    notes: list[str] = []
    versions: dict[str, str] = {}
    answered_at: datetime | None = None
    error: dict[str, Any] | None = None

    @classmethod
    def of(cls, row: Examination) -> BackendCompatibilityOut:
        told = {k: v for k, v in (row.answer or {}).items() if k in cls.model_fields}
        status = {"asked": "pending"}.get(row.status, row.status)
        return cls(name=row.backend, status=status, answered_at=row.answered_at, error=row.error, **told)


class CompatibilityOut(BaseModel):
    """Which backends take the model. `pending` until every backend that a live worker can ask has answered."""

    model_id: str
    status: str = Field(examples=["pending", "complete"])
    detail: str | None = None
    backends: list[BackendCompatibilityOut]
    links: dict[str, str]

    @classmethod
    def of(cls, model_id: str, rows: Sequence[Examination]) -> CompatibilityOut:
        waits = [row.backend for row in rows if row.status == "asked"]
        detail = f"An idle worker answers for {', '.join(waits)}." if waits else None
        if not rows:
            detail = "No live worker can examine this model: the answer comes once one does."
        model = f"/v1/models/{model_id}"
        return cls(
            model_id=model_id,
            status="pending" if detail else "complete",
            detail=detail,
            backends=[BackendCompatibilityOut.of(row) for row in rows],
            links={"self": f"{model}/compatibility", "model": model},
        )
