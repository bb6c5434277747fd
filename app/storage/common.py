"""What both storage adapters share: the rules of keys, the translation of OS errors."""

from __future__ import annotations

import ctypes
import errno
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from app.errors import storage_full, storage_unavailable
from app.storage.base import InvalidUpload, StoredPart

MAX_KEY_LENGTH = 1024  # of S3
MAX_SEGMENT_LENGTH = 255  # of the usual file systems
MAX_PARTS = 10_000  # of S3
_KEY_CHARACTERS = re.compile(r"[A-Za-z0-9._/-]+")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def validate_key(key: str) -> str:
    """`key`, if it is a plain relative path of `[A-Za-z0-9._-]` segments; `ValueError` otherwise. Keys are made by this
    service, never taken from a client, so a bad one is a bug and not a user's error."""
    segments = key.split("/")
    if (
        not _KEY_CHARACTERS.fullmatch(key)
        or len(key) > MAX_KEY_LENGTH
        or any(s in ("", ".", "..") or len(s) > MAX_SEGMENT_LENGTH for s in segments)
    ):
        raise ValueError(f"not a valid storage key: {key[:200]!r}")
    return key


def is_key(key: str) -> bool:
    """Whether `validate_key` takes it."""
    try:
        validate_key(key)
    except ValueError:
        return False
    return True


def validate_prefix(prefix: str) -> str:
    """`prefix`, if some key can start with it; `ValueError` otherwise."""
    if prefix:
        validate_key(prefix + "x")
    return prefix


def validate_range(start: int, length: int | None) -> None:
    if start < 0 or (length is not None and length < 0):
        raise ValueError(f"not a valid range: start {start}, length {length}")


def require_regular_file(path: Path) -> int:
    """The size of a regular file. `ValueError` for a link or anything else: a stage's native code must not be able to
    have another file stored by leaving a link to it."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"not a regular file: {path.name!r}")
    return status.st_size


@contextmanager
def translated_os_errors(doing: str) -> Iterator[None]:
    """`OSError` → `storage_full` or `storage_unavailable`. Paths stay out of the message: clients see it."""
    try:
        yield
    except OSError as exc:
        if exc.errno in _FULL:
            raise storage_full() from exc
        raise storage_unavailable(f"The storage failed while {doing}: {exc.strerror or type(exc).__name__}.") from exc


def validate_part_number(number: int) -> int:
    if not 1 <= number <= MAX_PARTS:
        raise InvalidUpload(f"A part's number is between 1 and {MAX_PARTS}, not {number}.")
    return number


def check_parts(parts: Sequence[StoredPart], stored: Sequence[StoredPart]) -> list[StoredPart]:
    """`parts` in order of their numbers, if they are 1…n without a gap and stand in the storage as they are described;
    `InvalidUpload` otherwise."""
    ordered = sorted(parts, key=lambda p: p.number)
    if not ordered:
        raise InvalidUpload("The upload has no parts.")
    for expected, part in enumerate(ordered, start=1):
        if part.number != expected:
            twice = part.number < expected
            raise InvalidUpload(f"Part {part.number} is named twice." if twice else f"Part {expected} is missing.")
    arrived = {p.number: p for p in stored}
    for part in ordered:
        found = arrived.get(part.number)
        if found is None:
            raise InvalidUpload(f"Part {part.number} is missing.")
        if found.size_bytes != part.size_bytes:
            raise InvalidUpload(f"Part {part.number} has {found.size_bytes} bytes instead of {part.size_bytes}.")
        if found.etag != part.etag:
            raise InvalidUpload(f"Part {part.number} was sent again meanwhile.")
    return ordered


_SYNC_FILE_RANGE_WRITE = 2


def start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Have the kernel begin to write this range to disk, without waiting: the fsync that makes a large file durable
    then has little left to do. A hint: nothing where the platform has no `sync_file_range`."""
    try:
        call = ctypes.CDLL(None).sync_file_range
    except AttributeError:
        return
    call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
