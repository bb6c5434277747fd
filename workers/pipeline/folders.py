"""Folders that a stage wrote to: how much is in them, and how they go, however deep or many."""

from __future__ import annotations

import itertools
import os
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_EVERY_S = 0.5
_COST = 0.02  # of a core, at most
_LONGEST_S = 10.0  # between two looks
MOST_ENTRIES = 200_000
_RESERVE_BYTES, _RESERVE_SHARE = 1 << 30, 0.05  # of the disk, for everybody else: the smaller of the two
_OF_NOTE_BYTES = 64 << 20


class Written:
    """What lies below some folders, looked at now and then."""

    def __init__(self, folders: Sequence[Path], limit_bytes: int) -> None:
        self._folders, self._limit = folders, limit_bytes
        self._due = time.monotonic() + _EVERY_S
        self._last: str | None = None

    def too_much(self) -> str | None:
        """In words, as of the last look; None where all is well."""
        began = time.monotonic()
        if began >= self._due:
            self._last = self._look()
            took = time.monotonic() - began
            self._due = began + min(max(took / _COST, _EVERY_S), _LONGEST_S)
        return self._last

    def _look(self) -> str | None:
        used, entries = usage(self._folders, MOST_ENTRIES, self._limit)
        if entries > MOST_ENTRIES:
            return f"more than {MOST_ENTRIES} files"
        if used > self._limit:
            return f"more than {self._limit >> 20} MiB"
        if used > _OF_NOTE_BYTES:
            with suppress(OSError):
                disk = os.statvfs(self._folders[0])
                if disk.f_bavail * disk.f_frsize < min(_RESERVE_BYTES, _RESERVE_SHARE * disk.f_blocks * disk.f_frsize):
                    return f"{used >> 20} MiB, and the disk is nearly full"
        return None


def usage(folders: Sequence[Path], most_entries: int, most_bytes: int) -> tuple[int, int]:
    """(bytes on disk, entries) below folders; no more is counted where one of them is passed. No link is followed."""
    used = entries = 0
    left = [*map(str, folders)]
    while left:
        path = left.pop()
        try:
            with os.scandir(path) as found:
                for entry in found:
                    entries += 1
                    used += 512 * entry.stat(follow_symlinks=False).st_blocks
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    if entries > most_entries or used > most_bytes:
                        return used, entries
        except FileNotFoundError:
            continue
        except OSError:  # a path that is too long for anybody, or a folder that nobody may read
            entries += 1000
    return used, entries


def remove_tree(folder: Path) -> None:
    """Without recursion, and without paths that grow with the depth; nothing is raised for what cannot be removed.
    Nobody writes to it meanwhile."""
    names = (f".removed-{n}" for n in itertools.count())
    left = [folder]
    while left:
        path = left.pop()
        with suppress(OSError):
            if not stat.S_ISDIR(path.lstat().st_mode):
                path.unlink()
                continue
            path.chmod(0o700)
            with os.scandir(path) as found:
                entries = [*found]
            for entry in entries:
                with suppress(OSError):
                    inner = Path(entry.path)
                    if entry.is_dir(follow_symlinks=False):
                        inner.chmod(0o700)
                        left.append(inner.rename(folder.with_name(folder.name + next(names))))
                    else:
                        inner.unlink()
            path.rmdir()
