"""The header of a `.npy` array (versions 1 to 3), read without numpy and without unpickling.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from dataclasses import dataclass
from typing import Protocol

from app.domain.limits import INT64_MAX
from app.errors import AppError, invalid_dataset

_MAGIC = b"\x93NUMPY"
# numpy's own limit for headers that it did not make itself.
_MAX_HEADER_BYTES = 10_000
_MAX_RANK = 32
# A literal needs no operators: without them the parser cannot be made to nest.
_LITERAL = re.compile(r"[\w\s{}()\[\],.:'\"<>=|]*", re.ASCII)

_DTYPES = {
    "b1": "bool", "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64", "u1": "uint8", "u2": "uint16",
    "u4": "uint32", "u8": "uint64", "f2": "float16", "f4": "float32", "f8": "float64",
}  # fmt: skip


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class NpyHeader:
    """`shape` with the first axis; `total_bytes` is what the whole `.npy` takes, header and data."""

    dtype: str
    shape: tuple[int, ...]
    total_bytes: int


def read_npy_header(stream: _Readable, array: str, where: str) -> NpyHeader:
    """Raises `invalid_dataset`; `array` and `where` (the file it stands in) only serve the message."""

    def damaged(reason: str) -> AppError:
        return invalid_dataset(
            f"The array {array!r} in {where} is no valid .npy: {reason}.",
            tensor=array,
            remedy="Write the file again with `numpy.savez`.",
        )

    start = _take(stream, 8)
    if len(start) < 8 or not start.startswith(_MAGIC):
        raise damaged("it does not start with the .npy magic")
    if start[6] not in (1, 2, 3):
        raise damaged(f"it has the unknown version {start[6]}.{start[7]}")
    width = 2 if start[6] == 1 else 4
    field = _take(stream, width)
    length = int.from_bytes(field, "little")
    if len(field) < width or length > _MAX_HEADER_BYTES:
        raise damaged("its header is truncated or too long")
    raw = _take(stream, length)
    if len(raw) < length:
        raise damaged("its header is truncated")
    try:
        text = raw.decode("utf-8" if start[6] == 3 else "latin-1")
        if not _LITERAL.fullmatch(text):
            raise ValueError("unexpected characters")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            header = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as e:
        raise damaged("its header is not a plain dictionary") from e
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise damaged("its header has not the keys descr, fortran_order and shape")
    shape = header["shape"]
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MAX_RANK
        or not all(type(d) is int and 0 <= d <= INT64_MAX for d in shape)
    ):
        raise damaged("its shape is not a tuple of sizes")
    dtype = _dtype(header["descr"], array, where)
    item_bytes = int(header["descr"][2:])
    return NpyHeader(dtype, shape, 8 + width + length + math.prod(shape) * item_bytes)


def _take(stream: _Readable, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


def _dtype(descr: object, array: str, where: str) -> str:
    who = f"The array {array!r} in {where}"
    if not isinstance(descr, str):
        raise invalid_dataset(
            f"{who} has a structured type.", tensor=array, remedy="Store each field as an array of its own."
        )
    order, code = descr[:1], descr[1:]
    if code[:1] == "O":
        raise invalid_dataset(
            f"{who} holds pickled Python objects, and unpickling runs code from the file.",
            tensor=array,
            remedy="Convert it to a number type, e.g. `numpy.stack(arrays).astype('float32')`; pad ragged rows.",
        )
    if code[:1] in ("U", "S", "a"):
        raise invalid_dataset(
            f"{who} holds text.",
            tensor=array,
            remedy="Tokenize or encode it: numbers for inputs, class indices for labels.",
        )
    if code not in _DTYPES or order not in ("<", ">", "|", "="):
        raise invalid_dataset(
            f"{who} has the type {descr[:50]!r}, which no model input takes.",
            tensor=array,
            remedy="Convert it with `array.astype(...)` to bool, an integer type, float16, float32 or float64.",
        )
    if order == ">" and code[1:] != "1":
        raise invalid_dataset(
            f"{who} is big-endian.",
            tensor=array,
            remedy="Convert it with `array.astype(array.dtype.newbyteorder('<'))`.",
        )
    return _DTYPES[code]
