"""What routes ask for: services, tenant, ids, pages, idempotency keys. None of it blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Header, Query, Request
from pydantic import AfterValidator

from app.errors import not_found
from app.http.pagination import decode_cursor
from app.http.services import Services

_ID = re.compile(r"[a-z]{3}_[0-9a-zA-Z]{1,60}")


async def get_services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesDep = Annotated[Services, Depends(get_services)]


async def current_tenant(request: Request) -> str:
    """The tenant of the key in the Authorization header; `app.http.openapi` describes the scheme. One function and
    no dependencies of its own: each of them costs a status poll some of its time."""
    services = cast(Services, request.app.state.services)
    return await services.auth.tenant(request.headers.get("authorization"))


TenantId = Annotated[str, Depends(current_tenant)]


@dataclass(frozen=True)
class Page:
    limit: int
    before: str | None


async def get_page(
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before")] = None,
) -> Page:
    return Page(limit, decode_cursor(cursor) if cursor is not None else None)


PageDep = Annotated[Page, Depends(get_page)]

IdempotencyKeyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="The same key and body answers the same resource; the same key with another body answers 409",
    ),
]


def check_id(kind: str, value: str) -> str:
    """404 for what cannot be an id; it never reaches the database (which refuses NUL bytes)."""
    if not _ID.fullmatch(value):
        raise not_found(kind, value[:80])
    return value


def path_id(kind: str) -> AfterValidator:
    """`check_id` for a path parameter."""
    return AfterValidator(lambda value: check_id(kind, value))


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must not hold control characters")
    return value


IdFilter = Annotated[str | None, Query(pattern=f"^{_ID.pattern}$")]
NameFilter = Annotated[Annotated[str, AfterValidator(_printable)] | None, Query(max_length=200)]
