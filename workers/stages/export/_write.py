"""Writing the model artifact: one file where it fits a protobuf message, else `model.onnx.data` beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from onnx import ModelProto, TensorProto

from workers.artifacts import DATA_FILE
from workers.graph.onnx_files import INLINE_LIMIT_BYTES, MODEL_FILE
from workers.graph.onnx_graph import all_tensors, external_tensors
from workers.stages.export._source import External, copy_range, point_to

_ALIGNMENT = 4096  # a page: ONNX Runtime maps the file into memory
_SMALL_BYTES = 1024  # what stays in the model file: shapes, axes, scalars, that shape inference reads


def externalize(model: ModelProto, where: Sequence[External], out: Path) -> None:
    """Put the weights of a large model into `out/model.onnx.data` and point the model there.

    `where`: `locate`'s answer; its files are scratch files, consumed here. A single one is moved as it is; several are
    joined, and a range that tensors share is written once.
    """
    target = out / DATA_FILE
    if len({at.file for at in where}) == 1 and model.ByteSize() <= INLINE_LIMIT_BYTES:
        shutil.move(where[0].file, target)  # no hard link: onnx's checker takes those for an attack
        for tensor, at in zip(external_tensors(model), where, strict=True):
            point_to(tensor, DATA_FILE, at.offset, at.length)
        return
    remaining = iter(where)
    placed: dict[External, int] = {}
    with target.open("wb") as file:
        for tensor in all_tensors(model):
            if tensor.data_location == TensorProto.EXTERNAL:
                at = next(remaining)
                if at not in placed:
                    placed[at] = _align(file)
                    copy_range(at.file, at.offset, at.length, file)
                point_to(tensor, DATA_FILE, placed[at], at.length)
            elif len(tensor.raw_data) > _SMALL_BYTES:
                offset, length = _align(file), len(tensor.raw_data)
                file.write(tensor.raw_data)
                point_to(tensor, DATA_FILE, offset, length)


def _align(file: BinaryIO) -> int:
    """Move to the next page; returns the position."""
    return file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)


def write_model(model: ModelProto, folder: Path) -> Path:
    """Write `folder/model.onnx`; external data must stand in the folder already. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_FILE
    path.write_bytes(model.SerializeToString())
    return path
