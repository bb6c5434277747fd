"""Uploaded calibration and validation data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.datasets.inspect import inspect_dataset
from app.db.orm import Dataset
from app.library import FileLibrary


class DatasetService(FileLibrary[Dataset]):
    kind = "data set"
    prefix = "dst"
    table = Dataset

    def inspect(self, path: Path, filename: str) -> dict[str, Any]:
        info = inspect_dataset(path, filename, self._settings.limits)
        return {
            "format": info.format,
            "samples": info.samples,
            "arrays": [dict(array) for array in info.arrays],
        }
