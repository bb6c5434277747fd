"""How the core reaches the world, twice: blocking, and for an event loop.

The core is written once, as coroutines. Whatever they wait for goes through an `Io`. The coroutines of `BlockingIo`
never suspend: they block, and are done when they return, so `run` needs no event loop. Those of `LoopIo` suspend, in
asyncio or trio, as anyio does.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ParamSpec, Protocol, TypeVar

import anyio
import anyio.to_thread
import httpx

T = TypeVar("T")
P = ParamSpec("P")


def run(call: Coroutine[Any, Any, T]) -> T:
    """What a coroutine over a `BlockingIo` returns."""
    try:
        call.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    call.close()
    raise RuntimeError("a blocking call was suspended")


def iterate(items: AsyncGenerator[T, None]) -> Iterator[T]:
    """The items of an asynchronous generator over a `BlockingIo`."""
    try:
        while True:
            try:
                item = run(_next(items))
            except StopAsyncIteration:
                return
            yield item
    finally:
        run(_close(items))


async def _next(items: AsyncGenerator[T, None]) -> T:
    return await items.__anext__()


async def _close(items: AsyncGenerator[Any, None]) -> None:
    await items.aclose()


class Opened(Protocol):
    """An answer whose body comes bit by bit."""

    response: httpx.Response

    async def read(self) -> None:
        """Read the rest; then it stands in the response."""

    def lines(self) -> AsyncGenerator[str, None]: ...

    def blocks(self) -> AsyncGenerator[bytes, None]: ...


class Io(ABC):
    """Requests, pauses, files, several things at once. `headers` go with requests to `own` addresses only."""

    @abstractmethod
    async def request(self, own: bool, method: str, url: httpx.URL, **options: Any) -> httpx.Response:
        """One request; `content` is an iterator of bytes."""

    @abstractmethod
    def stream(self, own: bool, method: str, url: httpx.URL, **options: Any) -> AbstractAsyncContextManager[Opened]: ...

    @abstractmethod
    async def sleep(self, seconds: float) -> None: ...

    @abstractmethod
    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A function that blocks."""

    @abstractmethod
    async def all(self, tasks: Sequence[Callable[[], Coroutine[Any, Any, None]]], workers: int) -> None:
        """Each task, `workers` of them at a time. The first failure ends the rest and is raised."""

    @abstractmethod
    async def close(self) -> None: ...


class BlockingIo(Io):
    def __init__(self, headers: Mapping[str, str], timeout_s: float) -> None:
        self._clients = (httpx.Client(timeout=timeout_s), httpx.Client(headers=headers, timeout=timeout_s))

    async def request(self, own: bool, method: str, url: httpx.URL, **options: Any) -> httpx.Response:
        return self._clients[own].request(method, url, **options)

    @asynccontextmanager
    async def stream(self, own: bool, method: str, url: httpx.URL, **options: Any) -> AsyncIterator[Opened]:
        with self._clients[own].stream(method, url, **options) as response:
            yield _BlockingAnswer(response)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  (it blocks by design)

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    async def all(self, tasks: Sequence[Callable[[], Coroutine[Any, Any, None]]], workers: int) -> None:
        with ThreadPoolExecutor(max_workers=workers) as pool:
            pending = [pool.submit(_run_task, task) for task in tasks]
            try:
                for future in pending:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    async def close(self) -> None:
        for client in self._clients:
            client.close()


def _run_task(task: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run(task())  # made here, so that one that never comes to its turn is no coroutine that was never awaited


class _BlockingAnswer:
    def __init__(self, response: httpx.Response) -> None:
        self.response = response

    async def read(self) -> None:
        self.response.read()

    async def lines(self) -> AsyncGenerator[str, None]:
        for line in self.response.iter_lines():
            yield line

    async def blocks(self) -> AsyncGenerator[bytes, None]:
        for block in self.response.iter_bytes():
            yield block


class LoopIo(Io):
    def __init__(self, headers: Mapping[str, str], timeout_s: float) -> None:
        self._clients = (httpx.AsyncClient(timeout=timeout_s), httpx.AsyncClient(headers=headers, timeout=timeout_s))

    async def request(self, own: bool, method: str, url: httpx.URL, **options: Any) -> httpx.Response:
        if (content := options.get("content")) is not None:
            options["content"] = _in_threads(content)
        return await self._clients[own].request(method, url, **options)

    @asynccontextmanager
    async def stream(self, own: bool, method: str, url: httpx.URL, **options: Any) -> AsyncIterator[Opened]:
        async with self._clients[own].stream(method, url, **options) as response:
            yield _LoopAnswer(response)

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await anyio.to_thread.run_sync(lambda: function(*args, **kwargs))

    async def all(self, tasks: Sequence[Callable[[], Coroutine[Any, Any, None]]], workers: int) -> None:
        limiter = anyio.CapacityLimiter(workers)
        failures: list[Exception] = []
        async with anyio.create_task_group() as group:

            async def one(task: Callable[[], Awaitable[None]]) -> None:
                async with limiter:
                    try:
                        await task()
                    except Exception as failure:
                        failures.append(failure)
                        group.cancel_scope.cancel()

            for task in tasks:
                group.start_soon(one, task)
        if failures:
            raise failures[0]

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()


class _LoopAnswer:
    def __init__(self, response: httpx.Response) -> None:
        self.response = response

    async def read(self) -> None:
        await self.response.aread()

    async def lines(self) -> AsyncGenerator[str, None]:
        async for line in self.response.aiter_lines():
            yield line

    async def blocks(self) -> AsyncGenerator[bytes, None]:
        async for block in self.response.aiter_bytes():
            yield block


async def _in_threads(blocks: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    """What reads a file must not hold up the loop."""
    while (block := await anyio.to_thread.run_sync(next, blocks, None)) is not None:
        yield block
