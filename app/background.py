"""What runs beside an API's requests: started again when it dies, and said so."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import structlog

log = structlog.get_logger(__name__)

_PAUSE_S = 1.0
_TOLD_S = 60.0


class Background:
    """Tasks that are to run until `stop`, and what is known of those, and of threads, that died."""

    def __init__(self, pause_s: float = _PAUSE_S) -> None:
        self._pause_s = pause_s
        self._tasks: list[asyncio.Task[None]] = []
        self._lock = threading.Lock()
        self._died: dict[str, float] = {}

    def keep(self, name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run it in the running loop; whenever it ends, it is started again after a pause."""
        self._tasks.append(asyncio.get_running_loop().create_task(self._kept(name, run), name=name))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task

    def note_death(self, name: str) -> None:
        """For threads, too: `tell_of_dead_threads(background.note_death)`."""
        with self._lock:
            self._died[name] = time.monotonic()

    def died_of_late(self, within_s: float = _TOLD_S) -> list[str]:
        """The names of what died within so many seconds, whether it runs again or not."""
        now = time.monotonic()
        with self._lock:
            self._died = {name: at for name, at in self._died.items() if now - at <= within_s}
            return sorted(self._died)

    async def _kept(self, name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await run()
                log.error("task_ended", task=name)
            except Exception:
                log.exception("task_died", task=name)
            self.note_death(name)
            await asyncio.sleep(self._pause_s)


def tell_of_dead_threads(told: Callable[[str], None]) -> None:
    """From now on `told` gets, in that thread, the name of every thread of this process that an exception ends. By
    itself Python prints a trace and goes on as if nothing were missing."""

    def died(arguments: threading.ExceptHookArgs) -> None:
        name = arguments.thread.name if arguments.thread is not None else "unknown"
        trace = (arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
        log.error("thread_died", thread=name, exc_info=trace)
        told(name)

    threading.excepthook = died
