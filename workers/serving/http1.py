"""HTTP/1.1 for `serve.py`. A body whose length is told is read straight into memory of that size, and an answer may
come later without a task of its own.

A general server hands a body on in pieces of what a socket held, copied at every step and with a turn of the event loop
for each: of an image of 600 kB that makes some ten. Requests are parsed by llhttp (`httptools`); each
connection answers one after the other, in the order in which they came.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from email.utils import formatdate
from functools import lru_cache, partial
from http import HTTPStatus
from socket import socket
from typing import Any, cast
from urllib.parse import unquote

import httptools
import numpy as np

if __package__:
    from .http_messages import Answer, App, HttpError, Incoming, Later, Request, Told, failed
else:  # beside this file, in a bundle
    from http_messages import (  # type: ignore[import-not-found,no-redef]
        Answer,
        App,
        HttpError,
        Incoming,
        Later,
        Request,
        Told,
        failed,
    )

_READ = 16 << 10  # of a request's head, and of bodies that come with it, at once
_MOST_HEAD = 64 << 10
_BODY_S = 30.0  # for the whole body of a request to come
_BUFFERED = 4  # the largest requests that may be on their way at once
_LINGER_S = 2.0  # in which a client that is refused may still send, so that it sees why
_TOGETHER = 64 << 10  # bytes of an answer that are copied to be sent in one piece with its head
_LAST_ACCEPTED_S = 0.05  # for those whose connection was made just before the end


class HttpServer:
    """`max_bytes`: of a request's body; `idle_s`: how long a connection may be without a request."""

    def __init__(self, app: App, *, max_bytes: int = 64 << 20, idle_s: float = 75.0) -> None:
        self.app, self.max_bytes, self.idle_s = app, max_bytes, idle_s
        self.connections: set[Connection] = set()
        self.buffered = 0  # bytes of bodies that are not whole yet
        self.stopping = False
        self._server: asyncio.Server | None = None
        self._closed = asyncio.Event()
        self._date = (0, b"")

    async def start(self, listening: socket) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), sock=listening, backlog=2048)

    async def stop(self, grace_s: float) -> None:
        """No new connections; what has been asked is answered, for at most so long."""
        assert self._server is not None
        self._server.close()
        await asyncio.sleep(_LAST_ACCEPTED_S)
        self.stopping = True
        for connection in [*self.connections]:
            connection.finish()
        until = time.monotonic() + grace_s
        while self.connections and (left := until - time.monotonic()) > 0:
            self._closed.clear()
            try:
                await asyncio.wait_for(self._closed.wait(), left)
            except TimeoutError:
                break
        for connection in [*self.connections]:
            connection.abort()

    def left(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self._closed.set()

    def date(self) -> bytes:
        now = int(time.time())
        if now != self._date[0]:
            self._date = (now, formatdate(now, usegmt=True).encode())
        return self._date[1]


class Connection(asyncio.BufferedProtocol):
    """One client's."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._client = ""
        self._read = memoryview(bytearray(_READ))
        self._parser = httptools.HttpRequestParser(self)
        self._coming: Incoming | None = None
        self._rest: memoryview | None = None  # of its body, that is read without the parser
        self._head_bytes = 0  # and those of what else is no body, since the last piece of one
        self._waiting: deque[Incoming] = deque()
        self._later: asyncio.Future[Any] | None = None
        self._busy = self._deaf = self._gone = self._paused = self._blocked = False
        self._unsent = 0  # bytes of answers, when it was last looked
        self._idle_until = 0.0
        self._idle: asyncio.TimerHandle | None = None

    # The transport's calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none
        peer = transport.get_extra_info("peername")
        self._client = str(peer[0]) if isinstance(peer, tuple) else ""
        self._server.connections.add(self)
        self._idle_until = self._loop.time() + self._server.idle_s
        self._idle = self._loop.call_at(self._idle_until, self._expire)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._gone = True
        if self._idle is not None:
            self._idle.cancel()
        self._drop()
        if self._later is not None:
            self._later.cancel()
        self._waiting.clear()
        del self._parser  # each holds the other
        self._server.left(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._read if self._rest is None else self._rest

    def buffer_updated(self, nbytes: int) -> None:
        coming = self._coming
        if self._deaf:
            return
        if self._rest is not None and coming is not None:
            self._rest = self._rest[nbytes:]
            self._came(coming, nbytes)
            if self._rest is not None and not self._rest:
                self._parser = httptools.HttpRequestParser(self)  # the other one waits for this body
                self._whole(coming)
        else:
            self._parse(self._read[:nbytes])
        if self._waiting:
            self._next()

    def pause_writing(self) -> None:
        self._blocked = True
        self._listen()

    def resume_writing(self) -> None:
        self._blocked = False
        self._next()

    # The parser's calls.

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._coming = None if self._deaf else Incoming()

    def on_url(self, url: bytes) -> None:
        if self._coming is not None:
            self._coming.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._coming is not None and not self._coming.ready:  # else it follows the body
            self._coming.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        coming = self._coming
        if coming is None:
            return
        coming.ready = True
        coming.method = self._parser.get_method().decode("ascii")
        keeps = self._parser.get_http_version() == "1.1" and self._parser.should_keep_alive()
        coming.keep_alive = keeps and not self._parser.should_upgrade()
        told = coming.headers.get(b"content-length")
        if told is not None:
            coming.length = int(told)  # llhttp has read it
            if coming.length > self._server.max_bytes:
                taken = self._server.max_bytes
                self._refuse(HttpError(413, "too_large", f"the request has {coming.length} bytes, {taken} are taken"))
                return
        expects = coming.headers.get(b"expect", b"").lower() == b"100-continue"
        if expects and not self._busy and not self._waiting:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        coming, size = self._coming, len(body)
        if coming is None:
            return
        self._head_bytes = 0
        if coming.length == size:  # all at once
            coming.body = body
        elif coming.length is None:
            coming.parts.append(body)
        else:
            if not coming.at:
                coming.body = np.empty(coming.length, np.uint8).data  # costs memory as it is filled
            coming.body[coming.at : coming.at + size] = body
        self._came(coming, size)

    def on_message_complete(self) -> None:
        if self._coming is not None:
            self._whole(self._coming)

    # What comes.

    def _parse(self, data: memoryview) -> None:
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._deaf = True  # it is answered as if it had not asked for another protocol, and is the last one
        except httptools.HttpParserError as error:
            if not (self._waiting and not self._waiting[-1].keep_alive) and not self._deaf:
                self._refuse(HttpError(400, "invalid_request", f"this is no HTTP/1.1: {error}"))
        coming = self._coming
        if coming is None or self._deaf:
            return
        if coming.length is None and self._head_bytes > _MOST_HEAD:
            self._refuse(HttpError(431, "invalid_request", f"the headers are longer than {_MOST_HEAD} bytes"))
        elif coming.ready:
            if coming.timer is None:
                coming.timer = self._loop.call_later(_BODY_S, self._late)
            if coming.length is not None:
                if not coming.at:
                    coming.body = np.empty(coming.length, np.uint8).data
                self._rest = coming.body[coming.at :]

    def _came(self, coming: Incoming, size: int) -> None:
        coming.at += size
        self._server.buffered += size
        if coming.at > self._server.max_bytes:
            self._refuse(HttpError(413, "too_large", f"more than {self._server.max_bytes} bytes are not taken"))
        elif self._server.buffered > _BUFFERED * self._server.max_bytes:
            self._refuse(HttpError(503, "queue_full", "too many large requests are on their way", 1.0))

    def _whole(self, coming: Incoming) -> None:
        self._drop()
        if coming.parts:
            coming.body = b"".join(coming.parts)
        self._waiting.append(coming)

    def _drop(self) -> None:
        """What comes is over."""
        coming, self._coming, self._rest = self._coming, None, None
        if coming is not None:
            self._server.buffered -= coming.at
            if coming.timer is not None:
                coming.timer.cancel()

    def _late(self) -> None:
        self._refuse(HttpError(408, "body_timeout", f"the request did not come within {_BODY_S:g} s"))
        self._next()

    def _refuse(self, error: HttpError) -> None:
        """Answer so when it is its turn, and look at nothing that follows: where the next request would begin is not
        known, or not worth the bytes."""
        coming = self._coming or Incoming()
        self._drop()
        coming.error, coming.keep_alive = error, False
        self._deaf = True
        self._waiting.append(coming)

    # What is answered.

    def _next(self) -> None:
        while self._waiting and not (self._busy or self._blocked or self._transport.is_closing()):
            incoming = self._waiting.popleft()
            self._busy = True
            try:
                found = self._asked(incoming)
            except HttpError as error:
                found = error.answer()
            except Exception:  # ours: it ends this request, not the server
                found = failed()
            if isinstance(found, Later):
                self._later = found.future
                found.future.add_done_callback(partial(self._done, incoming, found.told))
            else:
                self._send(incoming, found)
        self._listen()

    def _asked(self, incoming: Incoming) -> Answer | Later:
        if incoming.error is not None:
            raise incoming.error
        request = Request(incoming.method, _path(incoming.url), incoming.headers, self._client, incoming.body)
        incoming.body = b""
        return self._server.app(request)

    def _done(self, incoming: Incoming, told: Told, future: asyncio.Future[Any]) -> None:
        self._later = None
        if future.cancelled():
            self._transport.abort()
            return
        if self._gone:
            future.exception()  # nobody is there to be told
            return
        try:
            answer = told(future)
        except HttpError as error:
            answer = error.answer()
        except Exception:
            answer = failed()
        self._send(incoming, answer)
        self._next()

    def _send(self, incoming: Incoming, answer: Answer) -> None:
        status, headers, body = answer
        pieces: list[bytes | memoryview] = [body] if isinstance(body, bytes) else body
        size = sum(map(len, pieces))
        last = self._server.stopping and not self._waiting and not (self._coming and self._coming.ready)
        lines = [_status(status), b"date: ", self._server.date()]
        for name, value in headers:
            lines += (b"\r\n", name, b": ", value)
        if last or not incoming.keep_alive:
            lines.append(b"\r\nconnection: close")
        lines += (b"\r\ncontent-length: ", str(size).encode(), b"\r\n\r\n")
        if incoming.method == "HEAD":
            pieces, size = [], 0
        self._busy = False
        self._idle_until = self._loop.time() + self._server.idle_s
        if size <= _TOGETHER:
            self._transport.write(b"".join((*lines, *pieces)))
        else:
            self._transport.writelines((b"".join(lines), *pieces))
        if incoming.error is not None:
            self._loop.call_later(_LINGER_S, self._transport.close)
        elif last or not incoming.keep_alive:
            self._transport.close()

    def _listen(self) -> None:
        """Read no further while requests wait for their turn, or the client does not take its answers."""
        if self._gone or self._transport.is_closing():
            return
        pause = bool(self._waiting) or self._blocked
        if pause != self._paused:
            self._paused = pause
            if pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    # How it ends.

    def finish(self) -> None:
        """Close as soon as nothing is left to answer."""
        if not (self._busy or self._waiting or (self._coming and self._coming.ready)):
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def _expire(self) -> None:
        now, left = self._loop.time(), self._transport.get_write_buffer_size()
        if self._blocked:  # it takes its answer, or not
            works = not self._unsent or left < self._unsent
        else:
            works = self._busy or bool(self._coming and self._coming.ready)
        self._unsent = left
        if works:
            self._idle_until = now + self._server.idle_s
        if now < self._idle_until:
            self._idle = self._loop.call_at(self._idle_until, self._expire)
        elif self._blocked:
            self._transport.abort()
        else:
            self._transport.close()


@lru_cache(64)
def _path(url: bytes) -> str:
    try:
        path = httptools.parse_url(url).path or b"/"
    except httptools.HttpParserInvalidURLError:
        raise HttpError(400, "invalid_request", "the request's address is none") from None
    return unquote(path.decode("latin-1"))


@lru_cache(64)
def _status(status: int) -> bytes:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode()
