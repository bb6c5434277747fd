"""Whether a webhook comes from MLflow: what it signs, and how (MLflow's documentation, "Webhooks": X-MLflow-Signature
is `v1,` and the Base64 of HMAC-SHA256 over `DELIVERY_ID.TIMESTAMP.BODY`, as Standard Webhooks has it)."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anneal_client.signing import is_recent, signature

TOLERANCE_S = 300.0


class NotVerified(Exception):
    """The request is not to be trusted; the message says why, and not what would have been right."""


class NotUnderstood(Exception):
    """It is MLflow's, but not an event as MLflow sends it."""


@dataclass(frozen=True)
class Delivery:
    """`id`: of this attempt's event, the same when MLflow sends it again. `event`: e.g. "model_version.created"."""

    id: str
    event: str
    data: Mapping[str, Any]


def verified(
    secret: str, headers: Mapping[str, str], body: bytes, *, now: float | None = None, tolerance_s: float = TOLERANCE_S
) -> Delivery:
    """The event that `body` tells. `secret`: that of the webhook. `headers`: of the request, in any case of letters.
    `now`: Unix time in s; timestamps further away than `tolerance_s` are refused: nothing can be sent again later.

    Raises NotVerified, NotUnderstood."""
    if not secret:
        raise ValueError("an empty secret verifies nothing")
    given = {name.lower(): value for name, value in headers.items()}
    try:
        delivery_id, timestamp, found = (given[f"x-mlflow-{n}"] for n in ("delivery-id", "timestamp", "signature"))
    except KeyError as missing:
        raise NotVerified(f"the header {missing.args[0]} is missing") from None
    # First of all the signature: what is not MLflow's is not looked into.
    if not hmac.compare_digest(signature(secret.encode(), delivery_id, timestamp, body).encode(), found.encode()):
        raise NotVerified("the signature is not that of this webhook's secret")
    recent = is_recent(timestamp, tolerance_s, now)
    if not recent:
        raise NotVerified("the timestamp is " + ("not a Unix time" if recent is None else "too far from now"))
    try:
        told = json.loads(body)
        event, data = f"{told['entity']}.{told['action']}", told["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise NotUnderstood(f"the body is not an event of MLflow: {error}") from None
    if not isinstance(data, dict):
        raise NotUnderstood("the body's data is not an object")
    return Delivery(delivery_id, event, data)
