"""Content addressing over a `BlobStore`: every file of a tenant lies under its own SHA-256, in that tenant's scope.

No transaction is open while the storage is asked: one that stalls would hold locks, and with them leases and everybody
else's writes. So a blob comes and goes in steps. It is put, then seen (`sight`), then noted (`record`); it is condemned
in a transaction, and then removed. A removal leaves a row: who saw the bytes before it does not note them after it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from app.blobs.references import lock_blobs
from app.db.base import utcnow
from app.db.ids import new_id
from app.db.orm import Blob, BlobRemoval
from app.db.uow import Database
from app.errors import blob_corrupted
from app.storage.base import BlobNotFound, BlobStore

CHUNK = 4 << 20
_READS = 2
# A removal is under way for so long at most; none of its files is begun with when less than `_ONE_S` of that is left,
# which is longer than a storage's `delete` takes before it gives up.
_REMOVAL_S = 180.0
_ONE_S = 90.0


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


@dataclass(frozen=True)
class Sighting:
    """Blobs of a tenant that stood in storage, and the id of each one's last removal before that."""

    tenant_id: str
    marks: Mapping[str, str | None]


@dataclass(frozen=True)
class Condemned:
    """A blob whose row is gone and whose bytes are to go."""

    tenant_id: str
    sha256: str
    removal_id: str
    ends_at: datetime


class ContentStore:
    """Puts files in storage first and rows second: a crash in between leaves a blob, which `app.blobs.collector`
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

    # Noting what was stored

    def sight(self, db: Database, tenant_id: str, digests: Collection[str]) -> Sighting:
        """See that these blobs stand in storage, before the transaction that notes them. Raises `BlobNotFound` for one
        that does not, or that is being removed."""
        marks = self.marks(db, tenant_id, digests)
        for sha256 in sorted(set(digests)):
            if sha256 not in marks or not self.exists(tenant_id, sha256):
                raise BlobNotFound(sha256)
        return Sighting(tenant_id, marks)

    def record(self, session: Session, seen: Sighting, sizes: Mapping[str, int]) -> None:
        """Note in the database that the tenant holds these blobs, digest → bytes (idempotent). Raises `BlobNotFound`
        where one was removed since it was seen; from here to the end of the transaction none can be."""
        if not sizes:
            return
        digests = sorted(sizes)
        lock_blobs(session, seen.tenant_id, digests)
        removals = select(BlobRemoval.sha256, BlobRemoval.id)
        removals = removals.where(BlobRemoval.tenant_id == seen.tenant_id, BlobRemoval.sha256.in_(digests))
        marks: dict[str, str] = {row.sha256: row.id for row in session.execute(removals)}
        for sha256 in digests:
            if marks.get(sha256) != seen.marks[sha256]:
                raise BlobNotFound(sha256)
        known = select(Blob.sha256).where(Blob.tenant_id == seen.tenant_id, Blob.sha256.in_(digests))
        there = {*session.scalars(known)}
        session.add_all(
            Blob(tenant_id=seen.tenant_id, sha256=sha256, size_bytes=sizes[sha256])
            for sha256 in digests
            if sha256 not in there
        )

    def known(self, session: Session, tenant_id: str, sha256: str) -> bool:
        """Whether a row vouches for the bytes. It goes when they were found damaged, so that whoever stores the same
        content writes it anew."""
        return session.scalar(select(Blob.sha256).where(Blob.tenant_id == tenant_id, Blob.sha256 == sha256)) is not None

    def marks(self, db: Database, tenant_id: str, digests: Collection[str]) -> dict[str, str | None]:
        """The id of each blob's last removal, None without; those being removed at this moment are left out."""
        if not digests:
            return {}
        columns = (BlobRemoval.sha256, BlobRemoval.id, BlobRemoval.ends_at)
        query = select(*columns).where(BlobRemoval.tenant_id == tenant_id, BlobRemoval.sha256.in_(set(digests)))
        with db.read() as session:
            removals = {row.sha256: row for row in session.execute(query)}
        now = utcnow()
        found: dict[str, str | None] = {sha256: None for sha256 in digests if sha256 not in removals}
        found.update((r.sha256, r.id) for r in removals.values() if r.ends_at is None or r.ends_at < now)
        return found

    def unchanged(self, session: Session, tenant_id: str, sha256: str, mark: str | None) -> bool:
        """Whether no removal has begun since `marks` were taken. Under the lock (`lock_blob`)."""
        query = select(BlobRemoval.id).where(BlobRemoval.tenant_id == tenant_id, BlobRemoval.sha256 == sha256)
        return session.scalar(query) == mark

    # Removing

    def forget(self, session: Session, tenant_id: str, sha256: str) -> None:
        """Drop the row alone, under the lock (`lock_blob`): its absence says that the bytes are damaged."""
        session.execute(delete(Blob).where(Blob.tenant_id == tenant_id, Blob.sha256 == sha256))

    def condemn(self, session: Session, tenant_id: str, sha256: str) -> Condemned:
        """Drop the row; `remove` is to follow once this transaction has ended. Under the lock (`lock_blob`), by who has
        seen under it that nothing needs the blob."""
        self.forget(session, tenant_id, sha256)
        ends_at = utcnow() + timedelta(seconds=_REMOVAL_S)
        removal = BlobRemoval(
            tenant_id=tenant_id,
            sha256=sha256,
            id=new_id("rem"),
            removed_at=utcnow(),
            ends_at=ends_at,
        )
        session.merge(removal)
        return Condemned(tenant_id, sha256, removal.id, ends_at)

    def remove(self, db: Database, condemned: Sequence[Condemned]) -> None:
        """Delete the bytes. What a storage that fails leaves of them is for the collector, later: it has no row."""
        over = {blob.removal_id for blob in condemned}
        try:
            for blob in condemned:
                if utcnow() > blob.ends_at - timedelta(seconds=_ONE_S):
                    break
                over.discard(blob.removal_id)  # as long as it is not known what became of it
                self.store.delete(blob_key(blob.tenant_id, blob.sha256))
                over.add(blob.removal_id)
        finally:
            self._end_removals(db, [blob for blob in condemned if blob.removal_id in over])

    def _end_removals(self, db: Database, ended: Sequence[Condemned]) -> None:
        with db.write() as uow:
            for blob in ended:
                mine = [
                    BlobRemoval.tenant_id == blob.tenant_id,
                    BlobRemoval.sha256 == blob.sha256,
                    BlobRemoval.id == blob.removal_id,
                ]
                uow.session.execute(update(BlobRemoval).where(*mine).values(ends_at=None))
