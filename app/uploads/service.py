"""Upload sessions: a large file in parts, in any order, in parallel, each of them repeatable."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import structlog
from sqlalchemy.exc import IntegrityError

from app.audit import current_actor, record
from app.blobs.content import ContentStore
from app.blobs.removal import release
from app.blobs.retention import Policies
from app.db.base import utcnow
from app.db.ids import new_id
from app.db.orm import Upload
from app.db.uow import Database
from app.domain.artifact_key import digest_of
from app.domain.upload_state import DONE, ENDED, UploadState
from app.errors import AppError, conflict, not_found
from app.idempotency import Idempotency, recall, remember, resource_gone
from app.library import clean_filename
from app.settings import Settings
from app.storage.base import InvalidUpload, StoredPart
from app.tenants.quotas import Quotas
from app.uploads.completion import Completion, WrongContent
from app.uploads.parts import part_bytes, part_count, part_size, part_size_mismatch
from app.uploads.repository import UploadRepository

log = structlog.get_logger(__name__)


class UploadService:
    """Calls block."""

    def __init__(self, db: Database, content: ContentStore, settings: Settings) -> None:
        self._db = db
        self._content = content
        self._store = content.store
        self._settings = settings
        self._policies = Policies(db, settings)
        self._stopping = threading.Event()
        self._completion = Completion(db, content, settings.limits.upload_lease_s, self._stopping)

    def stop(self) -> None:
        """The process ends: long completions are left to the next one."""
        self._stopping.set()

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
            return self._begun(earlier), False
        now = utcnow()
        expires_at = now + timedelta(seconds=self._settings.limits.upload_expires_s)
        upload_id = new_id("upl")
        upload = Upload(
            id=upload_id,
            tenant_id=tenant_id,
            filename=filename,
            size_bytes=size_bytes,
            sha256=sha256,
            part_size=part_size(size_bytes, self._settings.limits.part_bytes),
            storage_key=f"tenants/{tenant_id}/uploads/{upload_id}",
            storage_upload_id="",
            status=UploadState.OPENING,
            created_at=now,
            expires_at=self._policies.of(tenant_id).until("uploads", now) or expires_at,
        )
        try:
            # The row first: what the storage begins for it is never without one that tells of it.
            with self._db.write() as uow:
                Quotas(uow.session, tenant_id, self._settings.limits).check_bytes(size_bytes)
                uow.session.add(upload)
                remember(uow.session, tenant_id, idempotency, upload_id)
                told = {"filename": filename, "size_bytes": size_bytes}
                record(uow.session, tenant_id, current_actor(), "upload.create", upload_id, told)
        except IntegrityError:
            earlier = self._recall(tenant_id, idempotency)
            if earlier is None:
                raise
            return self._begun(earlier), False
        return self._begun(upload), True

    def get(self, tenant_id: str, upload_id: str) -> Upload:
        with self._db.read() as session:
            upload = UploadRepository(session).get(tenant_id, upload_id)
        if upload is None:
            raise not_found("upload", upload_id)
        return upload

    def received(self, upload: Upload) -> Sequence[StoredPart]:
        """The parts that are there, by number; none once the session is no longer open."""
        if upload.status != UploadState.OPEN:
            return []
        try:
            return self._completion.parts(upload) or []
        except AppError as error:
            if error.code == "upload_lost":
                return []
            raise

    def part_url(self, upload: Upload, number: int) -> str:
        """Where to PUT this part: presigned on S3, for so many bytes as it must have; else a path of this API."""
        seconds = min(self._settings.storage.presign_part_seconds, self._settings.limits.upload_expires_s)
        url = self._store.presigned_part(
            upload.storage_key,
            upload.storage_upload_id,
            number,
            size_bytes=part_bytes(upload, number),
            expires_s=seconds,
        )
        return url or f"/v1/uploads/{upload.id}/parts/{number}"

    def part_urls(self, upload: Upload) -> list[str]:
        """Those of part 1, 2, …; none once the session is closed."""
        if upload.status != UploadState.OPEN:
            return []
        return [self.part_url(upload, number) for number in range(1, part_count(upload) + 1)]

    def open_session(self, tenant_id: str, upload_id: str) -> Upload:
        """The session, if parts may be sent to it; 409 otherwise."""
        upload = self.get(tenant_id, upload_id)
        if upload.status == UploadState.COMPLETING:
            remedy = f"GET /v1/uploads/{upload.id} until its status is completed."
            raise conflict("upload_completing", "The upload is being completed.", remedy)
        if upload.status != UploadState.OPEN:
            detail = f"The upload is {UploadState(upload.status).public}."
            raise conflict("upload_closed", detail, "Open a new one with POST /v1/uploads.")
        if upload.expires_at <= utcnow():
            raise conflict("upload_expired", "The upload is past its time.", "Open a new one with POST /v1/uploads.")
        return upload

    def expected_size(self, tenant_id: str, upload_id: str, number: int) -> int:
        """Bytes that part `number` must have. 409 where the session is closed, 422 where it has no such part."""
        return part_bytes(self.open_session(tenant_id, upload_id), number)

    def put_part(self, tenant_id: str, upload_id: str, number: int, path: Path, size_bytes: int) -> StoredPart:
        """Store a part that has arrived on this machine's disk; sent again, it replaces the earlier one."""
        upload = self.open_session(tenant_id, upload_id)
        expected = part_bytes(upload, number)
        if size_bytes != expected:
            raise part_size_mismatch(number, expected, size_bytes)
        try:
            return self._store.put_part(upload.storage_key, upload.storage_upload_id, number, path)
        except InvalidUpload as error:
            self.open_session(tenant_id, upload_id)  # says what it is now
            remedy = f"GET /v1/uploads/{upload.id} tells its state."
            raise conflict("upload_closed", "The upload is being completed, or has ended.", remedy) from error

    def complete(self, tenant_id: str, upload_id: str) -> Upload:
        """Join the parts, check size and digest, and store the content under its digest. May be repeated at any time:
        it goes on where an earlier call has stopped. `completing` where somebody else is at it."""
        upload = self.get(tenant_id, upload_id)
        if upload.error is not None:
            raise AppError(**upload.error)
        if upload.status == UploadState.COMPLETING:
            if upload.lease_expires_at is not None and upload.lease_expires_at >= utcnow():
                return upload
        elif upload.status in DONE:
            return upload
        else:
            self.open_session(tenant_id, upload_id)
        try:
            self._completion.run(upload)
        except WrongContent as wrong:
            error = wrong.error
            kept = {"code": error.code, "title": error.title, "status": error.status, "detail": error.detail}
            self._abort(tenant_id, upload_id, {**kept, "remedy": error.remedy})
            raise error from None
        return self.outcome(tenant_id, upload_id)

    def outcome(self, tenant_id: str, upload_id: str) -> Upload:
        """The session as far as its completion is, which goes on. Raises what it has failed with, though the storage
        may have yet to forget it, and 409 where it was aborted."""
        upload = self.get(tenant_id, upload_id)
        if upload.error is not None:
            raise AppError(**upload.error)
        if upload.status in ENDED:
            raise conflict("upload_closed", "The upload was aborted.", "Open a new one with POST /v1/uploads.")
        return upload

    def abort(self, tenant_id: str, upload_id: str) -> None:
        """Forget the session and its bytes. No error where it has ended already; what became a resource stays."""
        self._abort(tenant_id, upload_id, None)

    def _abort(self, tenant_id: str, upload_id: str, error: dict[str, object] | None) -> None:
        with self._db.write() as uow:
            upload = UploadRepository(uow.session).get(tenant_id, upload_id, lock=True)
            if upload is None:
                raise not_found("upload", upload_id)
            if upload.status in (UploadState.CONSUMED, UploadState.ABORTED):
                return
            stored = upload.status not in (UploadState.OPENING, UploadState.OPEN)
            if upload.status != UploadState.ABORTING:
                record(
                    uow.session, tenant_id, current_actor(), "upload.abort", upload_id, {"filename": upload.filename}
                )
            upload.status, upload.error = UploadState.ABORTING, upload.error or error
            upload.lease_expires_at = utcnow() + timedelta(seconds=self._settings.limits.upload_lease_s)
        self._clear(upload, stored)

    def _clear(self, upload: Upload, stored: bool) -> None:
        """What the storage has to forget of a session that is aborted, or has become content. May be repeated."""
        if upload.status == UploadState.ABORTING:
            if upload.storage_upload_id:
                self._store.abort_upload(upload.storage_key, upload.storage_upload_id)
            else:
                self._store.abort_uploads(upload.storage_key)
            if stored and upload.sha256 is not None:
                release(self._db, self._content, upload.tenant_id, [upload.sha256])
        self._completion.clear(upload)

    def expire_uploads(self, limit: int = 100) -> int:
        """Clean up sessions past their time, and what the storage could not be told when they ended; the worker calls
        it. How many were past their time. Raises what database and storage raise; the rest is for the next call."""
        now = utcnow()
        with self._db.read() as session:
            repository = UploadRepository(session)
            expired, owed = repository.expired(now, limit), repository.owed(now, limit)
        for upload in owed:
            # What fails comes last the next time: it holds up nobody else's.
            later = utcnow() + timedelta(seconds=self._settings.limits.upload_lease_s)
            with self._db.write() as uow:
                mine = UploadRepository(uow.session).postpone(upload, later)
            if mine:
                self._clear(upload, stored=True)
        for upload in expired:
            self.abort(upload.tenant_id, upload.id)
        with self._db.write() as uow:
            UploadRepository(uow.session).purge(now - timedelta(days=7))
        return len(expired)

    def _begun(self, upload: Upload) -> Upload:
        """The session with its parts welcome in the storage."""
        if upload.status != UploadState.OPENING:
            return upload
        begun = self._store.begin_upload(upload.storage_key)
        with self._db.write() as uow:
            values = {"status": UploadState.OPEN, "storage_upload_id": begun}
            mine = UploadRepository(uow.session).change(upload.id, UploadState.OPENING, **values)
        if not mine:
            self._store.abort_upload(upload.storage_key, begun)
        return self.get(upload.tenant_id, upload.id)

    def _recall(self, tenant_id: str, idempotency: Idempotency | None) -> Upload | None:
        with self._db.read() as session:
            upload_id = recall(session, tenant_id, idempotency)
            if upload_id is None:
                return None
            upload = UploadRepository(session).get(tenant_id, upload_id)
        if upload is None:
            raise resource_gone("upload")
        return upload
