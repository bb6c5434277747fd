"""Signatures of webhooks: those of Standard Webhooks 1.0.0 (https://www.standardwebhooks.com), HMAC-SHA256 over
`ID.TIMESTAMP.BODY`. Written out: it is one line, and the reference library wants the body as text."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta

from app.db.webhooks import WebhookEndpoint

PREFIX = "whsec_"
_BYTES = 32
_MOST_PREVIOUS = 4  # rotated again meanwhile, by somebody who lost an answer, say


def new_secret() -> str:
    """`whsec_` and the Base64 of 256 random bits."""
    return PREFIX + base64.b64encode(secrets.token_bytes(_BYTES)).decode()


def key_of(secret: str) -> bytes:
    """What a secret stands for: the bytes behind `whsec_`; of one that an operator made up, its own."""
    if secret.startswith(PREFIX):
        try:
            return base64.b64decode(secret.removeprefix(PREFIX), validate=True)
        except binascii.Error:
            pass
    return secret.encode()


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    content = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()


def secrets_of(endpoint: WebhookEndpoint, now: datetime) -> list[str]:
    """That sign now, the newest first."""
    return [endpoint.secret, *(one["secret"] for one in endpoint.previous if _until(one) > now)]


def previous_until(endpoint: WebhookEndpoint, now: datetime) -> datetime | None:
    """How long a secret of before signs as well; None where none does."""
    return max((until for one in endpoint.previous if (until := _until(one)) > now), default=None)


def rotate(endpoint: WebhookEndpoint, now: datetime, overlap_s: int) -> None:
    """A new secret; that of before, and what signed beside it, do so still for as long as `overlap_s`."""
    until = (now + timedelta(seconds=overlap_s)).isoformat()
    kept = [{"secret": endpoint.secret, "until": until}, *(one for one in endpoint.previous if _until(one) > now)]
    endpoint.previous = kept[:_MOST_PREVIOUS] if overlap_s else []
    endpoint.secret = new_secret()


def _until(one: dict[str, str]) -> datetime:
    return datetime.fromisoformat(one["until"])


def signed(message_id: str, timestamp: int, body: bytes, keys: Sequence[str]) -> dict[str, str]:
    """The headers of one attempt at `timestamp` (Unix time in s): the message's id, which is the same for all of them,
    and a signature by each of the secrets."""
    headers = {"webhook-id": message_id, "webhook-timestamp": str(timestamp)}
    if keys:
        headers["webhook-signature"] = " ".join(signature(key_of(key), message_id, timestamp, body) for key in keys)
    return headers


def signed_as_before(secret: str, body: bytes) -> dict[str, str]:
    """What was sent before there were these: HMAC-SHA256 over the body alone."""
    return {"X-Anneal-Signature": "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}
