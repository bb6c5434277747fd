"""Responses that several routes give."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from app.http.problem import problems
from app.schemas import Resource

_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
DOWNLOAD_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file", "content": _BYTES},
    206: {"description": "The part of it that Range asks for", "content": _BYTES},
    304: {"description": "The ETag in If-None-Match is still the current one"},
    307: {"description": "Where the storage serves it itself (S3, presigned)"},
    **problems(404, 416),
}
HEAD_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The headers of the whole file"},
    304: DOWNLOAD_RESPONSES[304],
    **problems(404),
}


def created(resource: Resource, new: bool, status: int = 201) -> Response:
    """The new resource with its Location. One that an earlier request of the same Idempotency-Key made looks the
    same, but for the header `Idempotency-Replayed`."""
    headers = {"Location": resource.links["self"]}
    if not new:
        headers["Idempotency-Replayed"] = "true"
    return Response(resource.model_dump_json(), status, headers, "application/json")
