"""What uploaded models and data sets have in common: a named, inspected file of a tenant, stored by content."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from sqlalchemy import func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.audit import current_actor, record
from app.blobs.content import ContentStore, blob_key, sha256_file
from app.blobs.references import lock_blob
from app.blobs.removal import release
from app.blobs.usage import size_held
from app.db.base import utcnow
from app.db.chains import ChainMember
from app.db.ids import new_id
from app.db.orm import Dataset, Job, SourceModel, Upload
from app.db.uow import Database
from app.domain.artifact_key import digest_of
from app.domain.spec import DATASETS
from app.domain.upload_state import DONE, ENDED, UploadState
from app.errors import AppError, FieldError, blob_corrupted, conflict, invalid_request, not_found
from app.idempotency import Idempotency, recall, remember, resource_gone
from app.inspection.pool import Inspector
from app.names import forbidden_character
from app.scratch import scratch_folder
from app.settings import Settings
from app.storage.base import BlobNotFound
from app.tenants.quotas import Quotas

Row = TypeVar("Row", SourceModel, Dataset)

LONGEST_NAME = 200  # characters
LONGEST_FILENAME = 255  # bytes


@dataclass(frozen=True)
class IncomingFile:
    """A file that has arrived whole on this machine's disk. Whoever made it removes `path` if it is still there."""

    path: Path
    filename: str
    sha256: str
    size_bytes: int


class LibraryRepository(Generic[Row]):
    """All SQL on one kind of uploaded file. `deleted_at` hides a row; jobs may still point to it."""

    def __init__(self, session: Session, table: type[Row]) -> None:
        self.session = session
        self.table: type[Row] = table

    def get(self, tenant_id: str, row_id: str, *, lock: bool = False) -> Row | None:
        query = select(self.table).where(
            self.table.id == row_id, self.table.tenant_id == tenant_id, self.table.deleted_at.is_(None)
        )
        return self.session.scalar(query.with_for_update() if lock else query)

    def page(self, tenant_id: str, *, limit: int, before: str | None, name: str | None) -> list[Row]:
        table = self.table
        wanted = [table.tenant_id == tenant_id, table.deleted_at.is_(None)]
        if before is not None:
            wanted.append(table.id < before)
        if name is not None:
            wanted.append(table.name == name)
        query = select(table).where(*wanted).order_by(table.id.desc()).limit(limit)
        return list(self.session.scalars(query))

    def active_job(self, tenant_id: str, row_id: str) -> str | None:
        """The id of a queued or running job that uses this file."""
        if self.table is SourceModel:
            behind = select(ChainMember.job_id).where(ChainMember.model_id == row_id)
            uses = or_(Job.model_id == row_id, Job.id.in_(behind))
        else:
            uses = or_(*(Job.spec[path].as_string() == row_id for path in DATASETS))
        active = Job.status.in_(("queued", "running"))
        return self.session.scalar(select(Job.id).where(Job.tenant_id == tenant_id, active, uses).limit(1))

    def upload(self, tenant_id: str, upload_id: str, *, lock: bool = False) -> Upload | None:
        query = select(Upload).where(Upload.id == upload_id, Upload.tenant_id == tenant_id)
        return self.session.scalar(query.with_for_update() if lock else query)


