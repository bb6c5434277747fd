"""Sign in at the identity provider, beside keys."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from starlette.requests import cookie_parser

from app.errors import AppError
from app.http.auth import SESSION_COOKIE
from app.http.deps import ServicesDep
from app.http.services import Services
from app.oidc import CALLBACK, START
from app.web.access import PageRoute
from app.web.rendering import onward, see_other, set_cookie
from app.web.signing import ID_COOKIE, ID_PATH, NEXT, own_path

if TYPE_CHECKING:
    from app.oidc.sign_in import SignIn

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_BEGUN_S = 600
_LONGEST_COOKIE = 3800  # of a browser's 4096 bytes, with its name and attributes
_FIELDS = ("code", "state", "iss", "error")


@router.get(START)
async def begin(services: ServicesDep, wanted: NEXT = "/") -> Response:
    """To the provider. What the way back needs stays in a cookie, a lax one: it is another site that leads back."""
    sign_in = _offered(services)
    address, seed = await sign_in.begin()
    response = see_other(address)
    name, kept = _begun_cookie(sign_in), f"{seed}.{_encoded(own_path(wanted))}"
    response.set_cookie(name, kept, max_age=_BEGUN_S, httponly=True, samesite="lax", secure=sign_in.secure, path="/")
    return response


@router.get(CALLBACK)
async def finish(request: Request, services: ServicesDep) -> Response:
    """Back from the provider: a session, and on to where the person was going. A browser sends the session's strict
    cookie only where a page of this service leads there: so this is one."""
    sign_in = _offered(services)
    address = request.client.host if request.client else ""
    await services.auth.count_sign_in(address)
    begun = cookie_parser(request.headers.get("cookie", "")).get(_begun_cookie(sign_in), "")
    seed, _, wanted = begun.partition(".")
    values = request.query_params
    signed_in = await sign_in.finish(seed, {name: values[name] for name in _FIELDS if name in values}, address)
    response = onward(_decoded(wanted), "Signed in.")
    lasts = int(sign_in.lasts.total_seconds())
    set_cookie(response, SESSION_COOKIE, signed_in.session, secure=sign_in.secure, seconds=lasts)
    response.delete_cookie(_begun_cookie(sign_in), httponly=True, samesite="lax", secure=sign_in.secure, path="/")
    if len(signed_in.id_token) <= _LONGEST_COOKIE:
        # To sign out there, too: nobody keeps it but the browser whose it is.
        set_cookie(response, ID_COOKIE, signed_in.id_token, secure=sign_in.secure, seconds=lasts, path=ID_PATH)
    return response


def _offered(services: Services) -> SignIn:
    if services.sign_in is None:
        raise AppError("not_found", "Not found", 404, "This service has no identity provider to sign in at.")
    return services.sign_in


def _begun_cookie(sign_in: SignIn) -> str:
    """By TLS, one that no other host of the same domain can set."""
    return "__Host-anneal_begun" if sign_in.secure else "anneal_begun"


def _encoded(wanted: str) -> str:
    """In letters that a cookie may hold as they are."""
    return base64.urlsafe_b64encode(wanted.encode()).decode().rstrip("=")


def _decoded(wanted: str) -> str:
    """Where the person was going: as little to be believed as any other cookie."""
    try:
        return own_path(base64.urlsafe_b64decode(wanted + "=" * (-len(wanted) % 4)).decode())
    except ValueError:
        return "/"
