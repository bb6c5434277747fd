"""What is uploaded before a job: a file, or what is there already under its id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anneal_client.cli import values
from anneal_client.cli.exits import Exit, Stop
from anneal_client.cli.service import Service

_REMEDIES = {
    "mdl": "Give a file (.onnx, .pt2, a .zip or .tar of one) or the id of an uploaded model: `anneal models`.",
    "dst": "Give an .npz, an archive of them, or the id of an uploaded data set: `anneal datasets`.",
}


def require(prefix: str, given: str, where: str) -> None:
    """Before anything is sent: a file that is there, or what looks like an id. Raises `Stop`."""
    if not values.is_id(prefix, given) and not Path(given).expanduser().exists():
        what = f"There is no file {given[:200]!r}."
        raise Stop(what, where=where, remedy=_REMEDIES[prefix], exit=Exit.USAGE)


def model(service: Service, given: str, name: str | None) -> dict[str, Any]:
    """The uploaded model: `given` is the id of one, or a file; an .onnx with its weights beside it goes whole."""
    if values.is_id("mdl", given):
        return service.client.model(given)
    path = Path(given).expanduser()
    return service.client.upload_model(path, name or path.stem)


def dataset(service: Service, given: str) -> dict[str, Any]:
    if values.is_id("dst", given):
        return service.client.dataset(given)
    path = Path(given).expanduser()
    return service.client.upload_dataset(path, path.stem)
