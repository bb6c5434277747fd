"""Wakes requests that wait for a job to change.

The change happens in another process, so one task asks the database for the versions of the jobs that somebody waits
for: one short query every 150 ms however many wait, and none while nobody does.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import anyio.to_thread
import structlog

log = structlog.get_logger(__name__)

_INTERVAL_S = 0.15
_PAUSE_AFTER_ERROR_S = 1.0


class JobWatcher:
    """`versions` maps the ids it is given to the versions in the database; it blocks and runs in a thread."""

    def __init__(
        self, versions: Callable[[Collection[str]], Mapping[str, int]], interval_s: float = _INTERVAL_S
    ) -> None:
        self._versions = versions
        self._interval_s = interval_s
        self._waiting: dict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self._known: dict[asyncio.Future[None], int] = {}
        self._wanted = asyncio.Event()
        self.closed = False

    def close(self) -> None:
        """At the end of the process: whoever waits is woken, and nobody waits any more."""
        self.closed = True
        self._wake(list(self._known))

    async def wait(self, job_id: str, version: int, timeout_s: float) -> bool:
        """Wait until the job's version is not `version` any more, or the job is gone; False after `timeout_s`, and
        at once when closed."""
        if self.closed:
            return False
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[job_id].add(future)
        self._known[future] = version
        self._wanted.set()
        try:
            await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            return False
        finally:
            self._forget(job_id, future)
        return True

    def _forget(self, job_id: str, future: asyncio.Future[None]) -> None:
        self._known.pop(future, None)
        waiting = self._waiting.get(job_id)
        if waiting is not None:
            waiting.discard(future)
            if not waiting:
                del self._waiting[job_id]
        if not self._waiting:
            self._wanted.clear()

    async def run(self) -> None:
        """The task; where it died, it goes on with those that wait when it is run again."""
        while True:
            await self._wanted.wait()
            ids = list(self._waiting)
            try:
                versions = await anyio.to_thread.run_sync(self._versions, ids)
            except Exception as error:
                log.warning("watcher_failed", error=str(error))
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
                continue
            for job_id in ids:
                version = versions.get(job_id)
                self._wake([f for f in self._waiting.get(job_id, ()) if self._known.get(f) != version])
            await asyncio.sleep(self._interval_s)

    @staticmethod
    def _wake(futures: Collection[asyncio.Future[None]]) -> None:
        for future in futures:
            if not future.done():
                future.set_result(None)
