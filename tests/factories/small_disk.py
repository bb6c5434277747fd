"""A disk that is soon full: a file system of its own in memory, and what fills one to its last byte."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int | None, owner: pwd.struct_passwd | None = None) -> Iterator[Path | None]:
    """A file system of this size at `folder`, which is made, and is `owner`'s. Yields None where this user may not
    mount one, or none is wanted: then it is a folder."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    made = megabytes is not None and not subprocess.run(mount, capture_output=True, check=False).returncode
    try:
        if owner is not None:
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        yield folder if made else None
    finally:
        if made:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(path: Path) -> None:
    """Write to this file until not a byte more goes in."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """Inside, there is no room on it."""
    filler = disk / "filler"
    fill(filler)
    try:
        yield
    finally:
        filler.unlink(missing_ok=True)
