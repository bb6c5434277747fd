"""Uploads that a later process goes on with: the id of a session, noted by what it uploads and where to."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from anneal_client.places import cache_folder

try:
    import fcntl
except ImportError:  # Windows: nothing is noted, `upload_id` still resumes
    fcntl = None  # type: ignore[assignment]


class Note:
    """The session that uploads one content; `upload_id` is None where there is none to go on with."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        text = "" if path is None else path.read_text(encoding="utf-8", errors="replace").strip()
        self.upload_id = text if text.isascii() and text.replace("_", "").isalnum() else None

    def write(self, upload_id: str) -> None:
        """Before the first part is sent."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.write_text(upload_id, encoding="utf-8")

    def forget(self) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()


@contextlib.contextmanager
def note_of(*what: str) -> Iterator[Note]:
    """The note about the upload of `what`. Held by one process at a time (a process that dies lets go of it); another
    one that uploads the same meanwhile gets an empty note, which remembers nothing. So does one without a writable
    cache folder."""
    name = hashlib.sha256("\0".join(what).encode()).hexdigest()
    with contextlib.ExitStack() as held:
        yield Note(_held(cache_folder() / "uploads" / name, held))


def _held(path: Path, held: contextlib.ExitStack) -> Path | None:
    if fcntl is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        held.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between our opening and locking it, the one before us may have finished and removed it.
        return path if os.path.samestat(os.fstat(descriptor), path.stat()) else None
    except OSError:
        return None
