"""Uploaded ML models."""

from __future__ import annotations

from app.db.orm import SourceModel
from app.library import FileLibrary


class SourceModelService(FileLibrary[SourceModel]):
    kind = "model"
    prefix = "mdl"
    table = SourceModel
