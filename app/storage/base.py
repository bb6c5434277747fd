"""The storage contract. Keys are slash-separated ASCII paths; objects are immutable once written, and only replaced
where they are damaged.

Adapters translate SDK and OS errors at this boundary: `BlobNotFound`, `app.errors.storage_full()` (ENOSPC, EDQUOT,
EFBIG), `app.errors.storage_unavailable(...)`. Calls block; the API runs them in a thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol


class BlobNotFound(Exception):
    """No object stands under this key."""


class InvalidUpload(Exception):
    """The parts of a multipart upload do not fit together (missing, too small, wrong size)."""


@dataclass(frozen=True)
class StoredPart:
    """A part that has arrived: 1-based number, size in bytes, the storage's own tag."""

    number: int
    size_bytes: int
    etag: str


@dataclass(frozen=True)
class StoredObject:
    key: str
    size_bytes: int
    modified_at: datetime


class BlobStore(Protocol):
    def put_file(self, key: str, path: Path, *, move: bool = False, replace: bool = False) -> None:
        """Store the file under `key`, atomically and durably: a reader sees all of it or nothing. With `move` the
        source may be consumed (a rename where the disks allow). An existing object is left as it is, or with `replace`
        gives way: whoever reads it meanwhile sees all of the one or of the other."""

    def fetch(self, key: str, path: Path) -> None:
        """Copy the object to `path` (atomically; hard links are allowed, so treat the file as read-only)."""

    def open(self, key: str, start: int = 0, length: int | None = None) -> BinaryIO:
        """A readable stream over `length` bytes from `start`; the caller closes it."""

    def size(self, key: str) -> int | None:
        """Size in bytes, or None where there is no such object."""

    def copy(self, source: str, key: str, *, replace: bool = False) -> None:
        """Have the object stand under `key` as well; its bytes do not pass through here. An existing one is left as it
        is, or with `replace` gives way. Raises `BlobNotFound`."""

    def delete(self, key: str) -> None:
        """Remove it; no error where there is none."""

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Every object whose key starts with `prefix`, in no particular order."""

    def local_path(self, key: str) -> Path | None:
        """Where the object lies on this machine's disk, or None for remote storage."""

    def presigned_get(self, key: str, *, filename: str, expires_s: int) -> str | None:
        """A URL that downloads it without the API, or None where the storage has no such thing."""

    def check(self) -> None:
        """Raise `AppError` where the storage cannot be reached or written (readiness)."""

    # Multipart uploads. `begin` returns the storage's own id of the upload.

    def begin_upload(self, key: str) -> str: ...

    def presigned_part(self, key: str, upload_id: str, number: int, *, size_bytes: int, expires_s: int) -> str | None:
        """A URL to PUT this part of exactly `size_bytes` to, or None where parts go through the API (`put_part`)."""

    def put_part(self, key: str, upload_id: str, number: int, path: Path) -> StoredPart:
        """Store one part; a part sent again replaces the earlier one. Consumes `path`."""

    def list_parts(self, key: str, upload_id: str) -> Sequence[StoredPart]: ...

    def complete_upload(self, key: str, upload_id: str, parts: Sequence[StoredPart]) -> None:
        """Join the parts in order of their numbers into `key`; raises `InvalidUpload`."""

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Forget the upload and its parts; no error where there is none."""

    def abort_uploads(self, key: str) -> None:
        """Forget every upload to `key`: for one whose id was lost with the process that began it."""
