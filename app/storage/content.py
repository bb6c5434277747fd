"""Content addressing over a `BlobStore`: every file of a tenant lies under its own SHA-256, in that tenant's scope."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app.db.orm import Blob
from app.errors import blob_corrupted
from app.references import lock_blob
from app.storage.base import BlobNotFound, BlobStore

CHUNK = 4 << 20
_READS = 2


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, with flat memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def blob_prefix(tenant_id: str) -> str:
    """What the storage keys of all of a tenant's blobs begin with."""
    return f"tenants/{tenant_id}/blobs/"


def blob_key(tenant_id: str, sha256: str) -> str:
    """Storage key of a tenant's blob. The tenant is part of it: a digest alone never reaches another's bytes."""
    return f"{blob_prefix(tenant_id)}{sha256[:2]}/{sha256}"


class ContentStore:
    """Puts files in storage first and rows second: a crash in between leaves a blob, which `app.collector`
    finds, never a row without its bytes."""

    def __init__(self, store: BlobStore) -> None:
        self.store = store

    def put(self, tenant_id: str, path: Path, sha256: str, *, move: bool = False, trusted: bool = True) -> None:
        """Store the bytes of `path`, whose digest the caller has computed. What stands there already gives way where it
        is damaged: its size is another, or it is not `trusted` (`known` says no)."""
        key = self._renewed(tenant_id, sha256)
        if not (trusted and self.store.size(key) == path.lstat().st_size):
            self.store.put_file(key, path, move=move, replace=True)
        elif move:
            path.unlink(missing_ok=True)

    def adopt(self, tenant_id: str, key: str, sha256: str, size_bytes: int, *, trusted: bool = True) -> None:
        """Store an object that is in storage already, whose digest the caller has computed; as `put` does."""
        target = self._renewed(tenant_id, sha256)
        if not (trusted and self.store.size(target) == size_bytes):
            self.store.copy(key, target, replace=True)

    def _renewed(self, tenant_id: str, sha256: str) -> str:
        """The blob's key. What lies there already, left behind long ago perhaps, counts as new: the collector leaves it
        alone."""
        key = blob_key(tenant_id, sha256)
        there = self.store.local_path(key)
        if there is not None:
            with suppress(OSError):
                os.utime(there)
        return key

    def record(self, session: Session, tenant_id: str, sha256: str, size_bytes: int) -> None:
        """Note in the database that the tenant holds this blob (idempotent). Raises `BlobNotFound` where a deletion
        took the bytes in the meantime; from here to the end of the transaction none can."""
        lock_blob(session, tenant_id, sha256)
        if not self.exists(tenant_id, sha256):
            raise BlobNotFound(sha256)
        if session.get(Blob, (tenant_id, sha256)) is None:
            session.merge(Blob(tenant_id=tenant_id, sha256=sha256, size_bytes=size_bytes))

    def fetch(self, tenant_id: str, sha256: str, path: Path) -> None:
        """The blob as a file at `path`, read-only. Raises `BlobNotFound`, and `blob_corrupted` where its bytes are not
        those of the digest, twice in a row: what was damaged on the way is whole the next time."""
        for _ in range(_READS):
            self.store.fetch(blob_key(tenant_id, sha256), path)
            if sha256_file(path) == sha256:
                return
            path.unlink(missing_ok=True)
        raise blob_corrupted(sha256)

    def read_bytes(self, tenant_id: str, sha256: str) -> bytes:
        """The whole of a small blob (report, manifest)."""
        with self.store.open(blob_key(tenant_id, sha256)) as stream:
            return stream.read()

    def exists(self, tenant_id: str, sha256: str) -> bool:
        return self.store.size(blob_key(tenant_id, sha256)) is not None

    def modified_at(self, tenant_id: str, sha256: str) -> datetime | None:
        """When the bytes were stored, on a local disk also when they were last stored again; None without bytes."""
        key = blob_key(tenant_id, sha256)
        path = self.store.local_path(key)
        if path is None:
            return next((found.modified_at for found in self.store.list(key) if found.key == key), None)
        try:
            return datetime.fromtimestamp(path.stat().st_mtime, UTC)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def forget(self, session: Session, tenant_id: str, sha256: str) -> None:
        """Drop the row. Under the lock; `remove` then deletes the bytes, before that transaction ends. Where they stay,
        the row's absence says that they are damaged."""
        session.execute(delete(Blob).where(Blob.tenant_id == tenant_id, Blob.sha256 == sha256))

    def remove(self, tenant_id: str, sha256: str) -> None:
        self.store.delete(blob_key(tenant_id, sha256))

    def known(self, session: Session, tenant_id: str, sha256: str) -> bool:
        """Whether a row vouches for the bytes. It goes when they were found damaged, so that whoever stores the same
        content writes it anew."""
        return session.scalar(select(Blob.sha256).where(Blob.tenant_id == tenant_id, Blob.sha256 == sha256)) is not None
