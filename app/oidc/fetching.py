"""What is asked of the identity provider over HTTP, by the standard library: JSON alone, of a bounded size, within a
bounded time, without following redirects. Calls block."""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote_plus, urlencode, urlsplit

from app.network import is_loopback

LONGEST_S = 5.0
_MOST_BYTES = 1 << 20
_PIECE = 64 << 10


class ProviderAway(Exception):
    """It cannot be reached, or does not answer as a provider does. The message says how."""


class ProviderRefused(Exception):
    """It answered that it will not, with this `error` code (RFC 6749, 5.2)."""

    def __init__(self, error: str) -> None:
        super().__init__(error)
        self.error = error


def is_endpoint(url: object, *, plain: bool) -> bool:
    """Whether this may be asked: HTTPS, or on this machine `plain` HTTP, too."""
    if not isinstance(url, str) or len(url) > 2000 or any(ord(c) <= 32 or ord(c) == 127 for c in url):
        return False
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    if not host or parts.username is not None:
        return False
    return parts.scheme == "https" or (plain and parts.scheme == "http" and is_loopback(host))


def fetched(url: str, *, bearer: str | None = None) -> dict[str, Any]:
    """The JSON object at `url`. Raises `ProviderAway`, `ProviderRefused`."""
    headers = {"Accept": "application/json"}
    if bearer is not None:
        headers["Authorization"] = f"Bearer {bearer}"
    return _asked(urllib.request.Request(url, headers=headers))  # noqa: S310 (`is_endpoint` has been asked)


def posted(url: str, form: Mapping[str, str], *, client: tuple[str, str] | None = None) -> dict[str, Any]:
    """What a form is answered with; `client`: id and secret, sent as RFC 6749, 2.3.1 has it."""
    headers = {"Accept": "application/json", "Content-Type": "application/x-www-form-urlencoded"}
    if client is not None:
        pair = ":".join(quote_plus(part) for part in client)
        headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    return _asked(urllib.request.Request(url, urlencode(form).encode(), headers))  # noqa: S310 (likewise)


class _Unredirected(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object, **__: object) -> None:
        """A provider's addresses stand in its discovery document; a code or a secret is sent to no other."""


def _asked(request: urllib.request.Request) -> dict[str, Any]:
    until = time.monotonic() + LONGEST_S
    try:
        with urllib.request.build_opener(_Unredirected).open(request, timeout=LONGEST_S) as answer:
            found = json.loads(_body(answer, until))
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error, until) from error
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise ProviderAway(f"{urlsplit(request.full_url).netloc}: {_told(error)}") from error
    if not isinstance(found, dict):
        raise ProviderAway(f"{urlsplit(request.full_url).netloc} answers no JSON object")
    return found


def _body(answer: Any, until: float) -> bytes:
    body = b""
    while piece := answer.read1(_PIECE):
        body += piece
        if len(body) > _MOST_BYTES:
            raise ValueError(f"it answers more than {_MOST_BYTES} bytes")
        if time.monotonic() > until:
            raise TimeoutError(f"it takes longer than {LONGEST_S:g} s")
    return body


def _refusal(error: urllib.error.HTTPError, until: float) -> ProviderAway | ProviderRefused:
    """By its body, where that is one of OAuth's errors: the status alone does not tell it from a wrong address."""
    try:
        code = json.loads(_body(error, until))["error"] if error.code < 500 else None
    except (OSError, http.client.HTTPException, ValueError, RecursionError, KeyError, TypeError):
        code = None
    if isinstance(code, str):
        return ProviderRefused(plain_code(code))
    return ProviderAway(f"{urlsplit(error.url).netloc} answers {error.code}")


def plain_code(code: str) -> str:
    """An `error` as the provider, or whoever forged its answer, gave it; fit to be shown."""
    return code if 0 < len(code) <= 60 and code.replace("_", "").isalnum() and code.isascii() else "unknown"


def _told(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return f"{type(reason).__name__}: {reason}"[:200] if isinstance(reason, Exception) else str(reason)[:200]
