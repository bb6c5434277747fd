"""The bundle's other kinds: its own files in another order.

What is stored is one .zip whose members are not compressed. A kind is a .tar of some of them under other names, made
while it is sent: no weight is stored twice, and any part of it can be asked for. The worker that makes the bundle tells
in it what belongs to which kind (`KINDS_FILE`), with the digest of the .tar.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, BinaryIO, Literal

BundleKind = Literal["python", "triton", "kserve"]
PYTHON: BundleKind = "python"  # the .zip itself

KINDS_FILE = "kinds.json"
_BLOCK = 512
_MTIME = 315532800  # 1980-01-01, as in the .zip
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a .zip's member: its signature, the lengths of its name and extra field
_READ = 1 << 20
_MOST_INDEX = 4 << 20  # bytes of `KINDS_FILE`
AGAIN = "Run the job again: engines of this version have it."

# Opens so many bytes of a stored .zip from an offset on; None: all.
Opener = Callable[[int, int | None], BinaryIO]


class KindMissing(Exception):
    """The bundle has no such kind; the message says why, and what to do."""


@dataclass(frozen=True)
class Piece:
    """`length` bytes: these, or those of the .zip from `start` on. `source`: of which .zip, where there are several."""

    length: int
    content: bytes | None = None
    start: int = 0
    source: int = 0


END = Piece(2 * _BLOCK, bytes(2 * _BLOCK))  # of a .tar


@dataclass(frozen=True)
class Rearranged:
    """A kind as it is sent."""

    pieces: tuple[Piece, ...]
    sha256: str
    size_bytes: int


def pieces_of(bundle: BinaryIO, files: Mapping[str, str]) -> list[Piece]:
    """The .tar of `files` (path in it → member of the .zip), in order of their paths. Raises ValueError where a path
    leads out of the archive or a member is compressed, KeyError where there is no such member."""
    pieces: list[Piece] = []
    with zipfile.ZipFile(bundle) as archive:
        for path in sorted(files):
            member = archive.getinfo(files[path])
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
            pieces += _entry(path, Piece(member.file_size, None, _start(bundle, member)))
    return [*pieces, END]


def text_pieces(texts: Mapping[str, bytes]) -> list[Piece]:
    """The part of a .tar that holds these files, without its `END`."""
    return [piece for path in sorted(texts) for piece in _entry(path, Piece(len(texts[path]), texts[path]))]


def _entry(path: str, content: Piece) -> list[Piece]:
    header = _header(path, content.length)
    rest = -content.length % _BLOCK
    return [Piece(len(header), header), content, *([Piece(rest, bytes(rest))] if rest else [])]


def index_of(files: Mapping[str, Mapping[str, Any]], bundle: BinaryIO) -> bytes:
    """Content of `KINDS_FILE`: each kind with {"files"}, to which the .tar's digest and size are added, or {"reason"}
    why there is none."""
    told: dict[str, Any] = {}
    for kind, entry in files.items():
        told[kind] = dict(entry)
        if "files" in entry:
            pieces = pieces_of(bundle, entry["files"])
            told[kind] |= {"sha256": digest([bundle], pieces), "size_bytes": sum(p.length for p in pieces)}
    return json.dumps(told, indent=1, sort_keys=True).encode()


def rearranged(bundle: BinaryIO, kind: BundleKind) -> Rearranged:
    """How this kind is sent. Raises `KindMissing`."""
    entry, pieces = entry_of(bundle, kind)
    return Rearranged(tuple(pieces), str(entry["sha256"]), int(entry["size_bytes"]))


def entry_of(bundle: BinaryIO, kind: BundleKind) -> tuple[dict[str, Any], list[Piece]]:
    """What the bundle says of this kind, and the pieces of its .tar. Raises `KindMissing`."""
    try:
        with zipfile.ZipFile(bundle) as archive:
            if archive.getinfo(KINDS_FILE).file_size > _MOST_INDEX:
                raise ValueError(f"{KINDS_FILE} is too large")
            entry: dict[str, Any] = json.loads(archive.read(KINDS_FILE))[kind]
        if "files" not in entry:
            raise KindMissing(str(entry["reason"]))
        pieces = pieces_of(bundle, entry["files"])
    except KindMissing:
        raise
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise KindMissing(f"the bundle was made without it. {AGAIN}") from error
    if sum(p.length for p in pieces) != entry["size_bytes"]:
        raise KindMissing(f"what the bundle says of it does not fit its files. {AGAIN}")
    return entry, pieces


class Joined(io.RawIOBase):
    """A stream over `length` bytes of the pieces from `start`; each part of a .zip is opened when it is reached.
    `opened`: for each .zip that the pieces are of."""

    def __init__(
        self, pieces: Sequence[Piece], opened: Sequence[Opener], start: int = 0, length: int | None = None
    ) -> None:
        self._parts = _cut(pieces, start, length)
        self._opened = opened
        self._part: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer at the end of a piece; all where it is negative."""
        if size < 0:
            return b"".join(iter(lambda: self.read(_READ), b""))
        while True:
            if self._part is None:
                piece = next(self._parts, None)
                if piece is None:
                    return b""
                found = piece.content
                opened = self._opened[piece.source]
                self._part = opened(piece.start, piece.length) if found is None else io.BytesIO(found)
            if block := self._part.read(size):
                return block
            self._part.close()
            self._part = None

    def close(self) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None
        super().close()


class Stored(io.RawIOBase):
    """The stored .zip as a file that can be sought in; each read asks the storage, so wrap it in a `BufferedReader`."""

    def __init__(self, opened: Opener, size: int) -> None:
        self._opened, self._size, self._at = opened, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError("before the start of the file")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        with self._opened(self._at, length) as stream:
            content = stream.read(length)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _header(path: str, size: int) -> bytes:
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or parts[0] == "/" or "\\" in path:
        raise ValueError(f"{path!r} leads out of the archive")
    info = tarfile.TarInfo(path)
    info.size, info.mode, info.mtime = size, 0o644, _MTIME
    return info.tobuf(tarfile.PAX_FORMAT)


def _start(bundle: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: its local header may be longer than the directory's."""
    bundle.seek(member.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(bundle.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise ValueError(f"{member.filename} is not where the directory says")
    return member.header_offset + _LOCAL_HEADER.size + int(name) + int(extra)


def digest(bundles: Sequence[BinaryIO], pieces: Sequence[Piece]) -> str:
    """SHA-256 of what these pieces of the bundles make up."""
    found = hashlib.sha256()
    for piece in pieces:
        if piece.content is not None:
            found.update(piece.content)
            continue
        bundle = bundles[piece.source]
        bundle.seek(piece.start)
        left = piece.length
        while left and (block := bundle.read(min(_READ, left))):
            found.update(block)
            left -= len(block)
    return found.hexdigest()


def _cut(pieces: Sequence[Piece], start: int, length: int | None) -> Iterator[Piece]:
    """What of the pieces lies in these bytes."""
    end = None if length is None else start + length
    at = 0
    for piece in pieces:
        first = max(start - at, 0)
        last = piece.length if end is None else min(piece.length, end - at)
        if first < last:
            content = None if piece.content is None else piece.content[first:last]
            yield Piece(last - first, content, piece.start + first, piece.source)
        at += piece.length
