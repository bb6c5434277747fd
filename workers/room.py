"""Whether this worker's disk has room for a job. A worker whose disk is full fails every job within a second, is idle
again, and so would get all of them: it takes none until there is room."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

_LATELY_S = 30.0


class Room:
    """`least_bytes` are to be free on the disk of `folder`; 0 = it is not looked at."""

    def __init__(self, folder: Path, least_bytes: int) -> None:
        self._folder, self._least = folder, least_bytes
        self._short_at: float | None = None
        self._short = False

    def enough(self) -> bool:
        """Looks now."""
        try:
            free = shutil.disk_usage(self._folder).free if self._least else 0
        except OSError:  # no disk to ask is another fault than a full one
            free = self._least
        short = free < self._least
        if short:
            self._short_at = time.monotonic()
        if short != self._short:
            self._short = short
            log.warning("disk_full" if short else "disk_has_room", free_bytes=free, least_bytes=self._least)
        return not short

    def short_lately(self) -> bool:
        """Whether it was full a moment ago, also where what a job left was cleared away since."""
        return not self.enough() or (self._short_at is not None and time.monotonic() - self._short_at < _LATELY_S)
