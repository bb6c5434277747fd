"""Objects as files in a folder: `objects/<key>`, uploads under way in `uploads/<id>/`, files being written in `tmp/`.

An object is written to a temporary file, flushed to the disk, and then linked under its name, so a reader, and a
machine that loses its power, see all of it or nothing. A key may not be a folder of another key.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from uuid import uuid4

from app.scratch import is_unlocked
from app.storage.base import BlobNotFound, InvalidUpload, StoredObject, StoredPart
from app.storage.common import (
    check_parts,
    is_key,
    require_regular_file,
    translated_os_errors,
    validate_key,
    validate_part_number,
    validate_prefix,
    validate_range,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_COPY_BYTES = 1 << 20
_UNLOCKED_S = 60.0  # a file without a lock for so long is nobody's
# Objects are shared by hard links: nobody writes to them.
_READ_ONLY = 0o444
_NO_SUCH_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Another disk, a file system without hard links, a file of another user, too many links.
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


class LocalStore:
    """The storage contract (`app.storage.base.BlobStore`) on a local disk. Safe for several processes at once."""

    def __init__(self, root: Path) -> None:
        """`root` is made on the first write."""
        self._root = root
        self._objects = root / "objects"
        self._uploads = root / "uploads"
        self._temp = root / "tmp"

    # Objects

    def put_file(self, key: str, path: Path, *, move: bool = False, replace: bool = False) -> None:
        target = self._path(key)
        require_regular_file(path)
        with translated_os_errors("storing a file"):
            wanted = replace or not target.is_file()
            if wanted and not (move and self._link_in(path, target, replace=replace)):
                with self._temporary() as temporary:
                    with path.open("rb") as source, temporary.open("wb") as sink:
                        shutil.copyfileobj(source, sink, _COPY_BYTES)
                    self._publish(temporary, target, replace=replace)
            if move:
                path.unlink(missing_ok=True)

    def fetch(self, key: str, path: Path) -> None:
        source = self._path(key)
        with translated_os_errors("fetching a file"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{uuid4().hex}.part")
            try:
                if not stat.S_ISREG(source.stat().st_mode):
                    raise BlobNotFound(key)
                try:
                    os.link(source, temporary)
                except OSError as exc:
                    if exc.errno not in _NO_LINK:
                        raise
                    shutil.copyfile(source, temporary)
                temporary.replace(path)
            except (FileNotFoundError, NotADirectoryError) as exc:
                raise BlobNotFound(key) from exc
            finally:
                # Also where `path` already was a link to this object: then a rename does nothing.
                temporary.unlink(missing_ok=True)

    def open(self, key: str, start: int = 0, length: int | None = None) -> BinaryIO:
        path = self._path(key)
        validate_range(start, length)
        with translated_os_errors("opening a file"):
            try:
                stream = path.open("rb")
            except _NO_SUCH_FILE as exc:
                raise BlobNotFound(key) from exc
            stream.seek(start)
        if length is None:
            return stream
        return io.BufferedReader(_FirstBytes(stream, length), _COPY_BYTES)

    def size(self, key: str) -> int | None:
        with translated_os_errors("looking for a file"):
            try:
                status = self._path(key).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def copy(self, source: str, key: str, *, replace: bool = False) -> None:
        path, target = self._path(source), self._path(key)
        with translated_os_errors("storing a file"):
            if target.is_file() and not replace:
                return
            try:
                linked = self._link_in(path, target, replace=replace)
            except _NO_SUCH_FILE as exc:
                raise BlobNotFound(source) from exc
        if not linked:
            self.put_file(key, path, replace=replace)

    def delete(self, key: str) -> None:
        with translated_os_errors("deleting a file"), suppress(*_NO_SUCH_FILE):
            self._path(key).unlink()

    def list(self, prefix: str) -> Iterator[StoredObject]:
        folder, _, _ = validate_prefix(prefix).rpartition("/")
        with translated_os_errors("listing files"):
            for path in _files(self._objects / folder):
                key = path.relative_to(self._objects).as_posix()
                if not key.startswith(prefix) or not is_key(key):
                    continue
                with suppress(FileNotFoundError):  # deleted meanwhile
                    status = path.stat()
                    yield StoredObject(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def presigned_get(self, key: str, *, filename: str, expires_s: int) -> str | None:  # noqa: ARG002  # the contract
        return None

    def check(self) -> None:
        with translated_os_errors("writing to it"), self._temporary() as probe:
            probe.write_bytes(b"anneal")

    def remove_stale(self, older_than_s: float) -> int:
        """Remove what killed processes left in `tmp/` (nobody holds its lock, or it is older than that), and say how
        many files that were. Not part of the contract."""
        removed = 0
        with translated_os_errors("cleaning up"):
            for path in _files(self._temp):
                with suppress(FileNotFoundError):
                    age = time.time() - path.stat().st_mtime
                    if age > older_than_s or (age > _UNLOCKED_S and is_unlocked(path)):
                        path.unlink()
                        removed += 1
        return removed

    # Uploads. A folder each: `key`, and the parts under their numbers.

    def begin_upload(self, key: str) -> str:
        validate_key(key)
        upload_id = uuid4().hex
        folder = self._uploads / upload_id
        with translated_os_errors("beginning an upload"):
            _make_folders(folder)
            (folder / "key").write_text(key)
        return upload_id

    def presigned_part(  # the contract's arguments, of which it needs none
        self,
        key: str,  # noqa: ARG002
        upload_id: str,  # noqa: ARG002
        number: int,  # noqa: ARG002
        *,
        size_bytes: int,  # noqa: ARG002
        expires_s: int,  # noqa: ARG002
    ) -> str | None:
        return None

    def put_part(self, key: str, upload_id: str, number: int, path: Path) -> StoredPart:
        validate_part_number(number)
        require_regular_file(path)
        with translated_os_errors("storing a part"):
            folder = self._upload(key, upload_id)
            target = folder / f"{number:05d}"
            try:
                try:
                    with path.open("rb") as source:
                        os.fsync(source.fileno())
                    path.replace(target)
                except OSError as exc:
                    if exc.errno not in _NO_LINK:
                        raise
                    with self._temporary() as temporary:
                        shutil.copyfile(path, temporary)
                        _sync(temporary)
                        temporary.replace(target)
                _sync(folder)
                return _part(target)
            except FileNotFoundError as exc:
                raise InvalidUpload("The upload was ended meanwhile.") from exc
            finally:
                path.unlink(missing_ok=True)

    def list_parts(self, key: str, upload_id: str) -> Sequence[StoredPart]:
        with translated_os_errors("listing parts"):
            found = []
            for path in sorted(self._upload(key, upload_id).glob("[0-9]*")):
                with suppress(FileNotFoundError):
                    found.append(_part(path))
            return found

    def complete_upload(self, key: str, upload_id: str, parts: Sequence[StoredPart]) -> None:
        folder, total = self._upload_folder(upload_id), sum(p.size_bytes for p in parts)
        validate_key(key)
        with translated_os_errors("joining the parts"):
            try:
                self._join(key, upload_id, parts, total)
            except (InvalidUpload, FileNotFoundError) as exc:
                # No error if it was completed before, by a call whose answer was lost or by one at the same time.
                if folder.exists() or self.size(key) != total:
                    raise exc if isinstance(exc, InvalidUpload) else InvalidUpload("The upload was ended.") from exc
            self._forget(folder)

    def abort_upload(self, key: str, upload_id: str) -> None:
        with translated_os_errors("forgetting an upload"), suppress(InvalidUpload):
            self._forget(self._upload(key, upload_id))

    def abort_uploads(self, key: str) -> None:
        validate_key(key)
        with translated_os_errors("forgetting an upload"):
            for path in self._uploads.glob("*/key"):
                with suppress(FileNotFoundError):
                    if path.read_text() == key:
                        self._forget(path.parent)

    def _join(self, key: str, upload_id: str, parts: Sequence[StoredPart], total: int) -> None:
        folder = self._upload(key, upload_id)
        ordered = check_parts(parts, self.list_parts(key, upload_id))
        # Copied, not appended to the first part: after a crash half-way the parts must still be whole.
        with self._temporary() as temporary:
            with temporary.open("wb") as sink:
                for part in ordered:
                    with (folder / f"{part.number:05d}").open("rb") as source:
                        shutil.copyfileobj(source, sink, _COPY_BYTES)
            self._publish(temporary, self._path(key))
        if self.size(key) != total:
            raise InvalidUpload("Another object stands under this key, or a part was sent again meanwhile.")

    def _forget(self, folder: Path) -> None:
        """Remove an upload. Renamed first, so that nobody sees half of its parts."""
        _make_folders(self._temp)
        with suppress(FileNotFoundError):
            doomed = folder.rename(self._temp / uuid4().hex)
            # What stays behind is found by `remove_stale`.
            shutil.rmtree(doomed, ignore_errors=True)

    def _upload_folder(self, upload_id: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{32}", upload_id):
            raise InvalidUpload("There is no such upload.")
        return self._uploads / upload_id

    def _upload(self, key: str, upload_id: str) -> Path:
        folder = self._upload_folder(upload_id)
        try:
            if (folder / "key").read_text() == validate_key(key):
                return folder
        except FileNotFoundError:
            pass
        raise InvalidUpload("There is no such upload.")

    # Files

    def _path(self, key: str) -> Path:
        return self._objects / validate_key(key)

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A new file on the storage's disk, locked while this process lives, and removed at the end where it still
        stands under this name."""
        _make_folders(self._temp)
        path = self._temp / uuid4().hex
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)

    def _link_in(self, path: Path, target: Path, *, replace: bool) -> bool:
        """Make the file itself the object, where the disk is the same; False where that is not possible."""
        try:
            self._publish(path, target, replace=replace)
        except OSError as exc:
            if exc.errno in _NO_LINK:
                return False
            raise
        return True

    def _publish(self, path: Path, target: Path, *, replace: bool = False) -> None:
        """Give the finished file its name; an object that stands there already is left as it is, or replaced."""
        path.chmod(_READ_ONLY)
        # The source's own time may be years ago, and `list` is asked what is old.
        os.utime(path)
        _sync(path)
        _make_folders(target.parent)
        try:
            os.link(path, target)
        except FileExistsError:
            if target.is_dir():
                raise  # a key that is a folder of another one
            if not replace:
                return
            self._link_over(path, target)
        except OSError as exc:
            # No hard links on this file system: a rename would do, but only where nothing is lost by it.
            if exc.errno not in _NO_LINK or path.parent != self._temp:
                raise
            path.replace(target)
        _sync(target.parent)

    def _link_over(self, path: Path, target: Path) -> None:
        """Have the file stand in the place of an object, which stays whole for those that have it open or linked."""
        _make_folders(self._temp)
        name = self._temp / uuid4().hex
        os.link(path, name)
        try:
            name.replace(target)
        finally:
            name.unlink(missing_ok=True)  # also where it was a link to this object: then a rename does nothing


class _FirstBytes(io.RawIOBase):
    """The first `length` bytes of what is left in a stream; closes it."""

    def __init__(self, stream: BinaryIO, length: int) -> None:
        self._stream = stream
        self._left = length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._stream.read(min(len(view), self._left))
        view[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _part(path: Path) -> StoredPart:
    """The tag tells one sending of a part from the next; the content's digest would cost reading it once more."""
    status = path.stat()
    return StoredPart(int(path.name), status.st_size, f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}")


def _files(folder: Path) -> Iterator[Path]:
    """Every regular file below the folder; what disappears meanwhile is left out."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def _make_folders(folder: Path) -> None:
    """Make the folder and its parents, each on the disk before the next; only the owner may look into them."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
