"""What of an MLflow model the service takes."""

from __future__ import annotations

from pathlib import Path

from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME

from anneal_client.errors import AnnealError
from anneal_client.mlflow.flavor import FLAVOR_NAME


def uploadable(folder: Path) -> Path:
    """The file to upload of a downloaded MLflow model: its `.pt2` or its `.onnx` (weights beside it go with it).
    Nothing is unpickled.

    Raises AnnealError `already_an_engine`, `unsupported_flavor`."""
    flavors = Model.load(str(folder / MLMODEL_FILE_NAME)).flavors
    if FLAVOR_NAME in flavors:
        raise AnnealError("already_an_engine", "The model is an engine that Anneal made.")
    for suffix in (".pt2", ".onnx"):
        found = sorted(p for p in folder.rglob(f"*{suffix}") if p.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(p.relative_to(folder).as_posix() for p in found)
            raise AnnealError("unsupported_flavor", f"The model has several {suffix} files: {names}.")
    raise AnnealError(
        "unsupported_flavor",
        f"A model of the flavours {', '.join(sorted(flavors))} has no .onnx and no .pt2.",
        remedy="Log it with mlflow.onnx.log_model(), or as a torch.export program; the client's from_… helpers export.",
    )
