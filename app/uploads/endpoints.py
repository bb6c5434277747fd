"""`/v1/uploads`: large files in parts."""

from __future__ import annotations

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Path, Request, Response

from app.db.orm import Upload
from app.http.bodies import check_declared, receive
from app.http.deps import IdempotencyKeyHeader, ServicesDep, TenantId, path_id
from app.http.problem import problems
from app.http.responses import created
from app.http.services import Services
from app.http.sink import file_sink
from app.uploads.schemas import PartOut, UploadIn, UploadOut
from app.uploads.service import part_size_mismatch

router = APIRouter(prefix="/uploads", tags=["uploads"])

UploadId = Annotated[str, path_id("upload")]
_PART_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("", status_code=201, response_model=UploadOut, responses=problems(400, 409, 413, 507))
def create_upload(
    body: UploadIn, services: ServicesDep, tenant_id: TenantId, key: IdempotencyKeyHeader = None
) -> Response:
    """Open an upload session: the part size and where to PUT the parts (in parallel, repeated, in any order)."""
    row, new = services.uploads.create(tenant_id, body.filename, body.size_bytes, body.sha256, key)
    return created(_out(services, row), new)


@router.get("/{upload_id}", response_model=UploadOut, responses=problems(404))
def get_upload(services: ServicesDep, tenant_id: TenantId, upload_id: UploadId) -> UploadOut:
    """The session with the parts that have arrived and fresh URLs."""
    return _out(services, services.uploads.get(tenant_id, upload_id))


@router.put(
    "/{upload_id}/parts/{number}",
    response_model=PartOut,
    responses=problems(400, 404, 409, 413, 507),
    openapi_extra=_PART_BODY,
)
async def put_part(
    request: Request,
    services: ServicesDep,
    tenant_id: TenantId,
    upload_id: UploadId,
    number: Annotated[int, Path(ge=1, le=10_000)],
) -> PartOut:
    """Send one part; sent again, it replaces the earlier one. Its size must be exact."""
    expected = await anyio.to_thread.run_sync(services.uploads.expected_size, tenant_id, upload_id, number)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) != expected:
        error = part_size_mismatch(number, expected, int(declared[:20]))
        error.headers = {"Connection": "close"}  # the body is not read
        raise error
    check_declared(request, expected)
    # A little more than expected is let in, so that a longer body is told its own error.
    async with file_sink(services.settings.temp_dir, expected + (4 << 20), services.files) as sink:
        await receive(request, sink)
        part = await anyio.to_thread.run_sync(
            services.uploads.put_part,
            tenant_id,
            upload_id,
            number,
            sink.path,
            sink.size_bytes,
            limiter=services.files,
        )
        services.metrics.uploaded.inc(sink.size_bytes)
        return PartOut(number=part.number, size_bytes=part.size_bytes)


@router.post("/{upload_id}/complete", response_model=UploadOut, responses=problems(404, 409, 413, 507))
async def complete_upload(services: ServicesDep, tenant_id: TenantId, upload_id: UploadId) -> UploadOut:
    """Join the parts and check size and digest. May be repeated."""
    row = await anyio.to_thread.run_sync(services.uploads.complete, tenant_id, upload_id, limiter=services.files)
    return UploadOut.of(row, [], [])


@router.delete("/{upload_id}", status_code=204, responses=problems(404, 413, 507))
def abort_upload(services: ServicesDep, tenant_id: TenantId, upload_id: UploadId) -> None:
    """Forget the session and its bytes; what became a model or a data set stays."""
    services.uploads.abort(tenant_id, upload_id)


def _out(services: Services, row: Upload) -> UploadOut:
    return UploadOut.of(row, services.uploads.part_urls(row), services.uploads.received(row))
