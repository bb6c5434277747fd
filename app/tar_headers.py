"""The headers of a tar stream (v7, ustar, pax, GNU long names), read forwards with flat memory.

Not the standard library's reader: that one takes a damaged or cut-off header in the middle for the end of the archive,
and allocates whatever an extended header asks for. Format: POSIX.1-2017 pax, and the GNU tar manual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

_BLOCK = 512
# Extended headers hold a few names and numbers.
_MAX_EXTENDED = 64 << 10
_MAX_EXTENDED_IN_A_ROW = 8


class DamagedTar(Exception):
    """The bytes are no tar archive, or not all of one."""


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def seek(self, position: int, /) -> int: ...
    def seekable(self) -> bool: ...


@dataclass(frozen=True)
class TarEntry:
    """One member: name as stored (surrogates for bytes that are not UTF-8), where its data starts, size in bytes.
    "other" stands for links, devices, FIFOs and sparse files."""

    name: str
    offset: int
    size: int
    kind: Literal["file", "folder", "other"]


def is_tar_header(block: bytes) -> bool:
    """Whether the checksum of a header block fits (all formats have it)."""
    if len(block) < _BLOCK or not any(block[:100]):
        return False
    try:
        stated = _number(block[148:156])
    except DamagedTar:
        return False
    return stated == sum(block[:148]) + 8 * 0x20 + sum(block[156:_BLOCK])


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    if not all(0x30 <= d <= 0x37 for d in digits):
        raise DamagedTar("a header holds a number that is none")
    return int(digits, 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _read(stream: _Stream, size: int, at: int) -> bytes:
    data = b""
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    if len(data) < size:
        raise DamagedTar(f"it is truncated at byte {at + len(data)}")
    return data


def _pax(data: bytes) -> dict[str, str]:
    """Records of the form `length key=value\\n`."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 8)
        if space < 0 or not data[at:space].isdigit():
            raise DamagedTar("an extended header is malformed")
        end = at + int(data[at:space])
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space + 1 or end > len(data) or not equals:
            raise DamagedTar("an extended header is malformed")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = end
    return records


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def read_tar(stream: _Stream) -> Iterator[TarEntry]:
    """Every member from the start of the stream to its end-of-archive block. The consumer may move the stream between
    two members; it is set to the next header by `seek`, which a forward-only stream does by reading."""
    at = 0
    extended: dict[str, str] = {}
    for_all: dict[str, str] = {}
    in_a_row = 0
    while True:
        stream.seek(at)
        block = _read(stream, _BLOCK, at)
        if not any(block):
            # An inflated stream is read to its end, so that all of it is checked.
            while not stream.seekable() and stream.read(1 << 20):
                pass
            return
        if not is_tar_header(block):
            raise DamagedTar(f"there is no header at byte {at}")
        kind, size, at = block[156:157], _number(block[124:136]), at + _BLOCK
        if kind in (b"x", b"g", b"L", b"K"):
            in_a_row += 1
            if size > _MAX_EXTENDED or in_a_row > _MAX_EXTENDED_IN_A_ROW:
                raise DamagedTar(f"the extended headers at byte {at} are too large")
            data = _read(stream, size, at)
            at += _padded(size)
            if kind == b"g":
                for_all.update(_pax(data))
            elif kind == b"x":
                extended.update(_pax(data))
            elif kind == b"L":
                extended["path"] = _text(data)
            continue
        entry = _entry(block, size, at, {**for_all, **extended})
        yield entry
        at += _padded(entry.size)
        extended, in_a_row = {}, 0


def _entry(block: bytes, size: int, offset: int, extended: dict[str, str]) -> TarEntry:
    name = _text(block[:100])
    # GNU's own format keeps times where ustar has the prefix.
    if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):
        name = f"{prefix}/{name}"
    name = extended.get("path", name)
    kind: Literal["file", "folder", "other"]
    if any(key.startswith("GNU.sparse") for key in extended):
        kind = "other"
    elif block[156:157] == b"5" or (block[156:157] in b"0\0" and name.endswith("/")):
        kind = "folder"
    else:
        kind = "file" if block[156:157] in (b"0", b"\0", b"7") else "other"
    if "size" in extended:
        if not (extended["size"].isascii() and extended["size"].isdigit() and len(extended["size"]) < 20):
            raise DamagedTar("an extended header holds a size that is no number")
        size = int(extended["size"])
    return TarEntry(name, offset, size if kind == "file" else 0, kind)
