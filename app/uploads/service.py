"""Upload sessions: a large file in parts, in any order, in parallel, each of them repeatable."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from sqlalchemy.exc import IntegrityError

from app.db.base import utcnow
from app.db.ids import new_id
from app.db.orm import Upload
from app.db.uow import Database
from app.domain.artifact_key import digest_of
from app.errors import AppError, conflict, not_found
from app.idempotency import Idempotency, recall, remember
from app.library import clean_filename, release_blob, scratch_folder
from app.settings import Settings
from app.storage.base import InvalidUpload, StoredPart
from app.storage.content import ContentStore, sha256_file
from app.uploads.repository import ABORTED, COMPLETED, CONSUMED, OPEN, UploadRepository

MAX_PARTS = 10_000  # of S3
_MIB = 1 << 20
_MAX_LISTED = 20


class UploadService:
    """Calls block."""

    def __init__(self, db: Database, content: ContentStore, settings: Settings) -> None:
        self._db = db
        self._content = content
        self._store = content.store
        self._settings = settings

    def create(
        self, tenant_id: str, filename: str, size_bytes: int, sha256: str | None, key: str | None
    ) -> tuple[Upload, bool]:
        """Open a session: (row, whether it was made now). 413 above the limit."""
        filename = clean_filename(filename)
        limit = self._settings.limits.upload_bytes
        if size_bytes > limit:
            detail = f"{size_bytes} bytes are more than the {limit} that are taken."
            raise AppError("too_large", "Too large", 413, detail, extra={"limit": limit})
        idempotency = None
        if key is not None:
            idempotency = Idempotency(key, digest_of(["upload", filename, size_bytes, sha256]))
        earlier = self._recall(tenant_id, idempotency)
        if earlier is not None:
            return earlier, False
        now = utcnow()
        upload_id = new_id("upl")
        storage_key = f"tenants/{tenant_id}/uploads/{upload_id}"
        upload = Upload(
            id=upload_id,
            tenant_id=tenant_id,
            filename=filename,
            size_bytes=size_bytes,
            sha256=sha256,
            part_size=part_size(size_bytes, self._settings.limits.part_bytes),
            storage_key=storage_key,
            storage_upload_id=self._store.begin_upload(storage_key),
            status=OPEN,
            created_at=now,
            expires_at=now + timedelta(seconds=self._settings.limits.upload_expires_s),
        )
        try:
            with self._db.write() as uow:
                uow.session.add(upload)
                remember(uow.session, tenant_id, idempotency, upload_id)
        except BaseException as error:
            self._store.abort_upload(storage_key, upload.storage_upload_id)
            if isinstance(error, IntegrityError):
                earlier = self._recall(tenant_id, idempotency)
                if earlier is not None:
                    return earlier, False
            raise
        return upload, True

    def get(self, tenant_id: str, upload_id: str) -> Upload:
        with self._db.read() as session:
            upload = UploadRepository(session).get(tenant_id, upload_id)
        if upload is None:
            raise not_found("upload", upload_id)
        return upload

    def received(self, upload: Upload) -> list[StoredPart]:
        """The parts that are there, by number; none once the session is no longer open."""
        if upload.status != OPEN:
            return []
        return sorted(
            self._store.list_parts(upload.storage_key, upload.storage_upload_id), key=lambda part: part.number
        )

    def part_urls(self, upload: Upload) -> list[str]:
        """Where to PUT part 1, 2, …: presigned on S3, else paths of this API. None once the session is closed."""
        if upload.status != OPEN:
            return []
        seconds = min(self._settings.storage.presign_seconds, self._settings.limits.upload_expires_s)
        urls = []
        for number in range(1, part_count(upload) + 1):
            url = self._store.presigned_part(upload.storage_key, upload.storage_upload_id, number, expires_s=seconds)
            urls.append(url or f"/v1/uploads/{upload.id}/parts/{number}")
        return urls

    def expected_size(self, tenant_id: str, upload_id: str, number: int) -> int:
        """Bytes that part `number` must have. 409 where the session is closed, 422 where it has no such part."""
        upload = self._open(tenant_id, upload_id)
        count = part_count(upload)
        if not 1 <= number <= count:
            detail = f"Part {number} is not one of the {count} parts of this upload."
            raise AppError("part_number_invalid", "No such part", 422, detail)
        return upload.part_size if number < count else upload.size_bytes - upload.part_size * (count - 1)

    def put_part(self, tenant_id: str, upload_id: str, number: int, path: Path, size_bytes: int) -> StoredPart:
        """Store a part that has arrived on this machine's disk; sent again, it replaces the earlier one."""
        expected = self.expected_size(tenant_id, upload_id, number)
        if size_bytes != expected:
            raise part_size_mismatch(number, expected, size_bytes)
        upload = self._open(tenant_id, upload_id)
        return self._store.put_part(upload.storage_key, upload.storage_upload_id, number, path)

    def complete(self, tenant_id: str, upload_id: str) -> Upload:
        """Join the parts, check size and digest, and store the content under its digest. May be repeated."""
        upload = self.get(tenant_id, upload_id)
        if upload.status in (COMPLETED, CONSUMED):
            return upload
        upload = self._open(tenant_id, upload_id)
        try:
            return self._complete(upload)
        except (InvalidUpload, OSError) as error:
            # Two requests at once: the other one may have done the work and taken the files from under this one.
            again = self.get(tenant_id, upload_id)
            if again.status in (COMPLETED, CONSUMED):
                return again
            if isinstance(error, InvalidUpload):
                raise AppError("upload_invalid", "The parts do not fit", 422, str(error)) from error
            raise

    def abort(self, tenant_id: str, upload_id: str) -> None:
        """Forget the session and its bytes. No error where it has ended already; what became a resource stays."""
        with self._db.write() as uow:
            upload = UploadRepository(uow.session).get(tenant_id, upload_id, lock=True)
            if upload is None:
                raise not_found("upload", upload_id)
            before = upload.status
            if before in (OPEN, COMPLETED):
                upload.status = ABORTED
        if before in (OPEN, COMPLETED):
            self._clear(upload, before)

    def expire_uploads(self, limit: int = 100) -> int:
        """Clean up sessions past their time; the worker's sweeper calls it. How many there were."""
        now = utcnow()
        with self._db.read() as session:
            expired = UploadRepository(session).expired(now, limit)
        for upload in expired:
            self.abort(upload.tenant_id, upload.id)
        with self._db.write() as uow:
            UploadRepository(uow.session).purge(now - timedelta(days=7))
        return len(expired)

    def _complete(self, upload: Upload) -> Upload:
        if self._store.size(upload.storage_key) is None:  # else: joined by a request that died afterwards
            parts = self.received(upload)
            _check_parts(upload, parts)
            self._store.complete_upload(upload.storage_key, upload.storage_upload_id, parts)
        with scratch_folder(self._settings.temp_dir) as folder:
            path = self._store.local_path(upload.storage_key)
            if path is None:
                path = folder / "joined"
                self._store.fetch(upload.storage_key, path)
            size, sha256 = path.stat().st_size, sha256_file(path)
            if size != upload.size_bytes or upload.sha256 not in (None, sha256):
                self.abort(upload.tenant_id, upload.id)
                raise _wrong_content(upload, size, sha256)
            self._content.put(upload.tenant_id, path, sha256, move=True)
        with self._db.write() as uow:
            row = UploadRepository(uow.session).get(upload.tenant_id, upload.id, lock=True)
            if row is None or row.status == ABORTED:
                raise conflict("upload_closed", "The upload was aborted.")
            if row.status == OPEN:
                row.status, row.sha256 = COMPLETED, sha256
            self._content.record(uow.session, upload.tenant_id, sha256, size)
        self._store.delete(upload.storage_key)
        return row

    def _clear(self, upload: Upload, before: str) -> None:
        self._store.abort_upload(upload.storage_key, upload.storage_upload_id)
        self._store.delete(upload.storage_key)
        if before == COMPLETED and upload.sha256 is not None:
            release_blob(self._db, self._content, upload.tenant_id, upload.sha256)

    def _open(self, tenant_id: str, upload_id: str) -> Upload:
        upload = self.get(tenant_id, upload_id)
        if upload.status != OPEN:
            raise conflict("upload_closed", f"The upload is {upload.status}.", "Open a new one with POST /v1/uploads.")
        if upload.expires_at <= utcnow():
            raise conflict("upload_expired", "The upload is past its time.", "Open a new one with POST /v1/uploads.")
        return upload

    def _recall(self, tenant_id: str, idempotency: Idempotency | None) -> Upload | None:
        with self._db.read() as session:
            upload_id = recall(session, tenant_id, idempotency)
        return None if upload_id is None else self.get(tenant_id, upload_id)