class FileLibrary(Generic[Row]):
    """The service over one kind of uploaded file. Calls block."""

    kind: ClassVar[str]
    prefix: ClassVar[str]
    table: type[Row]

    def __init__(self, db: Database, content: ContentStore, settings: Settings, inspector: Inspector) -> None:
        self._db = db
        self._content = content
        self._settings = settings
        self._inspector = inspector

    def create(self, tenant_id: str, name: str | None, file: IncomingFile, key: str | None) -> tuple[Row, bool]:
        """Inspect, store and name the file: (row, whether it was made now)."""
        name = clean_name(name, file.filename)
        idempotency = self._idempotency(key, name, file.filename, file.sha256)
        earlier = self._recall(tenant_id, idempotency)
        trusted = self._trusted(tenant_id, file.sha256)
        if earlier is not None:
            if not trusted:
                self._replace(tenant_id, file)
            return earlier, False
        self.check_room(tenant_id, file.size_bytes, file.sha256)
        columns = self._inspector.inspect(tenant_id, self.kind, file.path, file.filename)
        self._content.put(tenant_id, file.path, file.sha256, move=True, trusted=trusted)
        row = self._row(tenant_id, name, file.filename, file.sha256, file.size_bytes, columns)
        return self._save(row, idempotency, None)

    def create_from_upload(self, tenant_id: str, name: str | None, upload_id: str, key: str | None) -> tuple[Row, bool]:
        """The same for the content of a completed upload session, which is consumed by it."""
        with self._db.read() as session:
            upload = LibraryRepository(session, self.table).upload(tenant_id, upload_id)
        if upload is None:
            raise not_found("upload", upload_id)
        if upload.status not in DONE or upload.sha256 is None:
            detail = f"The upload is {UploadState(upload.status).public}, not completed."
            remedy = "Upload it again." if upload.status in ENDED else f"POST /v1/uploads/{upload_id}/complete first."
            raise conflict("upload_not_completed", detail, remedy)
        name = clean_name(name, upload.filename)
        idempotency = self._idempotency(key, name, upload.filename, upload.sha256)
        earlier = self._recall(tenant_id, idempotency)
        if earlier is not None:
            return earlier, False
        if upload.status == UploadState.CONSUMED:
            raise _consumed()
        self.check_room(tenant_id, upload.size_bytes, upload.sha256)
        try:
            with local_copy(self._content, tenant_id, upload.sha256, self._settings.temp_dir) as path:
                if not self._trusted(tenant_id, upload.sha256) and sha256_file(path) != upload.sha256:
                    raise blob_corrupted(upload.sha256)
                columns = self._inspector.inspect(tenant_id, self.kind, path, upload.filename)
        except AppError as error:
            if error.code == "blob_corrupted":
                self._distrust(tenant_id, upload.sha256)
            raise
        row = self._row(tenant_id, name, upload.filename, upload.sha256, upload.size_bytes, columns)
        return self._save(row, idempotency, upload_id)

    def get(self, tenant_id: str, row_id: str) -> Row:
        with self._db.read() as session:
            row = LibraryRepository(session, self.table).get(tenant_id, row_id)
        if row is None:
            raise not_found(self.kind, row_id)
        return row

    def page(self, tenant_id: str, *, limit: int, before: str | None, name: str | None = None) -> list[Row]:
        """Newest first; `before` is the id that the page before ended with."""
        with self._db.read() as session:
            return LibraryRepository(session, self.table).page(tenant_id, limit=limit, before=before, name=name)

    def delete(self, tenant_id: str, row_id: str) -> None:
        """Hide the row, and remove the bytes where nothing else of the tenant needs them. 409 `in_use`."""
        with self._db.write() as uow:
            repository = LibraryRepository(uow.session, self.table)
            row = repository.get(tenant_id, row_id, lock=True)
            if row is None:
                raise not_found(self.kind, row_id)
            job_id = repository.active_job(tenant_id, row_id)
            if job_id is not None:
                remedy = f"Wait for job {job_id} to finish, or cancel it."
                raise conflict("in_use", f"The {self.kind} is used by job {job_id}.", remedy)
            row.deleted_at = utcnow()
            sha256 = row.sha256
            self._note(uow.session, "delete", row)
        release(self._db, self._content, tenant_id, [sha256])

    def _note(self, session: Session, verb: str, row: Row) -> None:
        """What was done to it, by whom, in the transaction that does it."""
        detail = {"name": row.name, "sha256": row.sha256, "size_bytes": row.size_bytes}
        record(session, row.tenant_id, current_actor(), f"{self.kind.replace(' ', '')}.{verb}", row.id, detail)

    def check_room(self, tenant_id: str, size_bytes: int, sha256: str | None) -> None:
        """413 where a file that is on its way does not fit the tenant's plan. Whether it does in the end is asked where
        it is noted. `sha256`: where it is known."""
        with self._db.read() as session:
            self._ask_room(Quotas(session, tenant_id, self._settings.limits, lock=False), size_bytes, sha256)

    def most_bytes(
        self, tenant_id: str, *, sha256: str | None, again: bool, exact: int | None, wanted: int
    ) -> int | None:
        """How many bytes a body may have that is on its way, None for any number: as many as there is room for; or as
        what the tenant has, where it may be the same `again`, which takes no further room. `exact`: that it will
        have; `wanted`: at most."""
        with self._db.read() as session:
            quotas = Quotas(session, tenant_id, self._settings.limits, lock=False)
            room = quotas.room(model=self.table is SourceModel, sha256=sha256, wanted=wanted)
            if room is None or not again or room >= wanted:
                return room
            own = select(func.max(self.table.size_bytes)).where(
                self.table.tenant_id == tenant_id, self.table.deleted_at.is_(None)
            )
            if exact is not None:
                own = own.where(self.table.size_bytes == exact)
            # Of what was found damaged there is only the resource's own row.
            return max(room, size_held(session, tenant_id, exact), session.scalar(own) or 0)

    def _ask_room(self, quotas: Quotas, size_bytes: int, sha256: str | None) -> None:
        if self.table is SourceModel:
            quotas.check_model(size_bytes)
        quotas.check_bytes(size_bytes, sha256=sha256)

    def _trusted(self, tenant_id: str, sha256: str) -> bool:
        with self._db.read() as session:
            return self._content.known(session, tenant_id, sha256)

    def _distrust(self, tenant_id: str, sha256: str) -> None:
        """Its bytes were found damaged: the next upload of this content replaces them."""
        with self._db.write() as uow:
            lock_blob(uow.session, tenant_id, sha256)
            self._content.forget(uow.session, tenant_id, sha256)

    def _replace(self, tenant_id: str, file: IncomingFile) -> None:
        """What was found damaged since by what was sent again."""
        self._content.put(tenant_id, file.path, file.sha256, move=True, trusted=False)
        with suppress(BlobNotFound):  # deleted at this very moment
            seen = self._content.sight(self._db, tenant_id, [file.sha256])
            with self._db.write() as uow:
                self._content.record(uow.session, seen, {file.sha256: file.size_bytes})

    def _idempotency(self, key: str | None, name: str, filename: str, sha256: str) -> Idempotency | None:
        return Idempotency(key, digest_of([self.kind, name, filename, sha256])) if key is not None else None

    def _recall(self, tenant_id: str, idempotency: Idempotency | None) -> Row | None:
        if idempotency is None:
            return None
        with self._db.read() as session:
            row_id = recall(session, tenant_id, idempotency)
            if row_id is None:
                return None
            row = LibraryRepository(session, self.table).get(tenant_id, row_id)
        if row is None:
            raise resource_gone(self.kind)
        return row

    def _row(
        self, tenant_id: str, name: str, filename: str, sha256: str, size_bytes: int, columns: dict[str, Any]
    ) -> Row:
        return self.table(
            id=new_id(self.prefix),
            tenant_id=tenant_id,
            name=name,
            filename=filename,
            sha256=sha256,
            size_bytes=size_bytes,
            created_at=utcnow(),
            **columns,
        )

    def _save(self, row: Row, idempotency: Idempotency | None, upload_id: str | None) -> tuple[Row, bool]:
        """Commit the row. The bytes were stored before; a deletion that came in between is found."""
        tenant_id, sha256 = row.tenant_id, row.sha256
        try:
            seen = self._content.sight(self._db, tenant_id, [sha256])
            with self._db.write() as uow:
                self._ask_room(Quotas(uow.session, tenant_id, self._settings.limits), row.size_bytes, sha256)
                self._content.record(uow.session, seen, {sha256: row.size_bytes})
                if upload_id is not None:
                    # Locked and looked at again: two requests may have come this far with one upload.
                    upload = LibraryRepository(uow.session, self.table).upload(tenant_id, upload_id, lock=True)
                    if upload is None or upload.status != UploadState.COMPLETED:
                        raise _consumed()
                    upload.status = UploadState.CONSUMED
                uow.session.add(row)
                remember(uow.session, tenant_id, idempotency, row.id)
                self._note(uow.session, "create", row)
        except BlobNotFound as error:
            detail = "The same content was deleted at this very moment."
            raise AppError("content_missing", "Try again", 503, detail, retryable=True) from error
        except IntegrityError:
            earlier = self._recall(tenant_id, idempotency)
            if earlier is None:
                raise
            return earlier, False
        except AppError as error:
            if error.code in ("storage_quota", "model_quota"):  # another one took the room meanwhile
                release(self._db, self._content, tenant_id, [sha256])
                raise
            # The same request may have come twice at the same time, and the other one has consumed the upload.
            earlier = self._recall(tenant_id, idempotency) if error.code == "upload_consumed" else None
            if earlier is None:
                raise
            return earlier, False
        return row, True


