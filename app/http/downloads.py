"""A stored file as a response: conditional and range requests (RFC 9110), redirects where the storage serves itself."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import BinaryIO

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from app.blobs.content import blob_key
from app.errors import AppError
from app.http.services import Services
from app.names import content_disposition

_CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


@dataclass(frozen=True)
class Download:
    """A tenant's blob under a file name; or what is made of one, whose bytes then have this digest and size."""

    tenant_id: str
    sha256: str
    size_bytes: int
    filename: str
    media_type: str = "application/octet-stream"
    # Opens `length` bytes from `start` on of what is made of a stored file while it is sent; None: the stored file.
    opened: Callable[[int, int], BinaryIO] | None = None


async def download_response(request: Request, services: Services, file: Download) -> Response:
    """The file, a part of it (206), 304, 416, or a redirect to the storage (307)."""
    etag = f'"{file.sha256}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache", "Accept-Ranges": "bytes"}
    if etag_matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(bytes.fromhex(file.sha256)).decode()}:"
    store, key = services.content.store, blob_key(file.tenant_id, file.sha256)
    if request.method == "GET" and file.opened is None and store.local_path(key) is None:
        seconds = services.settings.storage.presign_seconds
        url = await services.storage.run(
            file.tenant_id, lambda: store.presigned_get(key, filename=file.filename, expires_s=seconds)
        )
        if url is not None:
            return RedirectResponse(url, 307, {**headers, "Cache-Control": "no-store"})
    start, length, status = 0, file.size_bytes, 200
    wanted = request.headers.get("range") if request.method == "GET" else None  # defined for GET only: RFC 9110 14.2
    if wanted is not None and request.headers.get("if-range", etag) == etag:
        found = parse_range(wanted, file.size_bytes)
        if found is not None:
            start, length = found
            status = 206
            headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{file.size_bytes}"
    headers["Content-Length"] = str(length)
    headers["Content-Disposition"] = content_disposition(file.filename)
    if request.method == "HEAD":
        return Response(None, status, headers, file.media_type)
    # Opened before the first byte of the answer, so that a missing file is still an error document.
    opened = file.opened or (lambda start, length: store.open(key, start, length))
    stream = await anyio.to_thread.run_sync(opened, start, length, limiter=services.files)
    return StreamingResponse(_chunks(stream, length, services), status, headers, file.media_type)


async def _chunks(stream: BinaryIO, length: int, services: Services) -> AsyncIterator[bytes]:
    try:
        while length > 0:
            chunk = await anyio.to_thread.run_sync(stream.read, min(_CHUNK, length), limiter=services.files)
            if not chunk:
                raise RuntimeError("a stored file is shorter than its row says")
            length -= len(chunk)
            yield chunk
    finally:
        stream.close()


def etag_matches(header: str | None, etag: str) -> bool:
    """Whether If-None-Match names this ETag (weak comparison, as RFC 9110 13.1.2 wants it)."""
    if header is None:
        return False
    if header.strip() == "*":
        return True
    return any(tag.strip().removeprefix("W/") == etag for tag in header.split(","))


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """(start, length) of a single byte range. None for what is to be ignored: another unit, a malformed one, several
    ranges (a server may answer those with the whole). Raises 416 where no byte of the file lies in it."""
    match = _RANGE.fullmatch(header.strip().replace(" ", ""))
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first == "":
        start, end = max(0, size - int(last)), size
        satisfiable = int(last) > 0 and size > 0
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return None
        satisfiable = start < size
    if not satisfiable:
        detail = f"The file has {size} bytes; no byte of it lies in {header[:80]!r}."
        headers = {"Content-Range": f"bytes */{size}"}
        raise AppError("range_not_satisfiable", "Range not satisfiable", 416, detail, headers=headers)
    return start, end - start
