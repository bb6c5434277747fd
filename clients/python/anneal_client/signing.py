"""Signatures of Standard Webhooks 1.0.0 (https://www.standardwebhooks.com): `v1,` and the Base64 of HMAC-SHA256 over
`ID.TIMESTAMP.BODY`. The one home of what the service and MLflow both sign by."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time


def signature(key: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    content = f"{message_id}.{timestamp}.".encode(errors="surrogatepass") + body
    return "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()


def is_recent(timestamp: str, tolerance_s: float, now: float | None = None) -> bool | None:
    """Whether a Unix time in seconds is no further away than that from `now` (None: the clock's); None where it is no
    such time."""
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) < 16):
        return None
    return abs((time.time() if now is None else now) - int(timestamp)) <= tolerance_s
