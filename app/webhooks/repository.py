"""All SQL on a tenant's webhook endpoints and deliveries, as its clients use them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session, defer

from app.db.webhooks import WebhookDelivery, WebhookEndpoint
from app.tenants.repository import lock_tenant
from app.webhooks.outbox import receiver_of

TEST = "webhook.test"


class WebhookRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    def add(self, endpoint: WebhookEndpoint) -> None:
        self.session.add(endpoint)
        self.session.flush()

    def count(self, tenant_id: str) -> int:
        """Of the tenant's endpoints. Nobody adds one until the end of this transaction."""
        lock_tenant(self.session, tenant_id)
        mine = [WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None)]
        return self.session.scalar(select(func.count()).select_from(WebhookEndpoint).where(*mine)) or 0

    def get(self, tenant_id: str, endpoint_id: str, *, lock: bool = False) -> WebhookEndpoint | None:
        query = select(WebhookEndpoint).where(
            WebhookEndpoint.id == endpoint_id,
            WebhookEndpoint.tenant_id == tenant_id,
            WebhookEndpoint.deleted_at.is_(None),
        )
        return self.session.scalar(query.with_for_update(key_share=True) if lock else query)

    def page(self, tenant_id: str, *, limit: int, before: str | None) -> list[WebhookEndpoint]:
        query = select(WebhookEndpoint).where(
            WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None)
        )
        if before is not None:
            query = query.where(WebhookEndpoint.id < before)
        return [*self.session.scalars(query.order_by(WebhookEndpoint.id.desc()).limit(limit))]

    def move(self, endpoint_id: str, url: str) -> None:
        """What waits for the endpoint goes to another URL."""
        waiting = [WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.due_at.is_not(None)]
        statement = update(WebhookDelivery).where(*waiting).values(url=url, receiver=receiver_of(url))
        self.session.execute(statement, execution_options={"synchronize_session": False})

    # Deliveries

    def waiting_test(self, endpoint_id: str) -> WebhookDelivery | None:
        mine = [WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.event == TEST]
        return self.session.scalar(select(WebhookDelivery).where(*mine, WebhookDelivery.due_at.is_not(None)).limit(1))

    def delivery(self, tenant_id: str, delivery_id: str) -> WebhookDelivery | None:
        query = select(WebhookDelivery).where(WebhookDelivery.id == delivery_id, WebhookDelivery.tenant_id == tenant_id)
        return self.session.scalar(query)

    def deliveries(
        self,
        tenant_id: str,
        *,
        limit: int,
        before: str | None,
        endpoint_id: str | None,
        job_id: str | None,
        status: str | None,
    ) -> Sequence[WebhookDelivery]:
        """Newest first, without what they say."""
        query = select(WebhookDelivery).options(defer(WebhookDelivery.payload, raiseload=True))
        query = query.where(WebhookDelivery.tenant_id == tenant_id)
        if before is not None:
            query = query.where(WebhookDelivery.id < before)
        if endpoint_id is not None:
            query = query.where(WebhookDelivery.endpoint_id == endpoint_id)
        if job_id is not None:
            query = query.where(WebhookDelivery.job_id == job_id)
        if status is not None:
            query = query.where(WebhookDelivery.status == status)
        return [*self.session.scalars(query.order_by(WebhookDelivery.id.desc()).limit(limit))]

    def redeliver(self, delivery: WebhookDelivery, now: datetime, url: str) -> bool:
        """Due now, as if it were new. False where it is being attempted."""
        idle = or_(WebhookDelivery.lease_expires_at.is_(None), WebhookDelivery.lease_expires_at <= now)
        statement = (
            update(WebhookDelivery)
            .where(WebhookDelivery.id == delivery.id, idle)
            .values(status="pending", due_at=now, failures=0, lease_expires_at=None, url=url, receiver=receiver_of(url))
            .returning(WebhookDelivery.id)
        )
        return self.session.scalar(statement.execution_options(synchronize_session=False)) is not None
