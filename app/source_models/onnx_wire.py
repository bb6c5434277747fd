"""A bounded forward reader of the protobuf wire format, as far as ONNX needs it.

The format: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

from app.errors import AppError, invalid_model
from app.names import forbidden_character, printable

_BLOCK = 64 << 10
# A field takes about a microsecond; a graph of 100,000 nodes has about two million.
_MAX_FIELDS = 6_000_000


class ByteStream(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def seek(self, position: int, /) -> int: ...
    def seekable(self) -> bool: ...


def damaged(reason: str) -> AppError:
    return invalid_model(
        f"The file is not a valid ONNX model: {reason}.",
        remedy="Check that the whole file was uploaded; else export it again and run `onnx.checker.check_model`.",
    )


def check_name(name: str, what: str, at: int) -> str:
    """`name`, or `invalid_model` where it holds control characters; `at` is the byte where it starts."""
    if character := forbidden_character(name):
        raise invalid_model(
            f"The name of {what}, at byte {at}, holds the control character {character}: {name[:200]!r}.",
            tensor=printable(name[:200]),
            remedy="Rename it to printable characters, and export the model again.",
        )
    return name


class Wire:
    """Buffered reader of protobuf fields; `pos` is the position in the stream."""

    def __init__(self, stream: ByteStream, size: int) -> None:
        self._stream, self.size = stream, size
        self._buffer, self._at, self._start = b"", 0, 0
        self._fields_left = _MAX_FIELDS
        self._seekable = stream.seekable()

    @property
    def pos(self) -> int:
        return self._start + self._at

    def _fill(self) -> None:
        self._buffer = self._buffer[self._at :] + self._stream.read(_BLOCK)
        self._start += self._at
        self._at = 0

    def varint(self) -> int:
        """The next varint as an unsigned 64-bit number."""
        if self._at + 10 > len(self._buffer):
            self._fill()
        value = shift = 0
        for _ in range(10):
            if self._at >= len(self._buffer):
                raise damaged(f"it is truncated at byte {self.pos}")
            byte = self._buffer[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF
            shift += 7
        raise damaged(f"there is a malformed number before byte {self.pos}")

    def take(self, size: int) -> bytes:
        """The next bytes; `size` is a checked field length and bounded by the caller."""
        parts = self._buffer[self._at : self._at + size]
        self._at += len(parts)
        while len(parts) < size:
            self._fill()
            more = self._buffer[: size - len(parts)]
            if not more:
                raise damaged(f"it is truncated at byte {self.pos}")
            self._at += len(more)
            parts += more
        return parts

    def skip(self, size: int) -> None:
        left = size - (len(self._buffer) - self._at)
        if left <= 0:
            self._at += size
            return
        target = self.pos + size
        if self._seekable:
            self._stream.seek(target)
        else:
            while left:
                got = len(self._stream.read(min(left, 1 << 20)))
                if not got:
                    raise damaged(f"it is truncated at byte {target - left}")
                left -= got
        self._buffer, self._at, self._start = b"", 0, target

    def fields(self, end: int, *, ignored: re.Pattern[bytes] | None = None) -> Iterator[tuple[int, int]]:
        """Every field of the message that ends at byte `end`: its tag (number << 3 | wire type), and its value for a
        varint or its length for bytes. The bytes that the caller leaves unread are skipped.
        Runs of fields that match `ignored` are passed over at once, and are not counted as work."""
        while (pos := self.pos) < end:
            if ignored and (run := ignored.match(self._buffer, self._at, self._at + end - pos)):
                self._at = run.end()
                continue
            self._fields_left -= 1
            if self._fields_left < 0:
                raise damaged(f"it has more than {_MAX_FIELDS} fields")
            # Field numbers of onnx.proto are below 32: one tag byte, or two from 16 on.
            tag = self.varint()
            wire = tag & 7
            if tag < 8:
                raise damaged(f"there is no field at byte {pos}")
            if wire == 0:
                value = self.varint()
                if self.pos > end:
                    raise self._beyond(pos, end)
                yield tag, value
                continue
            if wire not in (1, 2, 5):
                raise damaged(f"there is no field at byte {pos}")
            length = self.varint() if wire == 2 else (8 if wire == 1 else 4)
            stop = self.pos + length
            if stop > end:
                raise self._beyond(pos, end)
            yield tag, length
            if self.pos > stop:
                raise damaged(f"the field at byte {pos} ends in the middle of a number")
            if self.pos != stop:
                self.skip(stop - self.pos)

    def _beyond(self, pos: int, end: int) -> AppError:
        if end == self.size:
            return damaged(f"it is truncated at byte {end}, inside the field that starts at byte {pos}")
        return damaged(f"the field at byte {pos} reaches beyond its message, which ends at byte {end}")
