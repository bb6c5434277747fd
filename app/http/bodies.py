"""The body of `POST /v1/models` and `/v1/datasets`: a raw file, a form with a file, or JSON with an upload session."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import anyio.to_thread
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from app.db.orm import Dataset, SourceModel
from app.errors import AppError
from app.http.middleware import too_large
from app.http.multipart import FormReader, boundary_of
from app.http.services import Services
from app.http.sink import FileSink, file_sink, incomplete_body
from app.library import FileLibrary, IncomingFile, clean_filename
from app.schemas import FromUpload

Row = TypeVar("Row", SourceModel, Dataset)

_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]*):\s*(?:;[^,]*)?(?=,|$)", re.IGNORECASE)
_FORM_OVERHEAD = 1 << 20

_FILE = {"type": "string", "format": "binary"}
BODY_DESCRIPTION: dict[str, Any] = {
    "required": True,
    "description": "The raw file (any content type), a form with `file` and `name`, or a completed upload session",
    "content": {
        "application/octet-stream": {"schema": _FILE},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": _FILE, "name": {"type": "string"}},
            }
        },
        "application/json": {"schema": FromUpload.model_json_schema()},
    },
}


async def create_from_request(
    request: Request,
    services: Services,
    library: FileLibrary[Row],
    tenant_id: str,
    *,
    name: str | None,
    filename: str | None,
    key: str | None,
) -> tuple[Row, bool]:
    """Receive the body, inspect and store it: (row, whether it was made now). Leaves nothing behind on a failure."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() == "application/json":
        body = await _read_json(request, services.settings.limits.json_bytes)
        return await services.creations.run(
            tenant_id, library.create_from_upload, tenant_id, body.name or name, body.upload_id, key
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        detail = "A body with a Content-Encoding is not taken."
        raise AppError("unsupported_encoding", "Unsupported", 415, detail, remedy="Send the file as it is.")
    form = content_type.partition(";")[0].strip().lower() == "multipart/form-data"
    limit = services.settings.limits.upload_bytes
    check_declared(request, limit + (_FORM_OVERHEAD if form else 0))
    room = await anyio.to_thread.run_sync(_room, request, library, tenant_id, form, key, limit)
    most = limit if room is None else min(limit, room)
    async with file_sink(services.settings.temp_dir, most, services.files) as sink:
        try:
            if form:
                reader = FormReader(boundary_of(content_type), sink)
                with_digest = _Hashed(request) if _declared_digests(request) else None
                await reader.read(with_digest.stream() if with_digest else body_stream(request))
                sha256 = await sink.finish()
                if with_digest:
                    verify_digest(request, with_digest.hexdigest())
                name = reader.fields.get("name", name)
                filename = reader.fields.get("filename") or reader.filename or filename
            else:
                sha256 = await receive(request, sink)
        except AppError as error:
            if error.code == "too_large" and most < limit:
                await anyio.to_thread.run_sync(_check_room, library, tenant_id, sink.size_bytes, None)
            raise
        services.metrics.uploaded.inc(sink.size_bytes)
        file = IncomingFile(sink.path, clean_filename(filename or name or "upload"), sha256, sink.size_bytes)
        return await services.creations.run(tenant_id, library.create, tenant_id, name, file, key)


def _room(
    request: Request, library: FileLibrary[Any], tenant_id: str, form: bool, key: str | None, limit: int
) -> int | None:
    """The most bytes that the file may have by the tenant's plan, None for any number; 413 before a byte is read, where
    its length says already that it has more, or there is room for none."""
    given, digest = request.headers.get("content-length", ""), None
    declared = int(given[:20]) if given.isdigit() else None
    exact = None if form else declared
    if not form:  # a form's digest is not its file's
        digest = next(iter(_declared_digests(request)), None)
    # What was sent before takes no further room; whose length alone is known is refused, unless it says so by a key.
    again = key is not None or exact is None
    wanted = limit if declared is None else declared
    most = library.most_bytes(tenant_id, sha256=digest, again=again, exact=exact, wanted=wanted)
    least = 1 if declared is None else max(declared - (_FORM_OVERHEAD if form else 0), 1)
    if most is not None and least > most:
        _check_room(library, tenant_id, least, digest)
        return None  # there has been room since
    return most


def _check_room(library: FileLibrary[Any], tenant_id: str, size_bytes: int, sha256: str | None) -> None:
    """413 where the tenant's plan has no room for so many bytes, of which some are yet to come."""
    try:
        library.check_room(tenant_id, size_bytes, sha256)
    except AppError as error:
        error.headers = {"Connection": "close"}  # what still comes would be taken for the next request
        raise


async def receive(request: Request, sink: FileSink) -> str:
    """The raw body into the sink, with its length and digest verified; the hex SHA-256."""
    async for chunk in body_stream(request):
        await sink.write(chunk)
    sha256 = await sink.finish()
    declared = request.headers.get("content-length")
    if declared is not None and declared != str(sink.size_bytes):
        raise incomplete_body(f"{declared} bytes were declared, {sink.size_bytes} came.")
    verify_digest(request, sha256)
    return sha256


async def body_stream(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:
            yield chunk


def check_declared(request: Request, limit: int) -> None:
    """413 before a byte is read, where the Content-Length says it already."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limit:
        error = too_large(limit)
        # What still comes would be taken for the next request.
        error.headers = {"Connection": "close"}
        raise error


def verify_digest(request: Request, sha256: str) -> None:
    """Compare with the sha-256 of Content-Digest and Repr-Digest (RFC 9530), where they are given."""
    for given in _declared_digests(request):
        if given != sha256:
            detail = f"The body's SHA-256 is {sha256}; the header declares {given}."
            raise AppError("digest_mismatch", "Wrong digest", 422, detail, remedy="Send the file again.")


def _declared_digests(request: Request) -> list[str]:
    """Hex SHA-256 of each digest header; other algorithms are passed over, as RFC 9530 wants it."""
    found = []
    for header in ("content-digest", "repr-digest"):
        value = ",".join(request.headers.getlist(header))
        for encoded in _DIGEST.findall(value):
            try:
                raw = base64.b64decode(encoded, validate=True)
            except binascii.Error:
                raw = b""
            if len(raw) != hashlib.sha256().digest_size:
                detail = f"The sha-256 in the header {header} is not one: 32 bytes in base64 between colons."
                raise AppError("invalid_digest", "Not a digest", 422, detail)
            found.append(raw.hex())
        if not found and "sha-256" in value.lower():
            detail = f"The header {header} is not of the form sha-256=:<base64>:."
            raise AppError("invalid_digest", "Not a digest", 422, detail)
    return found


class _Hashed:
    """The whole body of a form and its digest, which is not that of the file in it."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._hash = hashlib.sha256()

    async def stream(self) -> AsyncIterator[bytes]:
        async for chunk in body_stream(self._request):
            self._hash.update(chunk)
            yield chunk

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


async def _read_json(request: Request, limit: int) -> FromUpload:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large(limit)
    except ClientDisconnect:
        raise incomplete_body("The connection ended before the body did.") from None
    try:
        return FromUpload.model_validate_json(bytes(body))
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from None
