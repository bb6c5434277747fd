"""What is uploaded before a job: a file, or what is there already under its id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anneal_client.cli import values
from anneal_client.cli.exits import Exit, Stop
from anneal_client.cli.service import Service


def model(service: Service, given: str, name: str | None) -> dict[str, Any]:
    """The uploaded model: `given` is the id of one, or a file; an .onnx with its weights beside it goes whole."""
    if values.is_id("mdl", given):
        return service.client.model(given)
    path = Path(given).expanduser()
    if not path.exists():
        remedy = "Give a file (.onnx, .pt2, a .zip or .tar of one) or the id of an uploaded model: `anneal models`."
        raise Stop(f"There is no file {given[:200]!r}.", where="MODEL", remedy=remedy, exit=Exit.USAGE)
    return service.client.upload_model(path, name or path.stem)


def dataset(service: Service, given: str, option: str) -> dict[str, Any]:
    if values.is_id("dst", given):
        return service.client.dataset(given)
    path = Path(given).expanduser()
    if not path.exists():
        remedy = "Give an .npz, an archive of them, or the id of an uploaded data set: `anneal datasets`."
        raise Stop(f"There is no file {given[:200]!r}.", where=option, remedy=remedy, exit=Exit.USAGE)
    return service.client.upload_dataset(path, path.stem)
