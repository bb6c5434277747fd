"""Who looks at a page: the tenant of the browser's session; of all others, none where keys are required."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any
from urllib.parse import quote

import structlog
from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from app.domain.roles import needed_by
from app.errors import AppError, invalid_request
from app.http.auth import Credentials
from app.http.deps import get_services
from app.http.middleware import admit
from app.http.problem import database_problem, field_errors, internal_error
from app.storage.base import BlobNotFound
from app.web.rendering import error_page, page, see_other

log = structlog.get_logger(__name__)

_MOST_FIELDS = 100


class SignInNeeded(Exception):
    """Nobody is signed in; the page is for who is."""


class PageRoute(APIRoute):
    """A route whose errors are pages, too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except SignInNeeded:
                return _to_sign_in(request)
            except AppError as error:
                return error_page(request, error)
            except RequestValidationError as error:
                fields = field_errors(error.errors())
                detail = "; ".join(f"{e.pointer}: {e.message}" for e in fields[:3])
                return error_page(request, invalid_request(detail, fields))
            except SQLAlchemyError as error:
                log.error("database_error", exc_info=error)
                return error_page(request, database_problem(error))
            except BlobNotFound as error:
                log.error("blob_missing", exc_info=error)
                detail = "The storage does not hold this file."
                return error_page(request, AppError("content_missing", "The content is gone", 503, detail))
            except HTTPException:
                raise
            except Exception as error:
                log.error("unhandled_error", method=request.method, path=request.url.path, exc_info=error)
                return error_page(request, internal_error())

        return handle


def led_here(request: Request) -> bool:
    """Whether a page of somebody else leads here: then a browser sends no strict cookie; asked again from a page of our
    own, it does."""
    return request.method == "GET" and request.headers.get("sec-fetch-site") == "cross-site"


def _to_sign_in(request: Request) -> Response:
    # What a script asked for is no page: it is the page around it that goes to sign in.
    if "hx-request" in request.headers or "text/event-stream" in request.headers.get("accept", ""):
        return Response(None, 401, {"HX-Redirect": "/login", "Cache-Control": "no-store"})
    if led_here(request):
        return page(request, "again.html")
    wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return see_other("/login" if request.method != "GET" else f"/login?next={quote(wanted, safe='')}")


async def visitor(request: Request) -> str:
    """The tenant's id. A key in the Authorization header does as well as a session. 403 for what the role does not
    allow."""
    services = await get_services(request)
    try:
        caller = await services.auth.caller(Credentials.of(request.scope))
    except AppError as error:
        if error.status != 401:
            raise
        raise SignInNeeded from error
    admit(request.scope, caller)
    await services.auth.counted(caller)
    caller.require(needed_by(request.method))
    return caller.tenant_id


Visitor = Annotated[str, Depends(visitor)]


async def sent_form(request: Request) -> FormData:
    """The fields of a form of this browser's own page; 403 for any other."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise AppError("unsupported_form", "Unsupported", 415, "A form of this type is not taken.")
    form = await request.form(max_files=0, max_fields=_MOST_FIELDS)
    token = form.get("csrf")
    Credentials.of(request.scope).check_token(token if isinstance(token, str) else None)
    return form


SentForm = Annotated[FormData, Depends(sent_form)]


def text_field(form: FormData, name: str) -> str:
    """A field as it was typed, without the blanks around it; empty where it is missing."""
    value = form.get(name)
    return value.strip() if isinstance(value, str) else ""
