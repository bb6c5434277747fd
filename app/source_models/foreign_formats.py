"""Recognises what is no accepted model, so that the refusal can say how to make one of it."""

from __future__ import annotations

import posixpath
from collections.abc import Collection
from dataclasses import dataclass

# What stands between the backticks runs as it is, given `torch`, `model` and `example_inputs`.
MAKE_PT2 = (
    "Where the model's code is, run `program = torch.export.export(model.eval(), example_inputs, "
    "dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in example_inputs)); "
    'torch.export.save(program, "model.pt2")` with example_inputs a tuple of tensors with a batch of at least 2, and '
    "upload model.pt2. Where the service has no PyTorch yet, which a .pt2 needs, `anneal serve --with torch` adds it."
)
_TENSORFLOW = (
    "Convert it with `python -m tf2onnx.convert --saved-model FOLDER --opset 18 --output model.onnx`, and upload that."
)
_KERAS = "Write a SavedModel with `model.export('FOLDER')`. " + _TENSORFLOW
_WEIGHTS_ONLY = (
    "Such a file holds weights and no graph. Load them into the model's code, then: " + MAKE_PT2 + " For Hugging Face "
    "models `optimum-cli export onnx --model MODEL folder` makes an .onnx."
)
_ORIGINAL = "Upload the .onnx that it was made from."
_UNPACKED = "Upload the .onnx itself, or a .zip or .tar(.gz) with the .onnx and its data files."
_DATASET = "Upload data to POST /v1/datasets; a model is an .onnx, a .zip or .tar of one, or a .pt2."
_ACCEPTED = "Upload an .onnx, a .zip or .tar holding one .onnx and its data files, or a .pt2 (torch.export)."


@dataclass(frozen=True)
class Foreign:
    """What the file is, and how to get to a model this service takes."""

    what: str
    remedy: str


_AT_START: tuple[tuple[bytes, Foreign], ...] = (
    (b"\x89HDF\r\n\x1a\n", Foreign("an HDF5 file (Keras .h5)", _KERAS)),
    (b"GGUF", Foreign("a GGUF file", _WEIGHTS_ONLY)),
    (b"ftrt", Foreign("a TensorRT engine, which is bound to the GPU it was built on", _ORIGINAL)),
    (b"\x93NUMPY", Foreign("a NumPy array", _DATASET)),
    (b"PAR1", Foreign("a Parquet file", _DATASET)),
    (b"7z\xbc\xaf\x27\x1c", Foreign("a 7z archive", _UNPACKED)),
    (b"Rar!\x1a\x07", Foreign("a RAR archive", _UNPACKED)),
    (b"\xfd7zXZ\x00", Foreign("an xz-compressed file", _UNPACKED)),
    (b"BZh", Foreign("a bzip2-compressed file", _UNPACKED)),
    (b"\x28\xb5\x2f\xfd", Foreign("a zstd-compressed file", _UNPACKED)),
    (b"\x7fELF", Foreign("a program or library", _ACCEPTED)),
    (
        b"version https://git-lfs.github.com/spec/",
        Foreign("a Git LFS pointer, not the file it stands for", "Run `git lfs pull`, and upload the real file."),
    ),
)


def foreign_format(head: bytes, filename: str) -> Foreign | None:
    """By the first kilobytes of a file."""
    for magic, foreign in _AT_START:
        if head.startswith(magic):
            return foreign
    # Pickle protocols 2 to 5; the first thing is a frame, a dictionary, a tuple, a global, torch's magic number, …
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return Foreign(
            "a pickled object (a legacy PyTorch checkpoint, joblib, …), and unpickling runs code from the file",
            MAKE_PT2 + " For scikit-learn, convert with skl2onnx.",
        )
    if head[4:8] == b"TFL3":
        return Foreign(
            "a TensorFlow Lite model", "Run `python -m tf2onnx.convert --tflite FILE --opset 18 --output model.onnx`."
        )
    if head[4:8] == b"ORTM":
        return Foreign("a model in ONNX Runtime's own format", _ORIGINAL)
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 32:
        return Foreign("a safetensors file", _WEIGHTS_ONLY)
    if filename.lower().endswith(".pb") and head[:1] == b"\x08":
        return Foreign("a TensorFlow SavedModel's graph", _TENSORFLOW)
    return _text(head)


def _text(head: bytes) -> Foreign | None:
    text = head.decode("utf-8", "ignore")
    if len(text.encode()) < len(head) - 3 or any(ord(c) < 32 and c not in "\t\n\r\f" for c in text):
        return None
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.startswith(("<!doctype html", "<html")):
        return Foreign(
            "an HTML page", "A download probably answered with an error page: fetch the model again. " + _ACCEPTED
        )
    if start.startswith("<?xml") or start.startswith("<net"):
        return Foreign("an XML file (OpenVINO IR?)", _ORIGINAL)
    return Foreign("a text file", _ACCEPTED)


def foreign_archive(names: Collection[str]) -> Foreign | None:
    """By the names of the members of a `.zip` or `.tar`."""
    bases = {posixpath.basename(n) for n in names}
    if "constants.pkl" in bases and any("/code/" in f"/{n}" for n in names):
        return Foreign("a TorchScript archive", MAKE_PT2)
    if "data.pkl" in bases:
        return Foreign("a pickled PyTorch checkpoint (torch.save), and unpickling runs code from the file", MAKE_PT2)
    if any("/aotinductor/" in f"/{n}" for n in names):
        return Foreign("a compiled AOTInductor package, which is bound to its machine", MAKE_PT2)
    if "saved_model.pb" in bases:
        return Foreign("a TensorFlow SavedModel", _TENSORFLOW)
    if "model.weights.h5" in bases:
        return Foreign("a Keras model", _KERAS)
    if any(b.endswith(".mlmodel") for b in bases):
        return Foreign("a Core ML model", _ORIGINAL)
    if names and all(n.endswith((".npy", ".npz")) for n in names):
        return Foreign("a data set", _DATASET)
    return None
