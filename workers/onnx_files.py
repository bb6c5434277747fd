"""Files of an ONNX model artifact: `model.onnx`, and `model.onnx.data` beside it where the weights are too many."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from onnx import ModelProto

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

# A protobuf message cannot pass 2 GiB; above this the weights go into a file of their own.
INLINE_LIMIT_BYTES = 1_500_000_000


def link_or_copy(source: Path, target: Path) -> None:
    """Give `source` a second name, or copy it where the disk has no hard links. Artifact files are never written to."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file())


def size_of(folder: Path) -> int:
    """Bytes of all files in a flat folder."""
    return sum(p.stat().st_size for p in files_of(folder))


def read_skeleton(path: Path) -> ModelProto:
    """The model without what lies in external files; raises `google.protobuf.message.DecodeError`."""
    model = ModelProto()
    model.ParseFromString(path.read_bytes())
    return model
