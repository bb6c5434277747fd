"""Threads for what may take long, apart from those that answer short requests, and shared fairly between tenants."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any, TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.to_thread
from anyio import CapacityLimiter

from app.errors import storage_unavailable

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class SharedThreads:
    """So many threads, at most `each` of them for one tenant. Whoever waits longer than `patience_s` for one is told
    that the storage does not keep up (503): where it hangs, requests do not pile up behind it."""

    def __init__(self, threads: int, each: int, patience_s: float) -> None:
        self._all = CapacityLimiter(threads)
        self._each = each
        self._tenants: dict[str, CapacityLimiter] = {}
        self._unlimited = CapacityLimiter(math.inf)  # `_all` has counted
        self._patience_s = patience_s

    async def run(self, tenant_id: str, call: Callable[[Unpack[Arguments]], T], *arguments: *Arguments) -> T:
        """`call(*arguments)` in a thread."""
        own = self._tenants.setdefault(tenant_id, CapacityLimiter(self._each))
        try:
            async with AsyncExitStack() as stack:
                with anyio.move_on_after(self._patience_s) as waiting:
                    await stack.enter_async_context(own)
                    await stack.enter_async_context(self._all)
                if waiting.cancelled_caught:
                    raise storage_unavailable("The storage does not keep up: too many requests wait for it.")
                return await anyio.to_thread.run_sync(call, *arguments, limiter=self._unlimited)
        finally:
            if not own.borrowed_tokens and not own.statistics().tasks_waiting:
                self._tenants.pop(tenant_id, None)


class SharedReads:
    """Equal reads that are asked for at the same time are one read, in one thread. `threads`: at most so many of its
    own, for reads that may come in crowds; without, those that answer short requests."""

    def __init__(self, threads: int | None = None) -> None:
        self._limiter = None if threads is None else CapacityLimiter(threads)
        self._running: dict[Hashable, asyncio.Task[Any]] = {}

    def start(self, key: Hashable, begin: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """The task that runs under this key; `begin` makes it where there is none. It goes on when nobody waits."""
        task = self._running.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(begin())
            self._running[key] = task
            task.add_done_callback(lambda done: self._ended(key, done))
        return task

    async def read(self, key: Hashable, call: Callable[[Unpack[Arguments]], T], *arguments: *Arguments) -> T:
        """What `call(*arguments)` gives to everybody who asks with this key until it is there."""

        def begin() -> Coroutine[Any, Any, T]:
            return anyio.to_thread.run_sync(call, *arguments, limiter=self._limiter)

        return await asyncio.shield(self.start(key, begin))

    def _ended(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        self._running.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen: whoever still waits gets it


class Places:
    """How many waiting requests (event streams, long polls) each tenant has."""

    def __init__(self, each: int) -> None:
        self._each = each
        self._taken: Counter[str] = Counter()

    def full(self, tenant_id: str) -> bool:
        return self._taken[tenant_id] >= self._each

    @contextmanager
    def taken(self, tenant_id: str) -> Iterator[None]:
        self._taken[tenant_id] += 1
        try:
            yield
        finally:
            self._taken[tenant_id] -= 1
            if not self._taken[tenant_id]:
                del self._taken[tenant_id]
