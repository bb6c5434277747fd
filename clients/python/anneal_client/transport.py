"""Requests that survive a service that restarts: retries with backoff, for calls that may be sent twice."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

import httpx

from anneal_client.errors import AnnealError, ConnectionFailed, error_from
from anneal_client.io import Io, Opened

T = TypeVar("T")

RETRIED_STATUS = frozenset({429, 502, 503, 504})
MAX_PAUSE_S = 15.0


class Transient(Exception):
    """Internal: worth another attempt; `error` is what the caller gets when there is none."""

    def __init__(self, error: AnnealError, retry_after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after_s = retry_after_s


def pause_s(attempt: int, retry_after_s: float | None = None) -> float:
    """How long to wait before attempt `attempt` + 1: exponential with full jitter, or what the service asked for
    (bounded)."""
    backoff = random.uniform(0.05, min(MAX_PAUSE_S, 0.2 * 2**attempt))
    return min(MAX_PAUSE_S, max(backoff, retry_after_s or 0.0))


def unreachable(error: httpx.TransportError) -> AnnealError:
    """The typed error of a request that got no answer."""
    what = str(error) or type(error).__name__
    return ConnectionFailed("connection_failed", what, remedy="Check the address and that the service is running.")


def raise_for(response: httpx.Response) -> None:
    """Raise the typed error of a read response with status ≥ 400, as `Transient` where it may pass."""
    if response.status_code < 400:
        return
    error = error_from(response)
    if response.status_code in RETRIED_STATUS:
        after = response.headers.get("Retry-After", "")
        raise Transient(error, float(after) if after.isdigit() else None)
    raise error


async def raise_for_opened(opened: Opened) -> None:
    """`raise_for` of an answer whose body was not read."""
    if opened.response.status_code >= 400:
        await opened.read()
        raise_for(opened.response)


def parsed_base(base_url: str) -> httpx.URL:
    """Raises `AnnealError` (`invalid_url`)."""
    try:
        url = httpx.URL(base_url.rstrip("/") + "/")
    except httpx.InvalidURL as error:
        raise AnnealError("invalid_url", f"{base_url!r}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise AnnealError("invalid_url", f"{base_url!r} is no http(s) address.", remedy="Say http://host:port.")
    return url


class Transport:
    """HTTP connections to one service. Requests to other origins (presigned URLs) never carry the key."""

    def __init__(self, base_url: httpx.URL, io: Io, *, retries: int) -> None:
        self.base_url = base_url
        self.io = io
        self.retries = retries

    def resolve(self, url: str) -> httpx.URL:
        """An absolute URL, or a path of the service (`/v1/…`, below the base URL's own path)."""
        return httpx.URL(url) if "://" in url else self.base_url.join(url.lstrip("/"))

    def is_own(self, url: httpx.URL) -> bool:
        base = self.base_url
        return (url.scheme, url.host, url.port) == (base.scheme, base.host, base.port)

    async def attempt(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` returns, called again after connection errors and `Transient`; it must be safe to repeat."""
        for attempt in range(self.retries + 1):
            try:
                return await call()
            except httpx.TransportError as error:
                failure = Transient(unreachable(error))
            except Transient as error:
                failure = error
            if attempt < self.retries:
                await self.io.sleep(pause_s(attempt, failure.retry_after_s))
        raise failure.error

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        body: Callable[[], Iterator[bytes]] | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        """One request that may be repeated. `body` makes a fresh body per attempt."""
        url = self.resolve(path)
        options: dict[str, Any] = {} if timeout_s is None else {"timeout": timeout_s}

        async def call() -> httpx.Response:
            content = body() if body is not None else None
            response = await self.io.request(
                self.is_own(url), method, url, params=params, headers=headers, json=json, content=content, **options
            )
            raise_for(response)
            return response

        return await self.attempt(call)
