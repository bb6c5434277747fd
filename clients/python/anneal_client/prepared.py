"""Files that the client makes of what people have: in a temporary folder that goes with the object."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Prepared:
    """A file that the client made; give it wherever a path is taken (`upload_model`, `upload_dataset`, `optimize`). It
    is deleted with the object, at the latest at the end of a `with` block."""

    def __init__(self, filename: str) -> None:
        folder = tempfile.mkdtemp(prefix="anneal-")
        self.path = Path(folder, filename)
        self._delete = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def __fspath__(self) -> str:
        return str(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Delete the file."""
        self._delete()

    def save(self, folder: str | Path) -> Path:
        """A copy of the file, with those that lie beside it, in `folder`."""
        shutil.copytree(self.path.parent, folder, dirs_exist_ok=True)
        return Path(folder, self.path.name)


class Dataset(Prepared):
    """A data set. `samples`: how many; `inputs`: what a job has to be told of axes (`optimize` tells it by itself)."""

    samples: int = 0

    def __init__(self, filename: str, inputs: dict[str, Any] | None = None) -> None:
        super().__init__(filename)
        self.inputs: dict[str, Any] = inputs or {}

    def __repr__(self) -> str:
        return f"<data set {self.path.name}: {self.samples} samples>"


class ExportedModel(Prepared):
    """A model as it was exported. `difference`: the largest one between what the model and the export computed, over
    the largest number of that output; None where nothing could be compared, and `note` says why."""

    difference: float | None = None
    note: str | None = None

    def __repr__(self) -> str:
        checked = self.note or f"differs by {self.difference:.1e}"
        return f"<model {self.path.name}: {checked}>"
