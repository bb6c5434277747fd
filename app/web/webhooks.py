"""Webhook endpoints and what became of their messages; send one again."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from app.http.deps import IdFilter, ServicesDep, path_id
from app.http.pagination import CURSOR, decode_cursor, encode_cursor
from app.web.access import PageRoute, SentForm, Visitor
from app.web.rendering import page, see_other
from app.webhooks.schemas import DeliveryStatus

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_ROWS = 50
_ENDPOINTS = 200
DeliveryId = Annotated[str, path_id("delivery")]
StatusFilter = Annotated[DeliveryStatus | Literal[""], Query()]  # a form sends an empty one for any
Cursor = Annotated[str | None, Query(max_length=200, pattern=CURSOR)]


@router.get("/webhooks")
def webhooks_page(
    request: Request,
    services: ServicesDep,
    tenant_id: Visitor,
    status: StatusFilter = "",
    webhook_id: IdFilter = None,
    cursor: Cursor = None,
) -> Response:
    """Endpoints; and deliveries, newest first, by state and endpoint."""
    before = decode_cursor(cursor) if cursor else None
    found = services.webhooks.deliveries(
        tenant_id, limit=_ROWS + 1, before=before, endpoint_id=webhook_id, status=status or None
    )
    return page(
        request,
        "webhooks.html",
        endpoints=services.webhooks.page(tenant_id, limit=_ENDPOINTS, before=None),
        rows=found[:_ROWS],
        next_cursor=encode_cursor(found[_ROWS - 1].id) if len(found) > _ROWS else None,
        status=status,
        webhook_id=webhook_id,
    )


@router.post("/webhooks/deliveries/{delivery_id}/redeliver")
def redeliver(services: ServicesDep, tenant_id: Visitor, delivery_id: DeliveryId, _form: SentForm) -> Response:
    """Send it once more, and back to the list."""
    services.webhooks.redeliver(tenant_id, delivery_id)
    return see_other("/webhooks")
