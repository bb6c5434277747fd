"""Whether rows and blobs agree, in both directions: what a restored backup lacks, what a disk has lost, what was left.

A walk over the digests of each tenant, range by range: a range is listed in the storage, and what rows say of it is
read beside. At no time is more in memory than a range holds, however many blobs there are. It works beside a service
that runs: what looks wrong is looked at again, and what is younger than the collector's grace may yet be noted.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import func, select

from app.blobs.content import CHUNK, ContentStore, blob_key, blob_prefix
from app.blobs.references import (
    CACHED,
    UPLOADED,
    has_many_references,
    is_referenced,
    lock_blob,
    references_between,
)
from app.blobs.removal import discard, remove_unneeded
from app.db.accounts import Tenant
from app.db.base import utcnow
from app.db.orm import Blob
from app.db.uow import Database
from app.storage.base import BlobNotFound, StoredObject

MOST = 10_000  # blobs of a tenant that are looked at in one piece
_PARTS = 256  # that the digests of a larger one are cut into


class Trouble(StrEnum):
    """What can be wrong with a blob, the worst first."""

    MISSING = "missing"  # something needs it, and its bytes are not there
    WRONG_SIZE = "wrong_size"
    DAMAGED = "damaged"  # its bytes have another digest
    UNVOUCHED = "unvouched"  # it is needed and there, and no row vouches for it: it was found damaged, or a row is lost
    ROW_ONLY = "row_only"  # a row without bytes, which nothing needs
    ORPHAN = "orphan"  # bytes without a row, which nothing needs


REMEDIES = {
    Trouble.MISSING: "Restore the bytes from a backup; or upload the file again, submit the job again.",
    Trouble.WRONG_SIZE: "Restore the bytes from a backup, or upload the file again; what stages made is made again.",
    Trouble.DAMAGED: "Restore the bytes from a backup, or upload the file again; what stages made is made again.",
    Trouble.UNVOUCHED: "--mend has whole ones noted again; of others, upload the file again.",
    Trouble.ROW_ONLY: "The collector removes it, and so does --mend.",
    Trouble.ORPHAN: "The collector removes it, and so does --mend.",
}


@dataclass(frozen=True)
class Finding:
    """`needed_by`: kinds and ids of what refers to it. `mended`: None where that was not asked for."""

    trouble: Trouble
    tenant_id: str
    sha256: str
    size_bytes: int | None
    needed_by: tuple[str, ...] = ()
    mended: bool | None = None


@dataclass
class Looked:
    """What has been looked at."""

    tenants: int = 0
    rows: int = 0
    files: int = 0
    references: int = 0
    bytes: int = 0
    hashed: int = 0


@dataclass
class _Range:
    """All that is known of the digests from `first` to `last`."""

    rows: dict[str, tuple[int, datetime]] = field(default_factory=dict)
    files: dict[str, StoredObject] = field(default_factory=dict)
    needed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Checkup:
    """`grace_s`: how long a file may wait for its row. `hashed`: read all bytes. `mend`: what can be mended safely."""

    def __init__(
        self, db: Database, content: ContentStore, grace_s: float, *, hashed: bool = False, mend: bool = False
    ) -> None:
        self._db = db
        self._content = content
        self._grace = timedelta(seconds=grace_s)
        self._hashed = hashed
        self._mend = mend
        self.looked = Looked()

    def run(self, tenant_id: str | None = None) -> Iterator[Finding]:
        """Everything that is wrong, of all tenants or this one, as it is found. No transaction is open in between."""
        for each in [tenant_id] if tenant_id is not None else self._tenants():
            self.looked.tenants += 1
            for first, last, prefix in self._ranges(each):
                yield from self._check(each, self._range(each, first, last, prefix))

    def _tenants(self) -> list[str]:
        with self._db.read() as session:
            return [*session.scalars(select(Tenant.id).order_by(Tenant.id))]

    def _ranges(self, tenant_id: str) -> Iterator[tuple[str, str, str]]:
        """First and last digest, and what the storage's keys of it begin with."""
        prefix = blob_prefix(tenant_id)
        if self._few(tenant_id):
            yield "0" * 64, "f" * 64, prefix
            return
        for part in range(_PARTS):
            yield f"{part:02x}" + "0" * 62, f"{part:02x}" + "f" * 62, f"{prefix}{part:02x}/"

    def _few(self, tenant_id: str) -> bool:
        """Whether rows, files and references fit into one range. There may be many of the ones without the others."""
        first = select(Blob.sha256).where(Blob.tenant_id == tenant_id).limit(MOST).subquery()
        with self._db.read() as session:
            rows = session.scalar(select(func.count()).select_from(first)) or 0
            if rows >= MOST or has_many_references(session, tenant_id, MOST):
                return False
        listed = self._content.store.list(blob_prefix(tenant_id))
        return not any(number >= MOST for number, _ in enumerate(listed))

    def _range(self, tenant_id: str, first: str, last: str, prefix: str) -> _Range:
        found = _Range()
        for stored in self._content.store.list(prefix):
            sha256 = stored.key.rpartition("/")[2]
            if blob_key(tenant_id, sha256) == stored.key:  # another one is none of ours
                found.files[sha256] = stored
        needed: dict[str, list[str]] = defaultdict(list)
        columns = select(Blob.sha256, Blob.size_bytes, Blob.created_at)
        mine = columns.where(Blob.tenant_id == tenant_id, Blob.sha256.between(first, last))
        with self._db.read() as session:
            found.rows = {row.sha256: (row.size_bytes, row.created_at) for row in session.execute(mine)}
            for reference in references_between(session, tenant_id, first, last):
                needed[reference.sha256].append(f"{reference.kind} {reference.owner}")
                self.looked.references += 1
        found.needed = {sha256: tuple(by) for sha256, by in needed.items()}
        self.looked.rows += len(found.rows)
        self.looked.files += len(found.files)
        self.looked.bytes += sum(stored.size_bytes for stored in found.files.values())
        return found

    def _check(self, tenant_id: str, found: _Range) -> Iterator[Finding]:
        for sha256 in sorted({*found.rows, *found.files, *found.needed}):
            trouble = self._trouble(tenant_id, sha256, found)
            if trouble is not None and self._still(tenant_id, sha256, trouble):
                size = found.files[sha256].size_bytes if sha256 in found.files else None
                by = found.needed.get(sha256, ())
                mended = self._mended(tenant_id, sha256, trouble, by) if self._mend else None
                yield Finding(trouble, tenant_id, sha256, size, by, mended)

    def _trouble(self, tenant_id: str, sha256: str, found: _Range) -> Trouble | None:
        row, stored, needed = found.rows.get(sha256), found.files.get(sha256), sha256 in found.needed
        old = utcnow() - self._grace
        if stored is None:
            if needed:
                return Trouble.MISSING
            return Trouble.ROW_ONLY if row is not None and row[1] < old else None
        if row is None:
            if needed:
                return Trouble.UNVOUCHED
            return Trouble.ORPHAN if stored.modified_at < old else None
        if row[0] != stored.size_bytes:
            return Trouble.WRONG_SIZE
        return Trouble.DAMAGED if self._hashed and not self._whole(tenant_id, sha256) else None

    def _whole(self, tenant_id: str, sha256: str) -> bool:
        digest = hashlib.sha256()
        try:
            with closing(self._content.store.open(blob_key(tenant_id, sha256))) as stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
        except BlobNotFound:
            return True  # removed meanwhile: it is looked at again
        self.looked.hashed += 1
        return digest.hexdigest() == sha256

    def _still(self, tenant_id: str, sha256: str, trouble: Trouble) -> bool:
        """Whether it is so now, too: a blob may have come or gone since the storage was listed."""
        if trouble is Trouble.DAMAGED:
            return not self._whole(tenant_id, sha256)
        size = self._content.store.size(blob_key(tenant_id, sha256))
        with self._db.read() as session:
            row = session.get(Blob, (tenant_id, sha256))
            needed = is_referenced(session, tenant_id, sha256)
        match trouble:
            case Trouble.MISSING:
                return size is None and needed
            case Trouble.WRONG_SIZE:
                return row is not None and size is not None and row.size_bytes != size
            case Trouble.UNVOUCHED:
                return row is None and size is not None and needed
            case Trouble.ROW_ONLY:
                return row is not None and size is None and not needed
            case Trouble.ORPHAN:
                return row is None and size is not None and not needed

    # Mending

    def _mended(self, tenant_id: str, sha256: str, trouble: Trouble, by: tuple[str, ...]) -> bool:
        """Mend what loses nothing: whether the blob is well now. What a stage made is forgotten, to be made again; what
        was uploaded loses the row that vouches for it, so that whoever uploads it again replaces it."""
        match trouble:
            case Trouble.ORPHAN | Trouble.ROW_ONLY:
                cutoff = utcnow() - self._grace
                return remove_unneeded(self._db, self._content, tenant_id, [sha256], cutoff) == 1
            case Trouble.UNVOUCHED | Trouble.WRONG_SIZE if self._whole(tenant_id, sha256):
                return self._vouched(tenant_id, sha256)
            case Trouble.UNVOUCHED:
                return False
            case Trouble.MISSING | Trouble.WRONG_SIZE | Trouble.DAMAGED:
                kinds = {needed.rpartition(" ")[0] for needed in by}
                if trouble is Trouble.MISSING and kinds & UPLOADED and not self._has_row(tenant_id, sha256):
                    return False  # nothing is left to be done here
                return discard(self._db, self._content, tenant_id, sha256) and kinds <= {CACHED}

    def _has_row(self, tenant_id: str, sha256: str) -> bool:
        with self._db.read() as session:
            return self._content.known(session, tenant_id, sha256)

    def _vouched(self, tenant_id: str, sha256: str) -> bool:
        """Note a blob that is whole, if it is needed still."""
        size = self._content.store.size(blob_key(tenant_id, sha256))
        try:
            seen = self._content.sight(self._db, tenant_id, [sha256])
            with self._db.write() as uow:
                lock_blob(uow.session, tenant_id, sha256)
                if size is None or not is_referenced(uow.session, tenant_id, sha256):
                    return False
                self._content.forget(uow.session, tenant_id, sha256)  # a row that says another size
                self._content.record(uow.session, seen, {sha256: size})
        except BlobNotFound:
            return False
        return True
