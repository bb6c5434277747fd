"""Uploaded ML models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.db.orm import SourceModel
from app.library import FileLibrary
from app.source_models.inspect import inspect_model


class SourceModelService(FileLibrary[SourceModel]):
    kind = "model"
    prefix = "mdl"
    table = SourceModel

    def inspect(self, path: Path, filename: str) -> dict[str, Any]:
        info = inspect_model(path, filename, self._settings.limits)
        detail = {
            "producer": info.producer,
            "ops": info.ops,
            "external_data": info.external_data,
            **info.detail,
        }
        return {
            "format": info.format,
            "inputs": [dict(tensor) for tensor in info.inputs],
            "outputs": [dict(tensor) for tensor in info.outputs],
            "opset": info.opset,
            "detail": detail,
        }
