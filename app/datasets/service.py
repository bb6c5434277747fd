"""Uploaded calibration and validation data."""

from __future__ import annotations

from app.db.orm import Dataset
from app.library import FileLibrary


class DatasetService(FileLibrary[Dataset]):
    kind = "data set"
    prefix = "dst"
    table = Dataset
