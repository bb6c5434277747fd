"""ASGI middleware: correlation id, access log, metrics, the last net for exceptions, body limits, local protection."""

from __future__ import annotations

import re
import time
from urllib.parse import quote, urlsplit

import structlog
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.audit import acting
from app.errors import AppError
from app.http.auth import TOKEN_HEADER, Authenticator, Credentials
from app.http.metrics import Metrics
from app.http.problem import database_problem, internal_error, problem_response
from app.http.rates import Rate
from app.logging import bind_correlation_id, new_correlation_id
from app.network import is_loopback
from app.operations.tracing import Span, Tracing, traceparent_of
from app.tenants.callers import Caller

log = structlog.get_logger("anneal.http")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_LONGEST_PATH = 200  # of a span's attribute
# Probes and status polls: logged for debugging only, unless they fail.
_POLL = "/v1/jobs/{job_id}"
_QUIET = frozenset({"/healthz", "/readyz", "/metrics", _POLL})
# Their bodies are files, which the routes stream and limit themselves.
_FILE_ROUTES = re.compile(r"POST /v1/(models|datasets)|PUT /v1/uploads/[^/]+/parts/[^/]+")


class RequestContextMiddleware:
    """The outermost layer: gives the request its id, logs and counts it, and answers what nobody else caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope["anneal.request_id"] = request_id
        bind_correlation_id(request_id)
        span = _span(scope)
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        self.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = status or 499  # nobody is there to be answered
        except Exception as error:
            log.error("unhandled_error", method=scope["method"], path=scope["path"], exc_info=error)
            if status:
                raise  # too late for an answer: the server has to cut the connection
            await problem_response(internal_error(), Request(scope))(scope, receive, send_with_id)
        finally:
            self.metrics.in_flight.dec()
            self._note(scope, status, time.perf_counter() - started)
            if span is not None:
                _end(span, scope, status)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = _template(scope)
        method = scope["method"] if scope["method"] in _METHODS else "(other)"
        # What is asked to wait is no slow answer.
        waits = b"wait=" in scope["query_string"] and route == _POLL
        self.metrics.observe(method, f"{route}?wait" if waits else route, status, seconds)
        write = log.debug if route in _QUIET and status < 400 else log.info
        write("request", method=method, path=scope["path"], status=status, ms=round(seconds * 1000, 2))


def _span(scope: Scope) -> Span | None:
    """Of a request that changes something, or whose caller traces it: else polls would be all that there is to see.
    What it leads to finds its parent in the scope."""
    caller = traceparent_of(Headers(scope=scope).get("traceparent"))
    if caller is None and (scope["method"] in _SAFE or scope["method"] not in _METHODS):
        return None
    tracing: Tracing = scope["app"].state.tracing
    method, path = scope["method"], scope["path"]
    attributes = {"http.request.method": method, "url.path": path[:_LONGEST_PATH]}
    span = tracing.start(method, parent=caller, kind="server", attributes=attributes)
    scope["anneal.traceparent"] = span.traceparent
    return span


def _end(span: Span, scope: Scope, status: int) -> None:
    route = _template(scope)
    told: dict[str, str | int | float | bool] = {
        "http.route": route,
        "http.response.status_code": status,
        "anneal.request.id": scope["anneal.request_id"],
    }
    if "anneal.tenant" in scope:
        told["anneal.tenant.id"] = scope["anneal.tenant"]
    failed = f"answered {status}" if status >= 500 or not status else None
    span.end(told, name=f"{scope['method']} {route}", failed=failed)


def _template(scope: Scope) -> str:
    """The path with its parameters' names in it: ids would make a series of metrics each."""
    path: str = getattr(scope.get("route"), "path", "(none)")
    # Newer versions of FastAPI leave the prefix of an included router out.
    if scope["path"].startswith("/v1/") and path.startswith("/") and not path.startswith("/v1/"):
        return "/v1" + path
    return path


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(given):
                return given
    return new_correlation_id()


