"""Uploaded files as a stage's inputs."""

from __future__ import annotations

from app.db.orm import Dataset, SourceModel
from app.domain.artifact_key import ArtifactRef, FileRef

_OF_MODELS = {"onnx": ".onnx", "pt2": ".pt2"}


def source_ref(model: SourceModel) -> ArtifactRef:
    """The input `source` of stage export."""
    extension = _OF_MODELS.get(model.format, archive_suffix(model.filename))
    return ArtifactRef((FileRef(f"source{extension}", model.sha256, model.size_bytes),))


def dataset_ref(row: Dataset) -> ArtifactRef:
    suffix = ".npz" if row.format == "npz" else archive_suffix(row.filename)
    return ArtifactRef((FileRef(f"data{suffix}", row.sha256, row.size_bytes),))


def archive_suffix(filename: str) -> str:
    lower = filename.lower()
    return next((s for s in (".tar.gz", ".tgz", ".tar", ".zip") if lower.endswith(s)), ".zip")
