"""Receiving a file: from the network to disk and through SHA-256, with flat memory and nothing left behind."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import anyio.to_thread
from anyio import CapacityLimiter

from app.errors import AppError
from app.http.middleware import too_large
from app.scratch import new_file
from app.storage.common import start_writeback, translated_os_errors

_BLOCK = 4 << 20
# Of one write: for more at once Linux looks for larger runs of free memory to keep it in, which was seen to take ten
# times as long as the copying.
_WRITE = 1 << 20
_WRITEBACK = 32 << 20


class FileSink:
    """Gathers what arrives to blocks of 4 MiB; a thread writes and hashes one block while the next one arrives.

    At most two blocks are in memory. `limit`: the most bytes it takes, then 413.
    """

    def __init__(self, path: Path, descriptor: int, limit: int, limiter: CapacityLimiter) -> None:
        self.path = path
        self.size_bytes = 0
        self._descriptor = descriptor
        self._limit = limit
        self._limiter = limiter
        self._hash = hashlib.sha256()
        self._written = 0
        self._started = 0  # up to where the disk has been told to write
        self._chunks: list[bytes] = []
        self._held = 0
        self._writing: asyncio.Task[None] | None = None

    async def write(self, chunk: bytes) -> None:
        self.size_bytes += len(chunk)
        if self.size_bytes > self._limit:
            raise too_large(self._limit)
        self._chunks.append(chunk)
        self._held += len(chunk)
        if self._held >= _BLOCK:
            await self._hand_over()

    async def finish(self) -> str:
        """Write what is left; the hex SHA-256 of the whole."""
        await self._hand_over()
        await self._settle()
        return self._hash.hexdigest()

    async def close(self) -> None:
        """Wait for the thread, whatever became of it, and close the file."""
        with anyio.CancelScope(shield=True):
            if self._writing is not None:
                await asyncio.wait({self._writing})
                if not self._writing.cancelled():
                    self._writing.exception()  # seen: it was raised to the caller, or the caller has failed already
            os.close(self._descriptor)

    async def _hand_over(self) -> None:
        await self._settle()
        chunks, self._chunks, self._held = self._chunks, [], 0
        if chunks:
            self._writing = asyncio.create_task(self._in_thread(chunks))

    async def _in_thread(self, chunks: list[bytes]) -> None:
        await anyio.to_thread.run_sync(self._write, chunks, limiter=self._limiter)

    async def _settle(self) -> None:
        if self._writing is not None:
            await asyncio.shield(self._writing)
            self._writing = None

    def _write(self, chunks: list[bytes]) -> None:
        block = memoryview(b"".join(chunks))
        chunks.clear()
        size = len(block)
        self._hash.update(block)
        with translated_os_errors("receiving a file"):
            while block:
                block = block[os.write(self._descriptor, block[:_WRITE]) :]
        self._written += size
        if self._written - self._started >= _WRITEBACK:
            start_writeback(self._descriptor, self._started, self._written - self._started)
            self._started = self._written


@asynccontextmanager
async def file_sink(folder: Path, limit: int, limiter: CapacityLimiter) -> AsyncIterator[FileSink]:
    """A sink into a new file in `folder`, which is gone afterwards unless it was moved away."""
    descriptor, path = await anyio.to_thread.run_sync(_new_file, folder)
    sink = FileSink(path, descriptor, limit, limiter)
    try:
        yield sink
    finally:
        await sink.close()
        with anyio.CancelScope(shield=True), suppress(OSError):
            await anyio.to_thread.run_sync(lambda: path.unlink(missing_ok=True))


def _new_file(folder: Path) -> tuple[int, Path]:
    with translated_os_errors("receiving a file"):
        return new_file(folder)


def incomplete_body(detail: str) -> AppError:
    return AppError("incomplete_body", "The body is incomplete", 400, detail, retryable=True)
