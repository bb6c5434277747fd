"""All SQL of the senders: whose turn it is, that nobody else takes it, and what came of it.

Where one transaction changes an endpoint and its deliveries, the endpoint comes first, everywhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, text, update
from sqlalchemy.orm import Session

from app.audit import SYSTEM, record
from app.db.base import utcnow
from app.db.orm import Job
from app.db.webhooks import WebhookDelivery, WebhookEndpoint

_WORDS = 300  # of a reason


@dataclass(frozen=True)
class Passed:
    """Whom not to look for at this moment: deliveries, tenants, and receivers."""

    deliveries: Collection[str] = ()
    tenants: Collection[str] = ()
    receivers: Collection[str] = ()


class DeliveryQueue:
    def __init__(self, session: Session) -> None:
        self.session = session

    def waiting_tenants(self, now: datetime, passed: Passed) -> list[str]:
        """Tenants with a delivery that is due; whoever has waited longest first."""
        query = select(WebhookDelivery.tenant_id).where(*_due(now, passed)).group_by(WebhookDelivery.tenant_id)
        return [*self.session.scalars(query.order_by(func.min(WebhookDelivery.due_at), WebhookDelivery.tenant_id))]

    def next_of(self, tenant_id: str, now: datetime, passed: Passed) -> WebhookDelivery | None:
        """The tenant's delivery that has waited longest."""
        query = select(WebhookDelivery).where(WebhookDelivery.tenant_id == tenant_id, *_due(now, passed))
        return self.session.scalar(query.order_by(WebhookDelivery.due_at, WebhookDelivery.id).limit(1))

    def endpoint(self, endpoint_id: str, *, lock: bool = False) -> WebhookEndpoint | None:
        """`lock`: it changes no more until the end of this transaction; deliveries to it may still be written."""
        query = select(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id)
        return self.session.scalar(query.with_for_update(key_share=True) if lock else query)

    def take(self, delivery: WebhookDelivery, until: datetime) -> bool:
        """Count one more attempt, and let nobody else begin one until then. False where somebody has."""
        changes = {
            "lease_expires_at": until,
            "last_attempt_at": utcnow(),
            "attempts": delivery.attempts + 1,
            "failures": delivery.failures + 1,  # until it is known to have been none
        }
        return self._change(delivery, delivery.attempts, changes)

    # What came of the attempt that `take` counted. False where it counts no more.

    def delivered(self, delivery: WebhookDelivery, status: int) -> bool:
        now = utcnow()
        changes = {"status": "delivered", "due_at": None, "failures": 0, "last_error": None, "delivered_at": now}
        return self._ended(delivery, {**changes, "last_status": status})

    def again(self, delivery: WebhookDelivery, due_at: datetime, status: int | None, reason: str) -> bool:
        return self._ended(delivery, {"due_at": due_at, "last_status": status, "last_error": reason[:_WORDS]})

    def given_up(self, delivery: WebhookDelivery, status: int | None, reason: str) -> bool:
        changes = {"status": "failed", "due_at": None, "last_status": status, "last_error": reason[:_WORDS]}
        return self._ended(delivery, changes)

    def drop(self, delivery: WebhookDelivery, reason: str) -> bool:
        """Give it up without an attempt."""
        changes = {"status": "failed", "due_at": None, "lease_expires_at": None, "last_error": reason[:_WORDS]}
        return self._change(delivery, delivery.attempts, changes)

    # Endpoints

    def answered(self, endpoint: WebhookEndpoint) -> None:
        endpoint.failures, endpoint.failing_since = 0, None

    def failed(self, endpoint: WebhookEndpoint) -> None:
        endpoint.failures, endpoint.failing_since = endpoint.failures + 1, endpoint.failing_since or utcnow()

    def disable(self, endpoint: WebhookEndpoint, reason: str | None) -> None:
        """Nothing more goes there, until it is enabled again. What waits is given up, and may be sent again then.
        Without a reason it was its tenant's wish."""
        endpoint.disabled_at, endpoint.disabled_reason = utcnow(), reason[:_WORDS] if reason else None
        self.session.flush()
        if reason:
            record(
                self.session, endpoint.tenant_id, SYSTEM, "webhook.disable", endpoint.id, {"reason": reason[:_WORDS]}
            )
        self.drop_all(endpoint.id, "The endpoint was disabled.")

    def drop_all(self, endpoint_id: str, reason: str) -> None:
        waiting = [WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.due_at.is_not(None)]
        changes = {"status": "failed", "due_at": None, "lease_expires_at": None, "last_error": reason}
        statement = update(WebhookDelivery).where(*waiting).values(**changes)
        self.session.execute(statement, execution_options={"synchronize_session": False})

    # Of the release before

    def left_behind(self, now: datetime, limit: int) -> Sequence[tuple[str, int]]:
        """Jobs that ended without a delivery, and how often their webhook was attempted. The first two conditions are
        those of the partial index."""
        query = select(Job.id, Job.webhook_attempts).where(
            Job.webhook_url.is_not(None),
            Job.webhook_done_at.is_(None),
            Job.finished_at.is_not(None),
            or_(Job.webhook_due_at.is_(None), Job.webhook_due_at <= now),
        )
        return [(row[0], row[1]) for row in self.session.execute(query.order_by(Job.finished_at).limit(limit))]

    def untold(self, limit: int) -> Sequence[str]:
        """Jobs whose end was told to no endpoint. The conditions are those of the partial index, to the letter."""
        query = select(Job.id).where(Job.finished_at.is_not(None), text("NOT told"))
        return [*self.session.scalars(query.order_by(Job.finished_at).limit(limit))]

    def _ended(self, delivery: WebhookDelivery, changes: dict[str, Any]) -> bool:
        return self._change(delivery, delivery.attempts + 1, {"lease_expires_at": None, **changes})

    def _change(self, delivery: WebhookDelivery, attempts: int, changes: dict[str, Any]) -> bool:
        same = [
            WebhookDelivery.id == delivery.id,
            WebhookDelivery.attempts == attempts,
            WebhookDelivery.status == "pending",
        ]
        statement = update(WebhookDelivery).where(*same).values(**changes).returning(WebhookDelivery.id)
        return self.session.scalar(statement.execution_options(synchronize_session=False)) is not None


def _due(now: datetime, passed: Passed) -> list[ColumnElement[bool]]:
    """By the partial index: what is compared is not null."""
    return [
        WebhookDelivery.due_at <= now,
        or_(WebhookDelivery.lease_expires_at.is_(None), WebhookDelivery.lease_expires_at <= now),
        WebhookDelivery.id.not_in(passed.deliveries),
        WebhookDelivery.tenant_id.not_in(passed.tenants),
        WebhookDelivery.receiver.not_in(passed.receivers),
    ]
