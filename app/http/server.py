"""The HTTP server: uvicorn, with the limits that it leaves to a proxy in front.

Its protocol class is the extension point that uvicorn documents (`--http`). What it adds are bounds on what a client
may send without being known: bytes and number of headers, time for headers, time between the bytes of a body, time that
an answer may go unread, connections per address. A refusal is a problem document like any other.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.errors import AppError
from app.http.problem import MEDIA_TYPE, problem_body
from app.network import Network, address_of, is_in
from app.settings import LimitSettings, Settings

log = structlog.get_logger("anneal.http")

_UNREAD_BYTES = 64 << 20  # of a body that may still come once it has been answered: a client reads late
_LEAST_BODY_RATE = 100  # bytes per second that have to come of a body


class _TooManyHeaders(Exception):
    """Raised inside of the parser's callback, which ends the parsing."""


def make_config(app: FastAPI, settings: Settings, **options: Any) -> uvicorn.Config:
    """uvicorn's configuration for the service. No access log (the service writes its own), no WebSockets (it has none).
    Whose address a request has is what a trusted proxy says of it, else the connection's: what others send in forwarded
    headers is not looked at."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=limited_protocol(settings.limits, settings.trusted_proxies),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=[str(network) for network in settings.trusted_proxies],
        **{"timeout_graceful_shutdown": settings.shutdown_s, **options},
    )


def raise_descriptor_limit() -> None:
    """As many open files as the system allows: each connection is one, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limited_protocol(limits: LimitSettings, proxies: Sequence[Network] = ()) -> type[asyncio.Protocol]:
    """A protocol class with these limits and a count of connections of its own: one server, one class. Connections from
    `proxies` are everybody's: they are counted in all, and not as one address's."""
    own = {"limits": limits, "proxies": tuple(proxies), "addresses": Counter()}
    return type("LimitedHttpProtocol", (LimitedProtocol,), own)


class LimitedProtocol(HttpToolsProtocol):
    limits: LimitSettings
    proxies: tuple[Network, ...]
    addresses: Counter[str]
    ending = False  # of the process: each answer is the last one of its connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its base does
        super().connection_made(transport)
        self._in_head = self._in_body = False
        self._fields = 0  # headers of the request that is being read, and their bytes
        self._field_bytes = 0
        self._raw_bytes = 0  # read since the parser has last made something of them
        self._body_bytes = self._unread_bytes = 0
        self._timer: asyncio.TimerHandle | None = None  # for a head, or for a body
        self._write_timer: asyncio.TimerHandle | None = None
        self._address = address_of(self.client[0]) if self.client and not is_in(self.client[0], self.proxies) else ""
        self.addresses[self._address] += 1
        most = self.limits.connections_per_address
        if (most and self._address and self.addresses[self._address] > most) or (
            len(self.connections) > self.limits.connections
        ):
            detail = "More connections are open, in all or from this address, than the service takes."
            self._refuse(AppError("too_many_connections", "Too many connections", 429, detail, retryable=True))
            return
        self._set_timer(self.limits.header_s, self._no_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        self.addresses[self._address] -= 1
        if self.addresses[self._address] <= 0:
            del self.addresses[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        # The parser shows a header when it is whole, and nothing of a chunk's extension or a trailer: until then only
        # the bytes can be counted. It copies all of a header with each piece of it.
        if self._in_head or self._in_body:
            self._raw_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._raw_bytes > self.limits.header_bytes:
            self._refuse(_too_many_headers(self.limits))
        elif self._timer is None:
            if self._in_body:
                self._set_timer(self.limits.body_s, self._check_body, 0, self.flow.read_paused)
            elif self._in_head or self.cycle is None or self.cycle.response_complete:
                self._set_timer(self.limits.header_s, self._no_head)

    # Heads

    def on_message_begin(self) -> None:
        self._in_head = True
        self._fields = self._field_bytes = self._raw_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._count(len(name) + len(value))
        if self._in_head:  # else a trailer, which nobody asks for
            super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > self.limits.header_bytes or self._fields > self.limits.header_count:
            raise _TooManyHeaders

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.ending:
            self.cycle.keep_alive = False
        self._in_head, self._in_body = False, True
        self._raw_bytes = self._body_bytes = self._unread_bytes = 0
        self._set_timer(None)

    def send_400_response(self, msg: str) -> None:
        if self._field_bytes > self.limits.header_bytes or self._fields > self.limits.header_count:
            self._refuse(_too_many_headers(self.limits))
        else:
            self._refuse(AppError("bad_request", "The request cannot be read", 400, msg))

    def _no_head(self) -> None:
        self._timer = None
        if self.flow.read_paused:  # a request waits in the pipeline: it is this service that does not read on
            self._set_timer(self.limits.header_s, self._no_head)
            return
        detail = f"The headers of a request took longer than {self.limits.header_s:g} s."
        self._refuse(AppError("request_timeout", "Too slow", 408, detail, retryable=True))

    # Bodies

    def on_body(self, body: bytes) -> None:
        self._raw_bytes = 0
        self._body_bytes += len(body)
        if self.cycle.response_complete:
            self._unread_bytes += len(body)
            if self._unread_bytes > _UNREAD_BYTES:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._raw_bytes = 0
        self._set_timer(None)
        super().on_message_complete()

    def _check_body(self, before: int, paused_before: bool) -> None:
        """Once in a while: a body that does not come on, although it is being read, has its connection cut."""
        paused = self.flow.read_paused
        # Not read at the one end of the time: then it is not the client that is slow.
        read = not paused and not paused_before and not self.cycle.waiting_for_100_continue
        if read and self._body_bytes - before < self.limits.body_s * _LEAST_BODY_RATE:
            detail = f"Too little of the body came in {self.limits.body_s:g} s."
            self._refuse(AppError("request_timeout", "Too slow", 408, detail, retryable=True))
            return
        self._set_timer(self.limits.body_s, self._check_body, self._body_bytes, paused)

    # Answers

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_s, self._cut)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _cut(self) -> None:
        log.info("connection_cut", reason="the answer is not being read")
        self.transport.abort()

    # All of them

    def _set_timer(self, seconds: float | None, callback: Callable[..., None] | None = None, *arguments: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, callback, *arguments) if seconds and callback else None

    def _stop_timers(self) -> None:
        self._set_timer(None)
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _refuse(self, error: AppError) -> None:
        """Answer with a problem document, unless an answer is on its way, and close."""
        self._stop_timers()
        log.info("connection_refused", code=error.code, status=error.status)
        cycle = self.cycle
        answered = cycle is not None and (cycle.response_started if self._in_body else not cycle.response_complete)
        if not answered:
            if cycle is not None:
                cycle.disconnected = True  # what the application answers now is no longer wanted
                cycle.message_event.set()
            body = problem_body(error, "", None)
            head = [
                b"HTTP/1.1 %d %s" % (error.status, HTTPStatus(error.status).phrase.encode()),
                b"content-type: " + MEDIA_TYPE.encode(),
                b"content-length: %d" % len(body),
                b"cache-control: no-store",
                b"connection: close",
            ]
            self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + body)
        self.transport.close()


def _too_many_headers(limits: LimitSettings) -> AppError:
    detail = f"The headers take more than {limits.header_bytes} bytes, or are more than {limits.header_count}."
    return AppError("headers_too_large", "Headers too large", 431, detail)
