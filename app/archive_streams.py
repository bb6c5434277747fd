"""The byte streams below `app.archives`: bounded views that count, and the errors and limits they stop with."""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Protocol

from app.errors import AppError
from app.tar_headers import DamagedTar

CHUNK = 1 << 20
# Below this many unpacked bytes a high ratio is no danger: weights of zeros do compress a thousandfold.
_RATIO_FLOOR = 8 << 20
REPACK = "Pack the files again with `zip -r` or `tar -cf`, and upload that."


class Stream(Protocol):
    """What `Archive.open` gives. `seekable()` is False for members that have to be inflated."""

    def read(self, size: int, /) -> bytes: ...
    def seek(self, position: int, /) -> int: ...
    def tell(self) -> int: ...
    def seekable(self) -> bool: ...


class SeekableFile(Protocol):
    """What an archive can be read from: an open file, or a `Window` of one."""

    def read(self, size: int, /) -> bytes: ...
    def seek(self, position: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...
    def close(self) -> None: ...


class ArchiveLimits(Protocol):
    """Of `app.settings.LimitSettings`, which the parsers do without: they run in processes that must start quickly."""

    @property
    def unpacked_bytes(self) -> int: ...
    @property
    def archive_members(self) -> int: ...
    @property
    def compression_ratio(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """Bounds of one archive: unpacked bytes, number of entries, unpacked bytes per byte of the archive."""

    max_bytes: int
    max_members: int
    max_ratio: float

    @classmethod
    def of(cls, settings: ArchiveLimits) -> Limits:
        return cls(settings.unpacked_bytes, settings.archive_members, settings.compression_ratio)

    def check(self, unpacked: int, packed: int) -> None:
        if unpacked > self.max_bytes:
            raise archive_error(
                "archive_too_large",
                f"The archive unpacks to more than the allowed {self.max_bytes} bytes.",
                "Upload a smaller archive, or ask the operator to raise LIMIT_UNPACKED_BYTES.",
            )
        if unpacked > max(_RATIO_FLOOR, packed * self.max_ratio):
            raise archive_error(
                "archive_bomb",
                f"The archive unpacks to more than {self.max_ratio:g} times its {packed} bytes.",
                "Pack the files without compression (`zip -0` or a plain .tar).",
            )

    def check_count(self, count: int) -> None:
        if count > self.max_members:
            raise archive_error(
                "archive_too_many_members",
                f"The archive has more than the allowed {self.max_members} members.",
                "Pack fewer and larger files.",
            )


def archive_error(code: str, detail: str, remedy: str | None = None) -> AppError:
    return AppError(code, "The archive cannot be accepted", 422, detail, remedy=remedy)


def invalid_archive(detail: str) -> AppError:
    return archive_error("archive_invalid", detail, REPACK)


@contextmanager
def damage_reported() -> Iterator[None]:
    """Turns what the decoders raise on damaged input into `archive_invalid`."""
    damage = (
        zipfile.BadZipFile, gzip.BadGzipFile, DamagedTar, zlib.error, struct.error, EOFError, ValueError, IndexError,
        OverflowError, RuntimeError,
    )  # fmt: skip
    try:
        yield
    except damage as e:
        raise invalid_archive(f"The archive is damaged or incomplete: {str(e)[:200] or type(e).__name__}.") from e


class Guarded:
    """Hides a file from zipfile but for reads up to `cap` bytes, so that no forged length becomes an allocation."""

    def __init__(self, file: SeekableFile, cap: int) -> None:
        self._file, self._cap = file, cap

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(min(size, self._cap + 1) if size >= 0 else self._cap + 1)
        if len(data) > self._cap:
            raise archive_error(
                "archive_too_many_members",
                f"The archive's directory is larger than the allowed {self._cap} bytes.",
                "Pack fewer files, with shorter names.",
            )
        return data

    def seek(self, position: int, whence: int = 0, /) -> int:
        if whence == 0 and position < 0:
            raise zipfile.BadZipFile("an offset lies before the start of the file")
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """The file belongs to the caller."""


class Window:
    """A seekable view of `size` bytes of a file, from `start`."""

    def __init__(self, file: SeekableFile, start: int, size: int) -> None:
        self._file, self._start, self.size = file, start, size
        self._at = 0

    def read(self, size: int, /) -> bytes:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(size, self.size - self._at)))
        self._at += len(data)
        return data

    def seek(self, position: int, whence: int = 0, /) -> int:
        base = (0, self._at, self.size)[whence]
        self._at = max(0, base + position)
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """The file belongs to the caller."""


class Inflated:
    """Forward-only: counts what comes out of a decompressor and stops at the limits."""

    def __init__(self, source: IO[bytes], limits: Limits, packed: int) -> None:
        self._source, self._limits, self._packed = source, limits, packed
        self._at = 0

    def read(self, size: int, /) -> bytes:
        with damage_reported():
            data = self._source.read(min(size, CHUNK))
        self._at += len(data)
        self._limits.check(self._at, self._packed)
        return data

    def seek(self, position: int, /) -> int:
        if position < self._at:
            raise invalid_archive("The archive's entries are out of order.")
        while self._at < position and self.read(position - self._at):
            pass
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return False


class Part:
    """The next `size` bytes of a forward-only stream."""

    def __init__(self, stream: Stream, size: int) -> None:
        self._stream, self.size, self._at = stream, size, 0

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(min(size, self.size - self._at))
        self._at += len(data)
        return data

    def seek(self, position: int, /) -> int:
        while self._at < position and self.read(position - self._at):
            pass
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return False
