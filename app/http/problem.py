"""Every error as `application/problem+json` (RFC 9457), those of the framework and of the database too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import ErrorDetails
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app.errors import AppError, FieldError, invalid_request, storage_full
from app.http.fields import unknown_field
from app.storage.base import BlobNotFound

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
_FRAMEWORK = {
    400: ("bad_request", "The request cannot be read"),
    404: ("not_found", "Not found"),
    405: ("method_not_allowed", "Method not allowed"),
    413: ("too_large", "Too large"),
}
_TITLES = {
    400: "The request cannot be read, or its body is incomplete",
    401: "No key or token, or one that is not valid",
    403: "Refused: the role or the tenant's plan does not allow it, the token names no tenant or role, the tenant is "
    "switched off, or the request is not from this service's own pages",
    404: "No such resource for this tenant",
    409: "In conflict with the state of a resource, or with an earlier request of the same Idempotency-Key",
    413: "Larger than the limit",
    415: "A body of this type is not taken",
    416: "No byte of the file lies in this range",
    421: "The Host header does not name this service",
    422: "The request or the uploaded file is not valid",
    429: "Too many",
    500: "A fault of the service; the log has it under the X-Request-ID",
    503: "A part that the service needs cannot be reached; try again",
    507: "No space left",
}
_MAX_ERRORS = 50
_PARTS = re.compile(r"(\{[^}]*\})")


class ProblemError(BaseModel):
    """One invalid field: JSON pointer (`/body/shapes/input/min`) and what is wrong with it."""

    pointer: str
    message: str


class Problem(BaseModel):
    """An error as RFC 9457 describes it. `code` is stable; texts may change. Further members may follow."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:anneal:problem:not_found"])
    title: str
    status: int
    detail: str
    instance: str = Field(description="Path of the request")
    code: str = Field(description="Stable, snake_case", examples=["not_found"])
    request_id: str | None = None
    retryable: bool = Field(default=False, description="The same request may succeed later")
    stage: str | None = None
    node: str | None = None
    tensor: str | None = None
    remedy: str | None = None
    errors: list[ProblemError] | None = None


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route for these error statuses."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": _TITLES[status], "content": {MEDIA_TYPE: {"schema": schema}}} for status in statuses
    }


def problem_body(error: AppError, instance: str, request_id: str | None) -> bytes:
    document: dict[str, Any] = {"type": f"urn:anneal:problem:{error.code}", "status": error.status}
    document.update(error.members())
    document["instance"] = instance
    document["retryable"] = error.retryable
    if request_id is not None:
        document["request_id"] = request_id
    # ASCII: names from a user's file may hold what UTF-8 cannot carry (lone surrogates)
    return json.dumps(document, default=str).encode()


def problem_response(error: AppError, request: Request) -> Response:
    headers: dict[str, str] = {"Cache-Control": "no-store", **error.headers}
    if error.status == 401:
        headers.setdefault("WWW-Authenticate", 'Bearer realm="anneal"')
    if error.retryable and error.status == 503:
        headers.setdefault("Retry-After", "2")
    request_id = request.scope.get("anneal.request_id")
    body = problem_body(error, request.scope.get("path", ""), request_id)
    return Response(body, error.status, headers, MEDIA_TYPE)


def prefers_html(accept: str) -> bool:
    """Whether an Accept header names HTML before JSON, as browsers do."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    if "text/html" not in kinds:
        return False
    return "application/json" not in kinds or kinds.index("text/html") < kinds.index("application/json")


def install_handlers(app: FastAPI) -> None:
    app.add_exception_handler(AppError, _on_app_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(SQLAlchemyError, _on_database_error)
    app.add_exception_handler(BlobNotFound, _on_blob_not_found)


def field_errors(errors: Sequence[ErrorDetails] | Sequence[Mapping[str, Any]], body: Any = None) -> list[FieldError]:
    """pydantic's errors as JSON pointers and messages; what the client sent is not repeated to it. `body`: the type of
    the request's body, whose fields are named where one is unknown."""
    found = []
    for error in errors[:_MAX_ERRORS]:
        steps = (str(step).replace("~", "~0").replace("/", "~1")[:200] for step in error["loc"])
        message = str(error["msg"])
        if error["type"] == "json_invalid":
            message = f"this is no JSON: {error.get('ctx', {}).get('error', 'it ends too early')}"
        if error["type"] == "extra_forbidden" and body is not None:
            message = unknown_field(body, error["loc"][1:])
        found.append(FieldError("/" + "/".join(steps), message[:1000]))
    return found


