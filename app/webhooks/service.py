"""What a tenant can do with its webhook endpoints and deliveries."""

from __future__ import annotations

from collections.abc import Sequence

from app.audit import current_actor, record
from app.db.base import utcnow
from app.db.ids import new_id
from app.db.uow import Database
from app.db.webhooks import WebhookDelivery, WebhookEndpoint
from app.errors import AppError, conflict, not_found
from app.idempotency import Idempotency, once, recall, remember, resource_gone
from app.jobs.schemas import JobEnded
from app.settings import Settings
from app.webhooks.outbox import delivery
from app.webhooks.queue import DeliveryQueue
from app.webhooks.repository import WebhookRepository
from app.webhooks.schemas import WebhookEndpointChange, WebhookEndpointIn
from app.webhooks.signing import new_secret, rotate


class WebhookService:
    def __init__(self, db: Database, settings: Settings) -> None:
        self.db = db
        self.settings = settings.webhooks

    # Endpoints

    def create(
        self, tenant_id: str, wanted: WebhookEndpointIn, idempotency: Idempotency | None
    ) -> tuple[WebhookEndpoint, bool]:
        """The endpoint, and whether it is new. Raises 409 `too_many_webhooks`."""
        return once(idempotency, lambda: self._create(tenant_id, wanted, idempotency))

    def _create(
        self, tenant_id: str, wanted: WebhookEndpointIn, idempotency: Idempotency | None
    ) -> tuple[WebhookEndpoint, bool]:
        with self.db.write() as uow:
            webhooks = WebhookRepository(uow.session)
            earlier = recall(uow.session, tenant_id, idempotency)
            if earlier is not None:
                found = webhooks.get(tenant_id, earlier)
                if found is None:
                    raise resource_gone("webhook")
                return found, False
            most = self.settings.endpoints_per_tenant
            if webhooks.count(tenant_id) >= most:
                detail = f"There are {most} endpoints already, which is the most."
                raise conflict("too_many_webhooks", detail, "Delete one that is no longer needed.")
            endpoint = WebhookEndpoint(
                id=new_id("whk"),
                tenant_id=tenant_id,
                url=wanted.url,
                description=wanted.description,
                events=_ordered(wanted.events),
                secret=new_secret(),
                previous=[],
                failures=0,
                created_at=utcnow(),
            )
            webhooks.add(endpoint)
            remember(uow.session, tenant_id, idempotency, endpoint.id)
            record(uow.session, tenant_id, current_actor(), "webhook.create", endpoint.id)
            return endpoint, True

    def get(self, tenant_id: str, endpoint_id: str) -> WebhookEndpoint:
        with self.db.read() as session:
            return _found(WebhookRepository(session), tenant_id, endpoint_id)

    def page(self, tenant_id: str, *, limit: int, before: str | None) -> Sequence[WebhookEndpoint]:
        with self.db.read() as session:
            return WebhookRepository(session).page(tenant_id, limit=limit, before=before)

    def change(self, tenant_id: str, endpoint_id: str, wanted: WebhookEndpointChange) -> WebhookEndpoint:
        """Enabled again, it begins with a clean slate: failures of before do not count."""
        with self.db.write() as uow:
            webhooks = WebhookRepository(uow.session)
            endpoint = _found(webhooks, tenant_id, endpoint_id, lock=True)
            if wanted.url is not None and wanted.url != endpoint.url:
                endpoint.url = wanted.url
                uow.session.flush()
                webhooks.move(endpoint.id, wanted.url)
            if wanted.description is not None:
                endpoint.description = wanted.description
            if "events" in wanted.model_fields_set:
                endpoint.events = _ordered(wanted.events)
            if wanted.enabled is True and endpoint.disabled_at is not None:
                endpoint.disabled_at = endpoint.disabled_reason = endpoint.failing_since = None
                endpoint.failures = 0
            if wanted.enabled is False and endpoint.disabled_at is None:
                DeliveryQueue(uow.session).disable(endpoint, None)
            if changed := sorted(wanted.model_fields_set):
                record(uow.session, tenant_id, current_actor(), "webhook.change", endpoint.id, {"fields": changed})
            return endpoint

    def delete(self, tenant_id: str, endpoint_id: str) -> None:
        """Its deliveries can be looked at for as long as any; what waits is not sent."""
        with self.db.write() as uow:
            endpoint = _found(WebhookRepository(uow.session), tenant_id, endpoint_id, lock=True)
            endpoint.deleted_at = utcnow()
            endpoint.secret, endpoint.previous = "", []
            uow.session.flush()
            record(uow.session, tenant_id, current_actor(), "webhook.delete", endpoint.id)
            DeliveryQueue(uow.session).drop_all(endpoint.id, "The endpoint was deleted.")

    def rotate(self, tenant_id: str, endpoint_id: str, overlap_s: int) -> WebhookEndpoint:
        """A new secret; the one of before signs beside it for so long."""
        with self.db.write() as uow:
            endpoint = _found(WebhookRepository(uow.session), tenant_id, endpoint_id, lock=True)
            rotate(endpoint, utcnow(), overlap_s)
            record(uow.session, tenant_id, current_actor(), "webhook.rotate", endpoint.id)
            return endpoint

    def test(self, tenant_id: str, endpoint_id: str) -> WebhookDelivery:
        """Have the endpoint sent a message that tells of nothing, whatever events it is for. One that waits already is
        answered again. Raises 409 `webhook_disabled`."""
        with self.db.write() as uow:
            webhooks = WebhookRepository(uow.session)
            endpoint = _enabled(_found(webhooks, tenant_id, endpoint_id, lock=True))
            waiting = webhooks.waiting_test(endpoint.id)
            if waiting is not None:
                return waiting
            now = utcnow()
            message = JobEnded.sample(now)
            row = delivery(
                tenant_id, endpoint.url, message.type, message.to_json().decode(), now,
                endpoint_id=endpoint.id, job_id=None,
            )  # fmt: skip
            uow.session.add(row)
            record(uow.session, tenant_id, current_actor(), "webhook.test", endpoint_id, {"delivery": row.id})
            return row

    # Deliveries

    def deliveries(
        self,
        tenant_id: str,
        *,
        limit: int,
        before: str | None,
        endpoint_id: str | None = None,
        job_id: str | None = None,
        status: str | None = None,
    ) -> Sequence[WebhookDelivery]:
        with self.db.read() as session:
            return WebhookRepository(session).deliveries(
                tenant_id, limit=limit, before=before, endpoint_id=endpoint_id, job_id=job_id, status=status
            )

    def delivery(self, tenant_id: str, delivery_id: str) -> WebhookDelivery:
        with self.db.read() as session:
            row = WebhookRepository(session).delivery(tenant_id, delivery_id)
        if row is None:
            raise not_found("delivery", delivery_id)
        return row

    def redeliver(self, tenant_id: str, delivery_id: str) -> WebhookDelivery:
        """Have it sent once more, now, whatever became of it: the same message under the same id, to where its endpoint
        is now. One that is being attempted stays as it is. Raises 409 `webhook_disabled`, `webhook_deleted`."""
        with self.db.write() as uow:
            webhooks = WebhookRepository(uow.session)
            row = webhooks.delivery(tenant_id, delivery_id)
            if row is None:
                raise not_found("delivery", delivery_id)
            url = row.url
            if row.endpoint_id is not None:
                endpoint = webhooks.get(tenant_id, row.endpoint_id, lock=True)
                if endpoint is None:
                    raise conflict("webhook_deleted", "The delivery's endpoint was deleted.")
                url = _enabled(endpoint).url
            webhooks.redeliver(row, utcnow(), url)
            record(uow.session, tenant_id, current_actor(), "delivery.redeliver", delivery_id)
            uow.session.refresh(row)
            return row


def _found(webhooks: WebhookRepository, tenant_id: str, endpoint_id: str, *, lock: bool = False) -> WebhookEndpoint:
    endpoint = webhooks.get(tenant_id, endpoint_id, lock=lock)
    if endpoint is None:
        raise not_found("webhook", endpoint_id)
    return endpoint


def _enabled(endpoint: WebhookEndpoint) -> WebhookEndpoint:
    if endpoint.disabled_at is None:
        return endpoint
    why = f": {endpoint.disabled_reason}" if endpoint.disabled_reason else "."
    raise AppError(
        "webhook_disabled",
        "Conflict",
        409,
        f"The endpoint is disabled{why}",
        remedy=f'PATCH /v1/webhooks/{endpoint.id} {{"enabled": true}} first.',
    )


def _ordered(events: Sequence[str] | None) -> list[str] | None:
    """Each once."""
    return None if events is None else list(dict.fromkeys(events))
