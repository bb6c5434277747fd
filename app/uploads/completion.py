"""Making one file out of the parts of an upload session.

Each step may be repeated, and the parts, or what was joined of them, stay until the row says that the content is stored
under its digest: whatever dies in between, the next call goes on. A lease keeps two from doing the same work.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import structlog

from app.blobs.content import CHUNK, ContentStore
from app.db.base import utcnow
from app.db.orm import Upload
from app.db.uow import Database
from app.domain.upload_state import DONE, UploadState
from app.errors import AppError, conflict, storage_unavailable
from app.storage.base import BlobNotFound, InvalidUpload, StoredPart
from app.uploads.parts import check_parts
from app.uploads.repository import UploadRepository

log = structlog.get_logger(__name__)


class WrongContent(Exception):
    """The joined file is not what was declared; `error` says so to the client."""

    def __init__(self, error: AppError) -> None:
        super().__init__(error.detail)
        self.error = error


class Completion:
    """Calls block. `stopping`: set when the process ends, so that a long one leaves its work to the next."""

    def __init__(self, db: Database, content: ContentStore, lease_s: float, stopping: threading.Event) -> None:
        self._lease_s = lease_s
        self._db = db
        self._content = content
        self._store = content.store
        self._stopping = stopping

    def run(self, upload: Upload) -> None:
        """Take an open session, or one whose completion was left, to its end; nothing where somebody else is at it.
        Raises `AppError`, and `WrongContent`, after which it is for the caller to abort the session."""
        parts = self.parts(upload)
        if parts is not None:
            check_parts(upload, parts)
        with self._db.write() as uow:
            if not UploadRepository(uow.session).take(upload.id, utcnow(), timedelta(seconds=self._lease_s)):
                return
        with self._leased(upload):
            try:
                if parts is not None:
                    self._store.complete_upload(upload.storage_key, upload.storage_upload_id, parts)
                self._keep(upload)
            except InvalidUpload as error:
                # A part was sent again at this very moment: the session is as it was.
                with self._db.write() as uow:
                    UploadRepository(uow.session).change(upload.id, UploadState.COMPLETING, status=UploadState.OPEN)
                raise AppError("upload_invalid", "The parts do not fit", 422, str(error)) from error
            except BlobNotFound:
                # Two at once after all, the lease having been lost: the other one has finished.
                log.info("completed_by_another", upload_id=upload.id)

    def parts(self, upload: Upload) -> Sequence[StoredPart] | None:
        """The parts that are there; None where they have been joined already. 409 where there is neither."""
        try:
            return sorted(
                self._store.list_parts(upload.storage_key, upload.storage_upload_id), key=lambda part: part.number
            )
        except InvalidUpload as error:
            if self._store.size(upload.storage_key) is not None:
                return None
            with self._db.read() as session:
                row = UploadRepository(session).get(upload.tenant_id, upload.id)
            if row is not None and row.status in DONE:
                return None
            detail = "The storage no longer has the parts of this upload."
            raise conflict("upload_lost", detail, "Open a new one with POST /v1/uploads.") from error

    def _keep(self, upload: Upload) -> None:
        """Check the joined file, store it under its digest, and note it."""
        size, sha256 = self._digest(upload.storage_key)
        if size != upload.size_bytes or upload.sha256 not in (None, sha256):
            raise WrongContent(_wrong_content(upload, size, sha256))
        with self._db.read() as session:
            trusted = self._content.known(session, upload.tenant_id, sha256)
        self._content.adopt(upload.tenant_id, upload.storage_key, sha256, size, trusted=trusted)
        seen = self._content.sight(self._db, upload.tenant_id, [sha256])
        with self._db.write() as uow:
            row = UploadRepository(uow.session).get(upload.tenant_id, upload.id, lock=True)
            open_still = row is not None and row.status in (UploadState.COMPLETING, *DONE)
            if row is not None and row.status == UploadState.COMPLETING:
                row.status, row.sha256 = UploadState.COMPLETED, sha256
            if open_still:
                self._content.record(uow.session, seen, {sha256: size})
        if not open_still:
            self._store.delete(upload.storage_key)  # perhaps joined after the abortion had cleared up
            raise conflict("upload_closed", "The upload was aborted.")
        try:
            self.clear(upload)
        except AppError as error:  # the sweeper does it later
            log.warning("upload_not_cleared", upload_id=upload.id, code=error.code)

    def clear(self, upload: Upload) -> None:
        """Forget what the storage holds of the session. The lease stays until that is done: it tells what is owed."""
        self._store.delete(upload.storage_key)
        with self._db.write() as uow:
            UploadRepository(uow.session).cleared(upload.id)

    def _digest(self, key: str) -> tuple[int, str]:
        size, found = 0, hashlib.sha256()
        with self._store.open(key) as stream:
            while chunk := stream.read(CHUNK):
                size += len(chunk)
                found.update(chunk)
                if self._stopping.is_set():
                    raise storage_unavailable("The service is shutting down.")
        return size, found.hexdigest()

    @contextmanager
    def _leased(self, upload: Upload) -> Iterator[None]:
        """Renews the lease while the block runs, and lets go of it where that fails."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(self._lease_s / 3):
                self._renew(upload, self._lease_s)

        thread = threading.Thread(target=renew, name="upload-lease", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            ended.set()
            self._renew(upload, 0)
            raise
        finally:
            ended.set()
            thread.join()

    def _renew(self, upload: Upload, seconds: float) -> None:
        try:
            with self._db.write() as uow:
                UploadRepository(uow.session).renew(upload.id, utcnow() + timedelta(seconds=seconds))
        except Exception as error:  # whatever it is: the thread goes on, and tries again while the lease holds
            log.warning("lease_not_renewed", upload_id=upload.id, exc_info=error)


def _wrong_content(upload: Upload, size: int, sha256: str) -> AppError:
    if size != upload.size_bytes:
        detail = f"The upload was declared with {upload.size_bytes} bytes, and has {size}."
        return AppError("size_mismatch", "Wrong size", 422, detail)
    detail = f"The content's SHA-256 is {sha256}, not {upload.sha256} as declared."
    return AppError("digest_mismatch", "Wrong digest", 422, detail, remedy="Upload the file again.")
