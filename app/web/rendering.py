"""Templates to responses. Whatever comes from users is escaped by Jinja2, in every template; what a page may load, run
or talk to stands in its policy: this service's own files, no inline script, no inline style."""

from __future__ import annotations

import functools
import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response

from app import figures
from app.db.base import utcnow
from app.domain.roles import Role
from app.errors import AppError
from app.http.auth import SEED_COOKIE, Credentials, csrf_token
from app.jobs.schemas import timestamp

HERE = Path(__file__).parent
STATIC = HERE / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "Vary": "Cookie",
}


@functools.cache
def environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    found.filters.update(
        number=figures.number,
        percent=figures.percent,
        size=figures.size,
        duration=figures.duration,
        moment=figures.moment,
        dims=figures.dims,
        timestamp=timestamp,
        query_string=query_string,
    )
    found.globals.update(static=static_url, now=utcnow)
    return found


@functools.cache
def static_url(name: str) -> str:
    """With the file's digest: a browser keeps it until it changes."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?v={digest}"


def query_string(values: Mapping[str, Any]) -> str:
    """Of those that have a value."""
    return urlencode({name: value for name, value in values.items() if value not in (None, "")})


def fragment(template: str, **values: Any) -> str:
    """A part of a page."""
    return environment().get_template(template).render(**values)


def page(request: Request, template: str, *, code: int = 200, **values: Any) -> Response:
    """A page for the browser that asks. It gets a cookie that its forms are bound to, where it has none."""
    credentials = Credentials.of(request.scope)
    fresh = None if credentials.seed else secrets.token_urlsafe(24)
    token = csrf_token(credentials.seed or fresh or "", credentials.session)
    keys_required = request.app.state.services.settings.keys_required
    caller = request.scope.get("anneal.caller")
    body = fragment(
        template,
        csrf=token,
        path=request.url.path,
        host=request.url.netloc,
        signed_in=keys_required and caller is not None,
        known=not keys_required or caller is not None,
        may_submit=caller is None or caller.role.may(Role.SUBMIT),
        may_admin=caller is not None and caller.role.may(Role.ADMIN),
        **values,
    )
    response = Response(body, code, _HEADERS, "text/html")
    if fresh is not None:
        set_cookie(response, SEED_COOKIE, fresh, secure=False)
    return response


def part(body: str) -> Response:
    """A fragment that a script puts into a page."""
    return Response(body, 200, _HEADERS, "text/html")


def see_other(path: str) -> Response:
    """After a form: another page of this service."""
    return Response(None, 303, {"Location": path, "Cache-Control": "no-store"})


def onward(target: str, words: str) -> Response:
    """A page that leads on at once: to another site, which a form's answer must not by the policy; or to a page of our
    own that another site led to, for which a browser sends no strict cookie."""
    response = part(fragment("onward.html", target=target, words=words))
    response.headers["Referrer-Policy"] = "no-referrer"  # its own address holds a code
    return response


def error_page(request: Request, error: AppError) -> Response:
    response = page(request, "error.html", code=error.status, error=error)
    response.headers.update({k: v for k, v in error.headers.items() if k.lower() != "www-authenticate"})
    return response


def set_cookie(
    response: Response, name: str, value: str, *, secure: bool, seconds: int | None = None, path: str = "/"
) -> None:
    response.set_cookie(name, value, max_age=seconds, httponly=True, samesite="strict", secure=secure, path=path)


def drop_cookie(response: Response, name: str, path: str = "/") -> None:
    response.delete_cookie(name, httponly=True, samesite="strict", path=path)
