"""Engines as clients see them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from app.blobs.retention import Policy
from app.db.orm import Engine
from app.schemas import Expiring, ItemPage


class EngineOut(Expiring):
    job_id: str
    model_id: str
    backend: str
    format: str
    precision: str
    filename: str
    sha256: str
    size_bytes: int
    bundle_filename: str
    bundle_sha256: str
    bundle_size_bytes: int
    hardware: dict[str, Any] = Field(description="What it was built and measured on")
    runtime: dict[str, Any] = Field(description="The options to load it with")
    metrics: dict[str, Any]

    @classmethod
    def of(cls, row: Engine, policy: Policy) -> EngineOut:
        self = f"/v1/engines/{row.id}"
        return cls(
            id=row.id,
            created_at=row.created_at,
            expires_at=policy.until("engines", row.created_at),
            job_id=row.job_id,
            model_id=row.model_id,
            backend=row.backend,
            format=row.format,
            precision=row.precision,
            filename=row.filename,
            sha256=row.sha256,
            size_bytes=row.size_bytes,
            bundle_filename=row.bundle_filename,
            bundle_sha256=row.bundle_sha256,
            bundle_size_bytes=row.bundle_size_bytes,
            hardware=row.hardware,
            runtime=row.runtime,
            metrics=row.metrics,
            links={
                "self": self,
                "download": f"{self}/download",
                "bundle": f"{self}/bundle",
                "bundle_triton": f"{self}/bundle?kind=triton",
                "bundle_kserve": f"{self}/bundle?kind=kserve",
                "job": f"/v1/jobs/{row.job_id}",
                "model": f"/v1/models/{row.model_id}",
            },
        )


class EnginePage(ItemPage[EngineOut]):
    """Delivered engines."""
