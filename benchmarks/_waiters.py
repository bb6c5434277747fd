"""Clients that wait for jobs to change: long polls and event streams, on plain sockets in one process.

    python benchmarks/_waiters.py < ASKED.json

`{port, key, jobs: [id], polls, streams}`: each poll and stream is of another job, in turns. Prints "ready" once all of
them wait; after another line, a line of JSON: when (by the machine's monotonic clock) each got to know of which change.
A change is told by its number: of a stream's event as `n`, of a poll's answer as the job's progress × 10⁶.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any

HOST = "127.0.0.1"
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_ETAG = re.compile(rb"etag: *([^\r\n]+)", re.IGNORECASE)
_PROGRESS = re.compile(rb'"progress": ?([0-9.e+-]+)')
_NUMBER = re.compile(rb'"n":(\d+)')
Seen = list[tuple[str, int, float]]  # job, number of the change, when


async def stream(asked: dict[str, Any], job: str, seen: Seen, waits: list[int]) -> None:
    reader, writer = await asyncio.open_connection(HOST, asked["port"], limit=1 << 20)
    writer.write(_head(asked, f"/v1/jobs/{job}/events"))
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head[:20]:
        raise RuntimeError(head.decode())
    await reader.readuntil(b"retry: 1000\n\n")
    waits.append(1)
    while line := await reader.readline():
        if line.startswith(b"data: ") and (found := _NUMBER.search(line)):
            seen.append((job, int(found[1]), time.monotonic()))
    raise RuntimeError("a stream ended")


async def poll(asked: dict[str, Any], job: str, seen: Seen, waits: list[int]) -> None:
    reader, writer = await asyncio.open_connection(HOST, asked["port"], limit=1 << 20)
    etag, target = b"", f"/v1/jobs/{job}"
    while True:
        writer.write(_head(asked, target, etag))
        head = await reader.readuntil(b"\r\n\r\n")
        if head[9:12] not in (b"200", b"304"):
            raise RuntimeError(head.decode())
        length = _LENGTH.search(head)
        body = await reader.readexactly(int(length[1])) if length is not None and head[9:12] == b"200" else b""
        found = _PROGRESS.search(body)
        if etag and found:
            seen.append((job, round(float(found[1]) * 1e6), time.monotonic()))
        tag = _ETAG.search(head)
        if not etag:
            target += "?wait=30"
            waits.append(1)
        etag = tag[1] if tag is not None else etag


def _head(asked: dict[str, Any], target: str, etag: bytes = b"") -> bytes:
    lines = [f"GET {target} HTTP/1.1", f"Host: {HOST}:{asked['port']}", f"Authorization: Bearer {asked['key']}"]
    if etag:
        lines.append(f"If-None-Match: {etag.decode()}")
    return "\r\n".join([*lines, "", ""]).encode()


async def main() -> None:
    asked = json.loads(sys.stdin.readline())
    polled, streamed, waits = Seen(), Seen(), list[int]()
    jobs = asked["jobs"]
    tasks = [
        asyncio.ensure_future(stream(asked, jobs[i % len(jobs)], streamed, waits)) for i in range(asked["streams"])
    ]
    tasks += [asyncio.ensure_future(poll(asked, jobs[i % len(jobs)], polled, waits)) for i in range(asked["polls"])]
    while len(waits) < len(tasks):
        failed = [task for task in tasks if task.done()]
        if failed:
            failed[0].result()
        await asyncio.sleep(0.05)
    await asyncio.sleep(1)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    lost = [str(task.exception()) for task in tasks if task.done()]
    sys.stdout.write(json.dumps({"streams": streamed, "polls": polled, "lost": lost}) + "\n")
    sys.stdout.flush()
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    asyncio.run(main())
