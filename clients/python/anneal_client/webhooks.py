"""Webhooks: whether a message comes from the service, and what it says."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence

from anneal_client.errors import AnnealError
from anneal_client.models import JobEnded

SIGNATURE = "X-Anneal-Signature"
DELIVERY = "X-Anneal-Delivery"


class SignatureMismatch(AnnealError):
    """The message was not signed with the secret: drop it, and answer 401."""


def verify_webhook(body: bytes, headers: Mapping[str, str], secret: str | Sequence[str]) -> JobEnded:
    """What a webhook's message says, once its signature (HMAC-SHA256 of the body as it came, in `X-Anneal-Signature`)
    is the one that `secret` makes; several secrets while they change over.

    The service sends a message until it is answered with 2xx, so one may come twice: `X-Anneal-Delivery` is the same
    then. Raises `SignatureMismatch`; `AnnealError` (`invalid_webhook`) where the body is not what the service sends.
    """
    found = next((value for name, value in headers.items() if name.lower() == SIGNATURE.lower()), "")
    secrets = [secret] if isinstance(secret, str) else list(secret)
    if not secrets or not all(secrets):
        raise ValueError("an empty secret verifies nothing")
    wanted = ["sha256=" + hmac.new(key.encode(), body, hashlib.sha256).hexdigest() for key in secrets]
    if not any(hmac.compare_digest(found.encode(), one.encode()) for one in wanted):
        what = "is not signed with the secret" if found else f"has no {SIGNATURE}"
        remedy = "Check that the receiver has the secret that the service was started with."
        raise SignatureMismatch("signature_mismatch", f"The message {what}.", remedy=remedy)
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("job"), dict):
        raise AnnealError("invalid_webhook", "The body is no message about a job.")
    return JobEnded(document)
