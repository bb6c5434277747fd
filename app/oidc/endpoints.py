"""Whom this service trusts, for clients that do not know it yet (RFC 9728)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from app.errors import AppError
from app.http.deps import ServicesDep
from app.oidc import METADATA

router = APIRouter()


@router.get(METADATA, include_in_schema=False)
async def protected_resource(request: Request, services: ServicesDep) -> dict[str, Any]:
    """The identity provider whose access tokens open `/v1`; 404 where none does."""
    oidc, settings = services.settings.oidc, services.settings
    if not oidc.audience:
        raise AppError("not_found", "Not found", 404, "This service takes no tokens of an identity provider.")
    # What begins with anneal_ is ours: RFC 9728, 2 lets others be added.
    found = {
        "resource": settings.public_url or f"{request.url.scheme}://{request.url.netloc}",
        "authorization_servers": [oidc.issuer],
        "bearer_methods_supported": ["header"],
        "anneal_audience": oidc.audience,
    }
    return found | ({"anneal_client_id": oidc.cli_client_id} if oidc.cli_client_id else {})
