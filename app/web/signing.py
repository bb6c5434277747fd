"""Sign in with an API key, sign out."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated
from urllib.parse import urlsplit

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from app.errors import AppError
from app.http.auth import SESSION_COOKIE, Credentials
from app.http.deps import ServicesDep
from app.tenants import SESSION_TIME, sign_in, sign_out
from app.web.access import PageRoute, SentForm, led_here, text_field
from app.web.rendering import drop_session, page, see_other, set_cookie

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_NEXT = Annotated[str, Query(alias="next", max_length=2000)]


@router.get("/login")
async def login_page(request: Request, services: ServicesDep, wanted: _NEXT = "/") -> Response:
    """The form; without keys there is nothing to sign in to."""
    if not services.settings.keys_required:
        return see_other("/")
    if led_here(request):
        return page(request, "again.html")
    credentials = Credentials(session=Credentials.of(request.scope).session)
    with suppress(AppError):
        await services.auth.tenant(credentials)
        return see_other(_own_path(wanted))
    return page(request, "login.html", wanted=_own_path(wanted), refused=False)


@router.post("/login")
async def login(request: Request, services: ServicesDep, form: SentForm) -> Response:
    """A session for a live key; the form again for any other."""
    wanted = _own_path(text_field(form, "next"))
    address = request.client.host if request.client else ""
    await services.auth.count_sign_in(address)
    token = await anyio.to_thread.run_sync(sign_in, services.db, text_field(form, "key"), address)
    if token is None:
        return page(request, "login.html", code=403, wanted=wanted, refused=True)
    response = see_other(wanted)
    # What a browser says of its own page: behind a proxy that ends TLS, the connection itself does not tell.
    secure = request.headers.get("origin", "").startswith("https://")
    set_cookie(response, SESSION_COOKIE, token, secure=secure, seconds=int(SESSION_TIME.total_seconds()))
    return response


@router.post("/logout")
async def logout(request: Request, services: ServicesDep, _form: SentForm) -> Response:
    """The session ends, here and in the database."""
    session = Credentials.of(request.scope).session
    if session is not None:
        await anyio.to_thread.run_sync(sign_out, services.db, session)
        services.auth.forget(session)
    response = see_other("/login")
    drop_session(response)
    return response


def _own_path(wanted: str) -> str:
    """Where to go after signing in: a path of this service, never another site's address."""
    try:
        parts = urlsplit(wanted)
    except ValueError:
        return "/"
    odd = parts.scheme or parts.netloc or not wanted.startswith("/") or wanted.startswith(("//", "/\\"))
    return "/" if odd or any(ord(c) < 32 or c == "\\" for c in wanted) else wanted
