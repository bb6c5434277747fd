"""What the HTTP server of a bundle is asked and answers."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

if __package__:
    from .serving_settings import InvalidRequest, Rejected, ServingError, TimedOut
else:  # beside this file, in a bundle
    from serving_settings import (  # type: ignore[import-not-found,no-redef]
        InvalidRequest,
        Rejected,
        ServingError,
        TimedOut,
    )

Headers = list[tuple[bytes, bytes]]
Answer = tuple[int, Headers, bytes | list[bytes | memoryview]]  # a body, or its pieces, which are sent as they lie
Told = Callable[[asyncio.Future[Any]], Answer]


class HttpError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.retry_after_s = status, code, detail, retry_after_s

    def answer(self) -> Answer:
        headers = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()))
        return self.status, headers, json.dumps({"error": self.detail, "code": self.code}).encode()


def http_error(error: ServingError) -> HttpError:
    """The status of an error of the batcher."""
    if isinstance(error, Rejected):
        return HttpError(503, error.code, error.detail, error.retry_after_s)
    if isinstance(error, TimedOut):
        return HttpError(504, error.code, error.detail)
    if isinstance(error, InvalidRequest):
        return HttpError(413 if error.code == "too_large" else 400, error.code, error.detail)
    return HttpError(500, error.code, error.detail)


@dataclass(slots=True)
class Request:
    """`headers`: by lower-case name. `client`: its address. `body`: bytes, or a memoryview of them."""

    method: str
    path: str
    headers: dict[bytes, bytes]
    client: str
    body: Any = b""


class Incoming:
    """A request that comes. `keep_alive`: whether another may follow; `error`: why it is refused."""

    __slots__ = ("at", "body", "error", "headers", "keep_alive", "length", "method", "parts", "ready", "timer", "url")

    def __init__(self) -> None:
        self.method, self.url = "GET", b""
        self.headers: dict[bytes, bytes] = {}
        self.length: int | None = None  # of the body, where the head tells it
        self.body: Any = b""
        self.parts: list[bytes] = []  # of a body whose length was not told
        self.at = 0  # bytes that came
        self.ready = False  # the head is whole
        self.keep_alive = False
        self.error: HttpError | None = None
        self.timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class Later:
    """An answer to come: `told` makes it of the future that is done, or raises `HttpError`. Who hangs up cancels the
    future."""

    future: asyncio.Future[Any]
    told: Told


App = Callable[[Request], Answer | Later]  # may raise HttpError


def failed() -> Answer:
    """To an exception that is nobody's request's: it is written down, and ends this one only."""
    traceback.print_exc(file=sys.stderr)
    return HttpError(500, "internal", "the server failed").answer()
