"""Files and folders for the time of one request. Each is locked by the process that uses it, for as long as that lives:
what is not locked was left by one that was killed, and goes with the next look at the folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "incoming-"
_YOUNG_S = 5.0  # it may be about to be locked


def new_file(folder: Path) -> tuple[int, Path]:
    """A new, locked file: descriptor, which holds the lock, and path."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor, Path(name)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A new, locked folder, which is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
    descriptor = os.open(made, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield made
    finally:
        os.close(descriptor)
        shutil.rmtree(made, ignore_errors=True)


def remove_stale(folder: Path) -> int:
    """Remove what processes that were killed have left."""
    removed = 0
    for path in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _YOUNG_S and is_unlocked(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed += 1
    return removed


def is_unlocked(path: Path) -> bool:
    """Whether no living process holds the lock of this file or folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
