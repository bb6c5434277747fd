"""`/v1/webhooks` and `/v1/deliveries`: who is told of job ends, and what became of it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response

from app.db.webhooks import WebhookDelivery, WebhookEndpoint
from app.domain.artifact_key import digest_of
from app.http.deps import IdempotencyKeyHeader, IdFilter, PageDep, ServicesDep, TenantId, path_id
from app.http.pagination import Page, page_response
from app.http.problem import problems
from app.http.services import Services
from app.idempotency import Idempotency
from app.jobs.schemas import JobEnded
from app.webhooks.schemas import (
    DeliveryStatus,
    SecretRotation,
    WebhookDeliveryOut,
    WebhookDeliveryPage,
    WebhookEndpointChange,
    WebhookEndpointIn,
    WebhookEndpointOut,
    WebhookEndpointPage,
    WebhookMessageOut,
    WebhookSecretOut,
)

router = APIRouter(tags=["webhooks"])

EndpointId = Annotated[str, path_id("webhook")]
DeliveryId = Annotated[str, path_id("delivery")]

_NO_STORE = {"Cache-Control": "no-store"}


@router.post("/webhooks", status_code=201, response_model=WebhookSecretOut, responses=problems(400, 409, 413, 507))
def create_webhook(
    services: ServicesDep, tenant_id: TenantId, body: WebhookEndpointIn, key: IdempotencyKeyHeader = None
) -> Response:
    """Have a URL told of the end of every job. The answer has the secret that signs, this once."""
    document = body.model_dump(mode="json")
    idempotency = None if key is None else Idempotency(key, digest_of(["webhook", document]))
    row, new = services.webhooks.create(tenant_id, body, idempotency)
    headers = {"Location": f"/v1/webhooks/{row.id}", **_NO_STORE}
    if not new:
        headers["Idempotency-Replayed"] = "true"
    return _json(WebhookSecretOut.with_secret(row, shown=new), 201, headers)


@router.get("/webhooks", response_model=WebhookEndpointPage)
def list_webhooks(services: ServicesDep, tenant_id: TenantId, page: PageDep) -> Response:
    """Webhook endpoints, newest first."""

    def fetch(limit: int, before: str | None) -> list[WebhookEndpoint]:
        return [*services.webhooks.page(tenant_id, limit=limit, before=before)]

    return page_response(page, fetch, lambda row: WebhookEndpointOut.of(row).model_dump_json().encode())


@router.get("/webhooks/{webhook_id}", response_model=WebhookEndpointOut, responses=problems(404))
def get_webhook(services: ServicesDep, tenant_id: TenantId, webhook_id: EndpointId) -> WebhookEndpointOut:
    """One endpoint, without its secret."""
    return WebhookEndpointOut.of(services.webhooks.get(tenant_id, webhook_id))


@router.patch("/webhooks/{webhook_id}", response_model=WebhookEndpointOut, responses=problems(400, 404, 413, 507))
def change_webhook(
    services: ServicesDep, tenant_id: TenantId, webhook_id: EndpointId, body: WebhookEndpointChange
) -> WebhookEndpointOut:
    """Change an endpoint: where it is, what it is told of, whether it is enabled."""
    return WebhookEndpointOut.of(services.webhooks.change(tenant_id, webhook_id, body))


@router.delete("/webhooks/{webhook_id}", status_code=204, response_class=Response, responses=problems(404, 507))
def delete_webhook(services: ServicesDep, tenant_id: TenantId, webhook_id: EndpointId) -> Response:
    """Delete an endpoint. What waits for it is not sent."""
    services.webhooks.delete(tenant_id, webhook_id)
    return Response(status_code=204)


@router.post("/webhooks/{webhook_id}/rotate", response_model=WebhookSecretOut, responses=problems(400, 404, 413, 507))
def rotate_webhook_secret(
    services: ServicesDep, tenant_id: TenantId, webhook_id: EndpointId, body: SecretRotation | None = None
) -> Response:
    """Give an endpoint a new secret, which the answer has, this once. The one of before signs beside it for
    `overlap_seconds`."""
    row = services.webhooks.rotate(tenant_id, webhook_id, (body or SecretRotation()).overlap_seconds)
    return _json(WebhookSecretOut.with_secret(row), 200, _NO_STORE)


@router.post(
    "/webhooks/{webhook_id}/test",
    status_code=202,
    response_model=WebhookMessageOut,
    responses=problems(404, 409, 413, 507),
)
def test_webhook(services: ServicesDep, tenant_id: TenantId, webhook_id: EndpointId) -> Response:
    """Have an endpoint sent a message of type `webhook.test`. The delivery tells what became of it."""
    return _json(WebhookMessageOut.of(services.webhooks.test(tenant_id, webhook_id)), 202, {})


@router.get("/webhooks/{webhook_id}/deliveries", response_model=WebhookDeliveryPage, responses=problems(404))
def list_webhook_deliveries(
    services: ServicesDep,
    tenant_id: TenantId,
    webhook_id: EndpointId,
    page: PageDep,
    status: DeliveryStatus | None = None,
) -> Response:
    """What an endpoint was sent, or is to be; newest first."""
    services.webhooks.get(tenant_id, webhook_id)
    return _deliveries(services, tenant_id, page, webhook_id, None, status)


@router.get("/deliveries", response_model=WebhookDeliveryPage)
def list_deliveries(
    services: ServicesDep,
    tenant_id: TenantId,
    page: PageDep,
    webhook_id: IdFilter = None,
    job_id: IdFilter = None,
    status: DeliveryStatus | None = None,
) -> Response:
    """What was sent, or is to be, to endpoints (also deleted ones) and to URLs that jobs named; newest first."""
    return _deliveries(services, tenant_id, page, webhook_id, job_id, status)


@router.get("/deliveries/{delivery_id}", response_model=WebhookMessageOut, responses=problems(404))
def get_delivery(services: ServicesDep, tenant_id: TenantId, delivery_id: DeliveryId) -> WebhookMessageOut:
    """One delivery, and what it says."""
    return WebhookMessageOut.of(services.webhooks.delivery(tenant_id, delivery_id))


@router.post(
    "/deliveries/{delivery_id}/redeliver",
    status_code=202,
    response_model=WebhookMessageOut,
    responses=problems(404, 409, 413, 507),
)
def redeliver(services: ServicesDep, tenant_id: TenantId, delivery_id: DeliveryId) -> Response:
    """Send it once more, now, whatever became of it: the same message under the same id."""
    return _json(WebhookMessageOut.of(services.webhooks.redeliver(tenant_id, delivery_id)), 202, {})


def _deliveries(
    services: Services,
    tenant_id: str,
    page: Page,
    endpoint_id: str | None,
    job_id: str | None,
    status: str | None,
) -> Response:
    def fetch(limit: int, before: str | None) -> list[WebhookDelivery]:
        found = services.webhooks.deliveries(
            tenant_id, limit=limit, before=before, endpoint_id=endpoint_id, job_id=job_id, status=status
        )
        return [*found]

    return page_response(page, fetch, lambda row: WebhookDeliveryOut.of(row).model_dump_json().encode())


def _json(body: WebhookSecretOut | WebhookMessageOut, status: int, headers: dict[str, str]) -> Response:
    return Response(body.model_dump_json(), status, headers, "application/json")


webhooks = APIRouter(tags=["jobs"])  # described only: it is the worker that sends them


def _header(name: str, description: str, *, required: bool = True) -> dict[str, object]:
    return {
        "name": name,
        "in": "header",
        "required": required,
        "schema": {"type": "string"},
        "description": description,
    }


@webhooks.post(
    "job-ended",
    status_code=204,
    responses={"default": {"description": "Anything but 2xx: it is sent again, after growing pauses"}},
    openapi_extra={
        "parameters": [
            _header("webhook-id", "Of the message, the same in every attempt"),
            _header("webhook-timestamp", "Of the attempt: Unix time in seconds"),
            _header(
                "webhook-signature",
                "As Standard Webhooks has it, one for each secret that is valid; not there without a secret",
                required=False,
            ),
            _header("X-Anneal-Delivery", "As `webhook-id`"),
            _header(
                "X-Anneal-Signature",
                "`sha256=` and the HMAC of the body, where a job named the URL and the operator has set a secret",
                required=False,
            ),
        ]
    },
)
def job_ended(body: JobEnded) -> None:
    """What a webhook endpoint, and a job's `webhook.url`, gets once a job has ended: at least once, until it answers
    2xx."""