def part_size(size_bytes: int, preferred: int) -> int:
    """Bytes of each part but the last: `preferred`, or whole MiB enough for at most 10,000 parts."""
    least = -(-size_bytes // MAX_PARTS)
    return max(preferred, -(-least // _MIB) * _MIB)


def part_count(upload: Upload) -> int:
    return max(1, -(-upload.size_bytes // upload.part_size))


def part_size_mismatch(number: int, expected: int, got: int) -> AppError:
    detail = f"Part {number} must have {expected} bytes, and has {got}."
    return AppError("part_size_mismatch", "Wrong size of a part", 422, detail, extra={"expected_bytes": expected})


def _check_parts(upload: Upload, parts: list[StoredPart]) -> None:
    there = {part.number: part.size_bytes for part in parts}
    count = part_count(upload)
    missing = [number for number in range(1, count + 1) if number not in there]
    if missing:
        detail = f"{len(missing)} of {count} parts have not arrived: {missing[:_MAX_LISTED]}"
        error = conflict("upload_incomplete", detail, "PUT the missing parts, then complete again.")
        error.extra = {"missing_parts": missing[:1000]}
        raise error
    for number, size in there.items():
        last = upload.size_bytes - upload.part_size * (count - 1)
        expected = upload.part_size if number < count else last
        if number > count or size != expected:
            raise part_size_mismatch(number, expected if number <= count else 0, size)


def _wrong_content(upload: Upload, size: int, sha256: str) -> AppError:
    if size != upload.size_bytes:
        detail = f"The upload was declared with {upload.size_bytes} bytes, and has {size}."
        return AppError("size_mismatch", "Wrong size", 422, detail)
    detail = f"The content's SHA-256 is {sha256}, not {upload.sha256} as declared."
    return AppError("digest_mismatch", "Wrong digest", 422, detail, remedy="Upload the file again.")
