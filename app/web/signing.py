"""Sign in with an API key; sign out, of whatever session it is."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated
from urllib.parse import urlsplit

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from starlette.requests import cookie_parser

from app.errors import AppError
from app.http.auth import SESSION_COOKIE, Credentials
from app.http.deps import ServicesDep
from app.http.services import Services
from app.oidc import START
from app.tenants import SESSION_TIME, sign_in, sign_out
from app.web.access import PageRoute, SentForm, led_here, text_field
from app.web.rendering import drop_cookie, onward, page, see_other, set_cookie

router = APIRouter(route_class=PageRoute, include_in_schema=False)

NEXT = Annotated[str, Query(alias="next", max_length=2000)]
ID_COOKIE = "anneal_id"  # the identity provider's, of who signed in there
ID_PATH = "/logout"


@router.get("/login")
async def login_page(request: Request, services: ServicesDep, wanted: NEXT = "/") -> Response:
    """The form; without keys there is nothing to sign in to."""
    if not services.settings.keys_required:
        return see_other("/")
    if led_here(request):
        return page(request, "again.html")
    credentials = Credentials(session=Credentials.of(request.scope).session)
    with suppress(AppError):
        await services.auth.tenant(credentials)
        return see_other(own_path(wanted))
    return _form(request, services, own_path(wanted))


@router.post("/login")
async def login(request: Request, services: ServicesDep, form: SentForm) -> Response:
    """A session for a live key; the form again for any other."""
    wanted = own_path(text_field(form, "next"))
    address = request.client.host if request.client else ""
    await services.auth.count_sign_in(address)
    token = await anyio.to_thread.run_sync(sign_in, services.db, text_field(form, "key"), address)
    if token is None:
        return _form(request, services, wanted, refused=True)
    response = see_other(wanted)
    # What a browser says of its own page: behind a proxy that ends TLS, the connection itself does not tell.
    secure = request.headers.get("origin", "").startswith("https://")
    set_cookie(response, SESSION_COOKIE, token, secure=secure, seconds=int(SESSION_TIME.total_seconds()))
    return response


@router.post(ID_PATH)
async def logout(request: Request, services: ServicesDep, _sent: SentForm) -> Response:
    """The session ends, here and in the database; who signed in at the identity provider goes on to sign out there."""
    session, goodbye = Credentials.of(request.scope).session, None
    if session is not None:
        goodbye = await _goodbye(request, services, session)
        await anyio.to_thread.run_sync(sign_out, services.db, session)
        services.auth.forget(session)
    response = see_other("/login") if goodbye is None else onward(goodbye, "Signed out here.")
    drop_cookie(response, SESSION_COOKIE)
    drop_cookie(response, ID_COOKIE, ID_PATH)
    return response


async def _goodbye(request: Request, services: Services, session: str) -> str | None:
    """Where at the identity provider; None for a session of a key, and where the provider does not offer that."""
    if services.sign_in is None:
        return None
    with suppress(AppError):
        caller = await services.auth.caller(Credentials(session=session))
        if caller.subject is not None:
            id_token = cookie_parser(request.headers.get("cookie", "")).get(ID_COOKIE)
            return await services.sign_in.goodbye(id_token)
    return None


def _form(request: Request, services: Services, wanted: str, *, refused: bool = False) -> Response:
    provider = None if services.sign_in is None else {"host": services.sign_in.host, "start": START}
    code = 403 if refused else 200
    return page(request, "login.html", code=code, wanted=wanted, refused=refused, provider=provider)


def own_path(wanted: str) -> str:
    """Where to go after signing in: a path of this service, never another site's address."""
    try:
        parts = urlsplit(wanted)
    except ValueError:
        return "/"
    odd = parts.scheme or parts.netloc or not wanted.startswith("/") or wanted.startswith(("//", "/\\"))
    return "/" if odd or any(ord(c) < 32 or c == "\\" for c in wanted) else wanted
