"""The API's interactive documentation, from this service alone."""

from __future__ import annotations

from contextlib import suppress

from fastapi import APIRouter, Request, Response

from app.web.access import PageRoute, SignInNeeded, visitor
from app.web.rendering import page

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/docs")
async def docs_page(request: Request) -> Response:
    """Swagger UI over `/openapi.json`."""
    with suppress(SignInNeeded):  # open to all, as the document is; who is signed in stays so on it
        await visitor(request)
    return page(request, "docs.html")