class KeyMiddleware:
    """Finds who sends a request to `/v1`, and whether the role is enough for its method, before anything else of it is
    looked at, its body least of all."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            credentials = scope["anneal.credentials"] = Credentials.of(scope)
            auth: Authenticator = scope["app"].state.services.auth
            token = Headers(scope=scope).get(TOKEN_HEADER)
            try:
                caller = await auth.caller_of_call(credentials, scope["method"], token)
                admit(scope, caller)
                rate = await auth.counted(caller)
            except AppError as error:
                await (await _refusal(scope, auth, credentials, error))(scope, receive, send)
                return
            except SQLAlchemyError as error:
                log.error("database_error", exc_info=error)
                await problem_response(database_problem(error), Request(scope))(scope, receive, send)
                return
            if rate is not None:
                send = _telling(send, rate)
        await self.app(scope, receive, send)


async def _refusal(scope: Scope, auth: Authenticator, credentials: Credentials, error: AppError) -> Response:
    request = Request(scope)
    if error.status == 401:
        try:
            await auth.count_wrong_key(credentials, (scope.get("client") or ("",))[0])
        except AppError as too_many:
            return problem_response(too_many, request)
        if (response := _sign_in(request)) is not None:
            return response
    return problem_response(error, request)


def _telling(send: Send, rate: Rate) -> Send:
    """Answers say what is left of the minute."""
    told = [(name.lower().encode(), value.encode()) for name, value in rate.headers().items()]

    async def telling(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *told]
        await send(message)

    return telling


def admit(scope: Scope, caller: Caller) -> None:
    """From here on the request is this caller's: for the routes, in its log lines and in audit rows."""
    scope["anneal.caller"], scope["anneal.tenant"] = caller, caller.tenant_id
    acting(caller.actor)
    told = {} if caller.key_id is None else {"key_id": caller.key_id}
    if caller.subject is not None:
        told["subject"] = caller.subject
    structlog.contextvars.bind_contextvars(tenant_id=caller.tenant_id, **told)


def _sign_in(request: Request) -> Response | None:
    """A person who opens a link in a browser signs in first, and comes back."""
    if request.method != "GET" or request.headers.get("sec-fetch-mode") != "navigate":
        return None
    wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return Response(None, 303, {"Location": f"/login?next={quote(wanted, safe='')}", "Cache-Control": "no-store"})


class BodyLimitMiddleware:
    """Limits every body that is not a file: 413 at once by Content-Length, or as soon as it has grown too large."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _SAFE or _is_file(scope):
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared[:20]) > self.limit:
            await problem_response(too_large(self.limit), Request(scope))(scope, receive, send)
            return
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self.limit:
                    # FastAPI passes HTTPException on from reading a body, and hides every other kind
                    raise HTTPException(413, too_large(self.limit).detail)
            return message

        await self.app(scope, limited, send)


def _is_file(scope: Scope) -> bool:
    return _FILE_ROUTES.fullmatch(f"{scope['method']} {scope['path']}") is not None


def too_large(limit: int) -> AppError:
    return AppError("too_large", "Too large", 413, f"The body is larger than {limit} bytes.", extra={"limit": limit})


# What proxies add: a request that carries one came from somewhere else.
_FORWARDED = ("forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip")


class LocalGuardMiddleware:
    """Protection of a service without keys: it serves programs of this machine that speak to it directly.

    What came through a proxy is refused (the proxy's own address is loopback, its client's is anywhere), and what a web
    page sends that its user visits: by DNS rebinding (its own name resolves to 127.0.0.1: the Host header gives it
    away) or across origins (the Origin or Sec-Fetch-Site header does).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(scope, Headers(scope=scope))
            if refusal is not None:
                await problem_response(refusal, Request(scope))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> AppError | None:
        found = next((name for name in headers if name.startswith("x-forwarded-") or name in _FORWARDED), None)
        if found is not None or not is_loopback((scope.get("client") or ("",))[0]):
            came = f"The header {found[:80]} says that it came through a proxy" if found else "It comes from elsewhere"
            detail = f"This service runs without API keys, for this machine alone. {came}."
            remedy = "Set ANNEAL_REQUIRE_KEYS=true and make a key: python -m app create-key --tenant NAME."
            return AppError("forwarded_request", "Forwarded request", 403, detail, remedy=remedy)
        hosts = headers.getlist("host")
        host = hosts[0] if len(hosts) == 1 else ""
        if not is_loopback(host):
            detail = "This service runs without API keys and answers only to this machine's own names."
            remedy = "Use http://127.0.0.1, or run the service with API keys."
            return AppError("wrong_host", "Misdirected request", 421, detail, remedy=remedy)
        if scope["method"] in _SAFE:
            return None
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit_host(origin) != host.lower()
        if foreign or headers.get("sec-fetch-site") == "cross-site":
            return AppError("cross_origin", "Cross-origin request", 403, "A page of another origin may not do this.")
        return None


def urlsplit_host(origin: str) -> str | None:
    """`host[:port]` of an Origin header; None for `null` and for what is no origin."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
