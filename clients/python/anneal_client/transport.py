"""Requests that survive a service that restarts: retries with backoff, for calls that may be sent twice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import httpx

from anneal_client.errors import AnnealError, ConnectionFailed, error_from

T = TypeVar("T")

RETRIED_STATUS = frozenset({429, 502, 503, 504})
MAX_PAUSE_S = 15.0


class Transient(Exception):
    """Internal: worth another attempt; `error` is what the caller gets when there is none."""

    def __init__(self, error: AnnealError, retry_after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after_s = retry_after_s


def pause(attempt: int, retry_after_s: float | None = None) -> None:
    """Sleep before attempt `attempt` + 1: exponential with full jitter, or what the service asked for (bounded)."""
    backoff = random.uniform(0.05, min(MAX_PAUSE_S, 0.2 * 2**attempt))
    time.sleep(min(MAX_PAUSE_S, max(backoff, retry_after_s or 0.0)))


def unreachable(error: httpx.TransportError) -> AnnealError:
    """The typed error of a request that got no answer."""
    what = str(error) or type(error).__name__
    return ConnectionFailed("connection_failed", what, remedy="Check the address and that the service is running.")


def raise_for(response: httpx.Response) -> None:
    """Raise the typed error of a response with status ≥ 400, as `Transient` where it may pass."""
    if response.status_code < 400:
        return
    response.read()
    error = error_from(response)
    if response.status_code in RETRIED_STATUS:
        after = response.headers.get("Retry-After", "")
        raise Transient(error, float(after) if after.isdigit() else None)
    raise error


class Transport:
    """HTTP connections to one service. Requests to other origins (presigned URLs) never carry the key."""

    def __init__(self, base_url: str, api_key: str | None, *, timeout_s: float, retries: int) -> None:
        try:
            self.base_url = httpx.URL(base_url.rstrip("/") + "/")
        except httpx.InvalidURL as error:
            raise AnnealError("invalid_url", f"{base_url!r}: {error}") from error
        if self.base_url.scheme not in ("http", "https") or not self.base_url.host:
            raise AnnealError("invalid_url", f"{base_url!r} is no http(s) address.", remedy="Say http://host:port.")
        self.retries = retries
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._own = httpx.Client(headers=headers, timeout=timeout_s)
        self._foreign = httpx.Client(timeout=timeout_s)

    def close(self) -> None:
        self._own.close()
        self._foreign.close()

    def resolve(self, url: str) -> httpx.URL:
        """An absolute URL, or a path of the service (`/v1/…`, below the base URL's own path)."""
        return httpx.URL(url) if "://" in url else self.base_url.join(url.lstrip("/"))

    def client_for(self, url: httpx.URL) -> httpx.Client:
        base = self.base_url
        same = (url.scheme, url.host, url.port) == (base.scheme, base.host, base.port)
        return self._own if same else self._foreign

    def attempt(self, call: Callable[[], T]) -> T:
        """What `call` returns, called again after connection errors and `Transient`; it must be safe to repeat."""
        for attempt in range(self.retries + 1):
            try:
                return call()
            except httpx.TransportError as error:
                failure = Transient(unreachable(error))
            except Transient as error:
                failure = error
            if attempt < self.retries:
                pause(attempt, failure.retry_after_s)
        raise failure.error

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        body: Callable[[], Any] | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        """One request that may be repeated. `body` makes a fresh body (bytes or an iterator of them) per attempt."""
        url = self.resolve(path)
        client = self.client_for(url)
        options: dict[str, Any] = {} if timeout_s is None else {"timeout": timeout_s}

        def call() -> httpx.Response:
            content = body() if body is not None else None
            response = client.request(
                method, url, params=params, headers=headers, json=json, content=content, **options
            )
            raise_for(response)
            return response

        return self.attempt(call)
