"""The real TensorRT for RTX: its parser and builder work without a GPU, its runtime does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest

from app.domain.failures import StageFailure
from tests.factories import onnx_models as models
from workers import installation
from workers.backends.tensorrt import TensorRtRtxBackend
from workers.kernel import Reporter

KEY = b"k" * installation.KEY_BYTES
TARGET = "8.9"


class Recorder(Reporter):
    def __init__(self) -> None:
        self.told: list[tuple[float, str]] = []
        self.notes: list[str] = []

    def progress(self, fraction: float, message: str = "") -> None:
        self.told.append((fraction, message))

    def note(self, message: str, **facts: Any) -> None:
        self.notes.append(message)


@contextmanager
def signing(folder: Path | None = None) -> Iterator[None]:
    with installation.using(installation.Installation(KEY, folder)):
        yield


def built(
    model: onnx.ModelProto | Path, root: Path, reporter: Reporter | None = None, **options: Any
) -> tuple[dict[str, Any], Path]:
    """What the build said, and the folder of the engine."""
    root.mkdir(exist_ok=True)
    source = model if isinstance(model, Path) else models.folder(model, root / "model")
    out = root / "engine"
    out.mkdir(exist_ok=True)
    with signing():
        told = TensorRtRtxBackend().build(source, out, {"target": TARGET, **options}, reporter or Recorder())
    return told, out


def refused(model: onnx.ModelProto | Path, root: Path, **options: Any) -> StageFailure:
    with pytest.raises(StageFailure) as caught:
        built(model, root, **options)
    assert caught.value.remedy
    assert not list((root / "engine").iterdir()), "nothing half-made is left"
    return caught.value
