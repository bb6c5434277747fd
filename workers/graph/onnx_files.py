"""Files of an ONNX model artifact: `model.onnx`, and `model.onnx.data` beside it where the weights are too many."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from workers.artifacts import DATA_FILE

MODEL_FILE = "model.onnx"

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


def load_model(path: Path) -> ModelProto:
    """The model with all its weights. Unlike `onnx.load` it takes external files with several hard links, as artifacts
    in a local store have them; raises `google.protobuf.message.DecodeError`, ValueError."""
    model = read_skeleton(path)
    for tensor in model.graph.initializer:
        read_external(tensor, path.parent)
    return model


def read_external(tensor: TensorProto, folder: Path) -> None:
    """Put the external data of `tensor` into it, from a file in `folder` itself; nothing to do without."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return
    place = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / place["location"]
    if file.parent != folder or file.is_symlink() or not file.is_file():
        raise ValueError(f"tensor {tensor.name!r} lies in {place['location']!r}, which is no file of the model")
    with file.open("rb") as data:
        data.seek(int(place.get("offset", 0)))
        tensor.raw_data = data.read(int(place["length"]) if "length" in place else -1)
    tensor.ClearField("data_location")
    del tensor.external_data[:]


def save_model(model: ModelProto, folder: Path) -> Path:
    """Write `model.onnx`, with `model.onnx.data` beside it where the model is large; the same model, the same bytes.

    A graph whose references to external data were not loaded is written as it is.
    """
    path = folder / MODEL_FILE
    if _is_large(model):
        onnx.save_model(model, str(path), save_as_external_data=True, location=DATA_FILE, size_threshold=1024)
    else:
        path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def _is_large(model: ModelProto) -> bool:
    """By the loaded weights: protobuf cannot tell the size of a message over 2 GiB."""
    loaded = [i for i in model.graph.initializer if i.data_location != TensorProto.EXTERNAL]
    sizes = (int(np.prod(i.dims)) * helper.tensor_dtype_to_np_dtype(i.data_type).itemsize for i in loaded)
    return sum(sizes) > INLINE_LIMIT_BYTES