def _consumed() -> AppError:
    return conflict("upload_consumed", "The upload has become a model or a data set already, or was aborted.")


@contextmanager
def local_copy(content: ContentStore, tenant_id: str, sha256: str, temp_dir: Path) -> Iterator[Path]:
    """The blob as a file of the caller's own, removed at the end (on one disk with the storage, a link). Read-only.
    Where the object lies, another upload of the same bytes may put its own file in the place of this one meanwhile,
    which those that look into it are not allowed to open."""
    with scratch_folder(temp_dir) as folder:
        copy, key = folder / "blob", blob_key(tenant_id, sha256)
        if content.store.local_path(key) is None:
            content.fetch(tenant_id, sha256, copy)
        else:
            content.store.fetch(key, copy)
        yield copy


def clean_name(name: str | None, filename: str) -> str:
    """The resource's name: given, or the file's name without its suffix. Raises 422."""
    if name is None:
        name = Path(filename).stem[:LONGEST_NAME]
    name = name.strip()
    if not 0 < len(name) <= LONGEST_NAME:
        raise _bad("name", f"must have 1 to {LONGEST_NAME} characters")
    if character := forbidden_character(name):
        raise _bad("name", f"must not hold the control character {character}")
    return name


def clean_filename(filename: str) -> str:
    """A plain file name without folders. Raises 422."""
    if not 0 < len(filename.encode("utf-8", "replace")) <= LONGEST_FILENAME:
        raise _bad("filename", f"must have 1 to {LONGEST_FILENAME} bytes")
    if "/" in filename or "\\" in filename or filename in (".", ".."):
        raise _bad("filename", "must be a plain file name without folders")
    if character := forbidden_character(filename):
        raise _bad("filename", f"must not hold the control character {character}")
    return filename


def _bad(field: str, message: str) -> AppError:
    return invalid_request(f"{field}: {message}", [FieldError(f"/{field}", message)])
