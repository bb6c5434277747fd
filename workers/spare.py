"""The time in which a worker has no job, and what it is good for: a job goes first, and ends what is going on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.errors import AppError

log = structlog.get_logger(__name__)


class SpareTime:
    """Of one worker process. Its errands take turns with its jobs, one at a time."""

    def __init__(self, shutdown: threading.Event) -> None:
        self.shutdown = self._shutdown = shutdown
        self._turn = threading.Lock()
        self._wanted = threading.Event()
        self._look = threading.Event()

    @contextmanager
    def jobs_first(self) -> Iterator[None]:
        """No errand runs inside; the one that does ends now."""
        self._wanted.set()
        with self._turn:
            self._wanted.clear()
            yield

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Whether an errand may run inside; it is to end as soon as the time is `over()`."""
        if self._shutdown.is_set() or not self._turn.acquire(blocking=False):
            yield False
            return
        try:
            yield True
        finally:
            self._turn.release()

    def look(self) -> None:
        """There may be something to do now; or it is over."""
        self._look.set()

    def over(self) -> bool:
        return self._shutdown.is_set() or self._wanted.is_set()

    def run(self, errands: Sequence[Callable[[], bool]], every_s: float) -> None:
        """Until the shutdown: look every so often whether there is something to do. An errand answers whether there
        was, and asks for another turn by that."""
        while not self._shutdown.is_set():
            self._look.wait(every_s)
            self._look.clear()
            if self._shutdown.is_set():
                return
            for errand in errands:
                try:
                    while errand():
                        pass
                except (SQLAlchemyError, AppError, OSError) as error:
                    log.warning("errand_failed", error=str(error)[:300])


class Held:
    """A hold on something in the database, renewed as long as somebody asks whether to stop. `renew`: False where it is
    over."""

    def __init__(self, spare: SpareTime, renew: Callable[[], bool], every_s: float) -> None:
        self._spare, self._renew, self._every_s = spare, renew, every_s
        self._due = time.monotonic() + every_s
        self.lost = False

    def should_stop(self) -> bool:
        if time.monotonic() > self._due and not self.lost:
            self._due = time.monotonic() + self._every_s
            self.lost = not self._renew()
        return self.lost or self._spare.over()
