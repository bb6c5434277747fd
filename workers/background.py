"""The worker's own threads: none of them ends unnoticed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)


class Background:
    """Threads that are to run until `shutdown`. Where one ends before that, `give_up` is told why: a worker without
    heartbeat or sweeper looks alive and does harm."""

    def __init__(self, shutdown: threading.Event, give_up: Callable[[str], None]) -> None:
        self._shutdown = shutdown
        self._give_up = give_up
        self._threads: list[threading.Thread] = []

    def start(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guarded, args=(name, target), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _guarded(self, name: str, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException:  # SystemExit, too, ends a thread without a word
            log.exception("thread_died", thread=name)
        if not self._shutdown.is_set():
            self._give_up(f"its thread {name!r} ended")

    def join(self, timeout_s: float) -> None:
        for thread in self._threads:
            thread.join(timeout=timeout_s)


class Regularly:
    """Says `due` at once, and then every so many seconds."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._every_s
        return True


class InARow:
    """Counts failures that no success interrupts."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0

    def add(self, failed: bool) -> bool:
        """Note one more end; True where that makes too many failures in a row."""
        self._count = self._count + 1 if failed else 0
        return self._count >= self._limit
