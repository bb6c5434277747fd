"""Webhooks: whether a message comes from the service, and what it says."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from typing import Any

from anneal_client.errors import AnnealError
from anneal_client.models import JobEnded
from anneal_client.signing import is_recent, signature

MESSAGE_ID, TIMESTAMP, SIGNATURES = "webhook-id", "webhook-timestamp", "webhook-signature"
SIGNATURE = "X-Anneal-Signature"
DELIVERY = "X-Anneal-Delivery"
TOLERANCE_S = 300.0
_PREFIX = "whsec_"


class SignatureMismatch(AnnealError):
    """The message was not signed with the secret, or too long ago: drop it, and answer 401."""


def verify_webhook(
    body: bytes,
    headers: Mapping[str, str],
    secret: str | Sequence[str],
    *,
    tolerance_s: float = TOLERANCE_S,
    now: float | None = None,
) -> JobEnded:
    """What a webhook's message says, once one of its signatures in `webhook-signature` (Standard Webhooks: HMAC-SHA256
    of id, time and body as it came) is one that `secret` makes; several secrets while they change over. A message that
    was signed further than `tolerance_s` from `now` (Unix time in s; None: the clock's) is refused: what somebody has
    recorded cannot be sent again later.

    `secret`: that of the endpoint, `whsec_…`; for a URL that the job named, the service's `WEBHOOK_SECRET`. With the
    latter, messages of services before there were these headers are taken too, by `X-Anneal-Signature`.

    The service sends a message until it is answered with 2xx, so one may come twice: `webhook-id` is the same then.
    Raises `SignatureMismatch`; `AnnealError` (`invalid_webhook`) where the body is not what the service sends.
    """
    secrets = [secret] if isinstance(secret, str) else list(secret)
    if not secrets or not all(secrets):
        raise ValueError("an empty secret verifies nothing")
    given = {name.lower(): value for name, value in headers.items()}
    if SIGNATURES in given:
        _check(body, given, secrets, tolerance_s, now)
        return JobEnded(_message(body))
    _check_as_before(body, given, [one for one in secrets if not one.startswith(_PREFIX)])
    document = _message(body)
    if document.get("timestamp") is not None:
        # Who writes this signs with the time, too: somebody has taken these headers away.
        raise _mismatch(f"has no {SIGNATURES}")
    return JobEnded(document)


def _check(
    body: bytes, given: Mapping[str, str], secrets: Sequence[str], tolerance_s: float, now: float | None
) -> None:
    message_id, timestamp = given.get(MESSAGE_ID, ""), given.get(TIMESTAMP, "")
    found = given[SIGNATURES].split(" ")
    wanted = [signature(_key(one), message_id, timestamp, body) for one in secrets]
    # First of all the signature: what is not the service's is not looked into. All are compared, in constant time each.
    same = [
        hmac.compare_digest(one.encode(errors="surrogatepass"), other.encode()) for one in found for other in wanted
    ]
    if not message_id or not any(same):
        raise _mismatch("is not signed with the secret")
    if not is_recent(timestamp, tolerance_s, now):
        raise _mismatch(f"was signed more than {tolerance_s:g} s from now, by this machine's clock")


def _check_as_before(body: bytes, given: Mapping[str, str], secrets: Sequence[str]) -> None:
    found = given.get(SIGNATURE.lower(), "")
    wanted = ["sha256=" + hmac.new(key.encode(), body, hashlib.sha256).hexdigest() for key in secrets]
    if not any(hmac.compare_digest(found.encode(), one.encode()) for one in wanted):
        raise _mismatch("is not signed with the secret" if found else f"has neither {SIGNATURES} nor {SIGNATURE}")


def _mismatch(what: str) -> SignatureMismatch:
    remedy = "Check that the receiver has the endpoint's secret (or the service's WEBHOOK_SECRET), and the right time."
    return SignatureMismatch("signature_mismatch", f"The message {what}.", remedy=remedy)


def _key(secret: str) -> bytes:
    if secret.startswith(_PREFIX):
        try:
            return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
        except binascii.Error:
            pass
    return secret.encode()


def _message(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("job"), dict):
        raise AnnealError("invalid_webhook", "The body is no message about a job.")
    return document
