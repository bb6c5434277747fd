"""What happens to a job, until its end: from its event stream, and where none gets through, from long polls."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

import httpx

from anneal_client.errors import AnnealError, WaitTimeout, error_from
from anneal_client.events import TERMINAL, Event, StreamParser, changes
from anneal_client.transport import RETRIED_STATUS, Transport, pause_s, unreachable

LONG_POLL_S = 30.0
SILENCE_S = 60.0  # an event stream that says nothing for so long, not even a comment, is taken for dead

Json = dict[str, Any]


class Followed:
    """One job as it goes on. `timeout_s`: `WaitTimeout` is raised after so long."""

    def __init__(self, transport: Transport, job_id: str, last_event_id: str | None, timeout_s: float | None) -> None:
        self._transport = transport
        self._path = f"/v1/jobs/{quote(job_id, safe='')}"
        self._last_event_id = last_event_id
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._heard = False  # whether the connection that failed last had brought something

    async def job(self) -> Json:
        found: Json = (await self._transport.request("GET", self._path)).json()
        return found

    async def events(self) -> AsyncGenerator[Event, None]:
        """From the beginning, or after `last_event_id`, to the end of the job."""
        failures = 0
        while failures <= self._transport.retries:
            self._heard, streamed = False, True
            error: AnnealError | None = None
            try:
                async with aclosing(self._streamed()) as stream:
                    async for event in stream:
                        if event is None:
                            streamed = False
                            break
                        yield event
                        if event.terminal:
                            return
            except httpx.TransportError as broken:
                error = unreachable(broken)
            except AnnealError as refused:
                if refused.status is None:
                    raise
                error = refused
            if not streamed:
                break
            await self._require_time()
            if error is None and (await self.job())["status"] in TERMINAL:
                break  # ended without saying so in the stream: the poll below tells the end
            failures = 1 if self._heard else failures + 1
            await self._transport.io.sleep(pause_s(failures))
        async with aclosing(self._polled()) as polled:
            async for event in polled:
                yield event

    async def _streamed(self) -> AsyncGenerator[Event | None, None]:
        """Events of one connection; None where this is no stream. Raises the error of an answer that may pass."""
        transport = self._transport
        url = transport.resolve(f"{self._path}/events")
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if self._last_event_id is not None:
            headers["Last-Event-ID"] = self._last_event_id
        timeout = httpx.Timeout(10.0, read=self._left(SILENCE_S))
        async with transport.io.stream(transport.is_own(url), "GET", url, headers=headers, timeout=timeout) as opened:
            response = opened.response
            if not _is_stream(response):
                if response.status_code not in RETRIED_STATUS:
                    yield None
                    return
                await opened.read()
                raise error_from(response)
            parser = StreamParser()
            async with aclosing(opened.lines()) as lines:
                async for line in lines:
                    await self._require_time()
                    if (event := parser.feed(line)) is not None:
                        self._heard, self._last_event_id = True, event.id or self._last_event_id
                        yield event

    async def _polled(self) -> AsyncGenerator[Event, None]:
        before: Json = {}
        headers: dict[str, str] = {}
        while before.get("status") not in TERMINAL:
            await self._require_time()
            wait_s = self._left(LONG_POLL_S)
            params = {"wait": f"{wait_s:g}"} if before else None
            started = time.monotonic()
            response = await self._transport.request(
                "GET", self._path, params=params, headers=headers, timeout_s=wait_s + 30
            )
            if response.status_code != httpx.codes.NOT_MODIFIED:
                after: Json = response.json()
                for event in changes(before, after):
                    yield event
                before = after
                if etag := response.headers.get("ETag"):
                    headers["If-None-Match"] = etag
            if before.get("status") not in TERMINAL:  # a service that does not hold the poll
                await self._transport.io.sleep(max(0.0, 0.5 - (time.monotonic() - started)))

    def _left(self, most: float) -> float:
        """Seconds that one request may take."""
        return most if self._deadline is None else max(0.1, min(most, self._deadline - time.monotonic()))

    async def _require_time(self) -> None:
        if self._deadline is not None and self._timeout_s is not None and time.monotonic() >= self._deadline:
            job = await self.job()
            if job["status"] not in TERMINAL:
                raise WaitTimeout(job, self._timeout_s)


def _is_stream(response: httpx.Response) -> bool:
    kind = response.headers.get("Content-Type", "")
    return response.status_code == httpx.codes.OK and kind.startswith("text/event-stream")