async def _on_app_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AppError)
    if error.status >= 500:
        log.warning("request_failed", code=error.code, detail=error.detail)
    return problem_response(error, request)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fields = field_errors(error.errors(), _body_type(request))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if any(field.pointer == "/body" for field in fields) and not kind.endswith("json"):
        told = "send it as JSON, with the header Content-Type: application/json (`curl --json '{…}'`)"
        fields = [FieldError("/body", told) if field.pointer == "/body" else field for field in fields]
    detail = "; ".join(f"{e.pointer}: {e.message}" for e in fields[:3]) or "The request is not valid."
    return problem_response(invalid_request(detail, fields), request)


def _body_type(request: Request) -> Any:
    """What FastAPI reads the body of this request into; None where it reads none."""
    field = getattr(request.scope.get("route"), "body_field", None)
    return None if field is None else field.field_info.annotation


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code, title = _FRAMEWORK.get(error.status_code, ("http_error", "The request failed"))
    detail = str(error.detail)
    if error.status_code == 404 and detail == "Not Found":
        detail = "There is nothing at this path."
    headers = dict(error.headers or {})
    if error.status_code == 405:
        detail = f"{request.method} is not possible here."
        headers["Allow"] = ", ".join(allowed_methods(request.app, request.url.path))
    failure = AppError(code, title, error.status_code, detail, headers=headers)
    page = getattr(request.app.state, "error_page", None)  # of the pages, for who came by a browser
    if page is not None and not request.url.path.startswith("/v1") and prefers_html(request.headers.get("accept", "")):
        return cast(Response, page(request, failure))
    return problem_response(failure, request)


async def _on_database_error(request: Request, error: Exception) -> Response:
    log.error("database_error", exc_info=error)
    return problem_response(database_problem(error), request)


def database_problem(error: Exception) -> AppError:
    """What a client sees of a failure of the database: no statement, no parameters."""
    text = str(getattr(error, "orig", "")).lower()
    if "disk is full" in text or "no space left" in text or "disk full" in text:
        return storage_full()
    if isinstance(error, PoolTimeout) or (isinstance(error, DBAPIError) and type(error).__name__ == "OperationalError"):
        detail = "The database cannot be reached or is overloaded."
        return AppError("database_unavailable", "Database unavailable", 503, detail, retryable=True)
    return internal_error()


def internal_error() -> AppError:
    detail = "A fault of the service. It is logged under this request's X-Request-ID."
    return AppError("internal_error", "Internal error", 500, detail)


async def _on_blob_not_found(request: Request, error: Exception) -> Response:
    log.error("blob_missing", exc_info=error)
    missing = AppError("content_missing", "The content is gone", 503, "The storage does not hold this file.")
    return problem_response(missing, request)


def allowed_methods(app: FastAPI, path: str) -> list[str]:
    """The methods that this path takes; the router itself names those of the first route only (RFC 9110 15.5.6)."""
    found: set[str] = set()
    for template, methods in app.openapi()["paths"].items():
        pattern = "".join("[^/]+" if part.startswith("{") else re.escape(part) for part in _PARTS.split(template))
        if re.fullmatch(pattern, path):
            found.update(method.upper() for method in methods)
    for route in getattr(app.state, "pages", ()):  # they stand in no document
        if route.path_regex.fullmatch(path):
            found.update(route.methods)
    return sorted(found)
