"""What routes ask for: services, tenant, ids, pages, idempotency keys. None of it blocks."""

from __future__ import annotations

import re
from typing import Annotated, Any, cast

from fastapi import Depends, Header, Query, Request
from pydantic import AfterValidator

from app.domain.roles import Role
from app.errors import not_found
from app.http.openapi import NEEDED
from app.http.pagination import CURSOR, Page, decode_cursor
from app.http.services import Services
from app.library import LONGEST_FILENAME, LONGEST_NAME
from app.names import forbidden_character
from app.tenants.callers import Caller

_ID = re.compile(r"[a-z]{3}_[0-9a-zA-Z]{1,60}")


async def get_services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesDep = Annotated[Services, Depends(get_services)]


async def current_tenant(request: Request) -> str:
    """The tenant of the key in the Authorization header, which `KeyMiddleware` has found; `app.http.openapi` describes
    the scheme."""
    return cast(str, request.scope["anneal.tenant"])


TenantId = Annotated[str, Depends(current_tenant)]


async def current_caller(request: Request) -> Caller:
    """Who sends the request, with the role."""
    return cast(Caller, request.scope["anneal.caller"])


CallerDep = Annotated[Caller, Depends(current_caller)]


async def _admin(request: Request) -> None:
    (await current_caller(request)).require(Role.ADMIN)


async def _operator(request: Request) -> None:
    (await current_caller(request)).require(Role.OPERATOR)


# What a route says whose request needs more than its method does (`app.domain.roles.needed_by`, seen to for all by
# `KeyMiddleware`): `@router.get("", **ADMIN)`. The document tells it as the operation's security.
ADMIN: Any = {"dependencies": [Depends(_admin)], "openapi_extra": {NEEDED: Role.ADMIN.value}}
OPERATOR: Any = {"dependencies": [Depends(_operator)]}  # of a router; `app.http.openapi` knows its paths


async def get_page(
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[
        str | None,
        Query(
            max_length=200,
            description="`next_cursor` of the page before, unchanged",
            json_schema_extra={"pattern": CURSOR},
        ),
    ] = None,
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
    if character := forbidden_character(value):
        raise ValueError(f"must not hold the control character {character}")
    return value


# Checked with the name that a form gives, by `app.library`; the lengths are here for the document.
GivenName = Annotated[
    str | None,
    Query(
        description="Default: the file's name without its suffix",
        json_schema_extra={"minLength": 1, "maxLength": LONGEST_NAME},
    ),
]
GivenFilename = Annotated[
    str | None,
    Query(
        description="The file's name; its suffix helps to tell the format",
        json_schema_extra={"minLength": 1, "maxLength": LONGEST_FILENAME},
    ),
]
IdFilter = Annotated[str | None, Query(pattern=f"^{_ID.pattern}$")]
NameFilter = Annotated[Annotated[str, AfterValidator(_printable)] | None, Query(max_length=200)]
