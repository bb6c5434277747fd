"""Which files an `.onnx` takes its weights from: read off its protobuf, without the library.

Only what can hold a tensor is looked into (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto); the bytes of
weights are skipped, so it takes the time of the nodes and none of the size.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from anneal_client.errors import AnnealError

# Message: {number of a field: the message in it}
_GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _ENTRY, _TRAINING = range(8)
_MODEL_FIELDS = {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION}
_FIELDS: dict[int, dict[int, int]] = {
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _TENSOR: {13: _ENTRY},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
}
_MAX_DEPTH = 100


class _Damaged(Exception):
    """Not a protobuf; the service will say what is wrong with it."""


def external_data(model: Path) -> list[str]:
    """The files beside `model` that hold its tensors, as paths relative to it, sorted. Raises `AnnealError`: one of
    them is missing (`external_data_missing`), or lies outside of the model's folder (`external_data_outside`)."""
    if model.stat().st_size == 0:
        return []
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            found = sorted(set(_locations(data, 0, len(data), _MODEL_FIELDS)))
        except (_Damaged, UnicodeDecodeError):
            return []
    for name in found:
        _check(model, name)
    return found


def _check(model: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise AnnealError(
            "external_data_outside",
            f"{model.name} takes weights from {name!r}, which is not in its folder.",
            remedy="Save it again beside its weights: onnx.save(model, path, save_as_external_data=True).",
        )
    if not (model.parent / path).is_file():
        raise AnnealError(
            "external_data_missing",
            f"{model.name} takes weights from {name!r}, which is not beside it in {model.parent}.",
            remedy=f"Put {name} into {model.parent}, or export with external_data=False.",
        )


def _locations(data: mmap.mmap, start: int, end: int, fields: dict[int, int], depth: int = 0) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise _Damaged
    for number, begin, stop in _members(data, start, end):
        kind = fields.get(number)
        if kind == _ENTRY:
            entry = {n: data[b:s] for n, b, s in _members(data, begin, stop)}
            if entry.get(1) == b"location":
                yield entry.get(2, b"").decode()
        elif kind is not None:
            yield from _locations(data, begin, stop, _FIELDS[kind], depth + 1)


def _members(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of every member with a length (https://protobuf.dev/programming-guides/encoding)."""
    while at < end:
        key, at = _varint(data, at, end)
        match key & 7:
            case 0:
                _, at = _varint(data, at, end)
            case 1:
                at += 8
            case 2:
                length, at = _varint(data, at, end)
                if at + length > end:
                    raise _Damaged
                yield key >> 3, at, at + length
                at += length
            case 5:
                at += 4
            case _:
                raise _Damaged


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise _Damaged
