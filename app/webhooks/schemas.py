"""Webhook endpoints and deliveries as clients see them."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints

from app.db.base import utcnow
from app.db.webhooks import WebhookDelivery, WebhookEndpoint
from app.domain.spec import WebhookUrl
from app.domain.strict import Strict
from app.names import forbidden_character
from app.schemas import ItemPage, Resource
from app.webhooks.signing import previous_until

Event = Literal["job.succeeded", "job.failed", "job.cancelled"]
DeliveryStatus = Literal["pending", "delivered", "failed"]
_LONGEST_OVERLAP_S = 7 * 24 * 3600


def _printable(value: str) -> str:
    if character := forbidden_character(value):
        raise ValueError(f"must not hold the control character {character}")
    return value


Description = Annotated[str, StringConstraints(max_length=200), AfterValidator(_printable)]
Events = Annotated[list[Event], Field(min_length=1, max_length=20)]


class WebhookEndpointIn(Strict):
    url: WebhookUrl
    """Told by a POST, until it answers 2xx."""
    description: Description = ""
    """What it is for."""
    events: Events | None = None
    """What it is told of; null: of everything, also of what there is to come."""


class WebhookEndpointChange(Strict):
    """What is to be changed; the rest stays as it is."""

    url: WebhookUrl | None = None
    """What waits goes there, too."""
    description: Description | None = None
    """What it is for."""
    events: Events | None = None
    """What it is told of; null: of everything."""
    enabled: bool | None = None
    """false: nothing more is sent, and what happens meanwhile is not told."""


class SecretRotation(Strict):
    overlap_seconds: int = Field(default=24 * 3600, ge=0, le=_LONGEST_OVERLAP_S)
    """For so long the secret of before signs beside the new one; 0 where others know it."""


class WebhookEndpointOut(Resource):
    """Where the service tells of events."""

    url: str
    description: str
    events: list[str] | None = Field(description="What it is told of; null: of everything")
    enabled: bool
    disabled_at: datetime | None
    disabled_reason: str | None = Field(description="Why the service disabled it; null where you did")
    failing_since: datetime | None = Field(description="No attempt since then was answered with 2xx")
    previous_secret_until: datetime | None = Field(description="Until then the secret of before signs, too")

    @classmethod
    def values_of(cls, row: WebhookEndpoint) -> dict[str, Any]:
        path = f"/v1/webhooks/{row.id}"
        return {
            "id": row.id,
            "created_at": row.created_at,
            "links": {
                "self": path,
                "deliveries": f"{path}/deliveries",
                "test": f"{path}/test",
                "rotate": f"{path}/rotate",
            },
            "url": row.url,
            "description": row.description,
            "events": row.events,
            "enabled": row.disabled_at is None,
            "disabled_at": row.disabled_at,
            "disabled_reason": row.disabled_reason,
            "failing_since": row.failing_since,
            "previous_secret_until": previous_until(row, utcnow()),
        }

    @classmethod
    def of(cls, row: WebhookEndpoint) -> WebhookEndpointOut:
        return cls(**cls.values_of(row))


class WebhookSecretOut(WebhookEndpointOut):
    """An endpoint with its secret, which is shown this once."""

    secret: str | None = Field(description="`whsec_…`; null where the request was repeated: rotate it, if you lost it")

    @classmethod
    def with_secret(cls, row: WebhookEndpoint, *, shown: bool = True) -> WebhookSecretOut:
        return cls(**cls.values_of(row), secret=row.secret if shown else None)


class WebhookEndpointPage(ItemPage[WebhookEndpointOut]):
    """Webhook endpoints."""


class WebhookDeliveryOut(Resource):
    """A message to a receiver. Its id is the message's, `webhook-id`, in every attempt."""

    webhook_id: str | None = Field(description="The endpoint; null where the job named the URL")
    job_id: str | None
    url: str
    event: str
    status: DeliveryStatus
    attempts: int
    next_attempt_at: datetime | None
    last_attempt_at: datetime | None
    last_status: int | None = Field(description="Of the last attempt's answer; null where there was none")
    last_error: str | None
    delivered_at: datetime | None

    @classmethod
    def values_of(cls, row: WebhookDelivery) -> dict[str, Any]:
        path = f"/v1/deliveries/{row.id}"
        links = {"self": path, "redeliver": f"{path}/redeliver"}
        if row.endpoint_id is not None:
            links["webhook"] = f"/v1/webhooks/{row.endpoint_id}"
        if row.job_id is not None:
            links["job"] = f"/v1/jobs/{row.job_id}"
        return {
            "id": row.id,
            "created_at": row.created_at,
            "links": links,
            "webhook_id": row.endpoint_id,
            "job_id": row.job_id,
            "url": row.url,
            "event": row.event,
            "status": row.status,
            "attempts": row.attempts,
            "next_attempt_at": row.due_at,
            "last_attempt_at": row.last_attempt_at,
            "last_status": row.last_status,
            "last_error": row.last_error,
            "delivered_at": row.delivered_at,
        }

    @classmethod
    def of(cls, row: WebhookDelivery) -> WebhookDeliveryOut:
        return cls(**cls.values_of(row))


class WebhookMessageOut(WebhookDeliveryOut):
    """A delivery with what it says."""

    payload: dict[str, Any] = Field(description="The body; what is signed are its bytes as they were sent")

    @classmethod
    def of(cls, row: WebhookDelivery) -> WebhookMessageOut:
        return cls(**cls.values_of(row), payload=json.loads(row.payload))


class WebhookDeliveryPage(ItemPage[WebhookDeliveryOut]):
    """Deliveries."""
