"""`/v1/uploads`: large files in parts."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Path, Query, Request, Response

from app.db.base import utcnow
from app.db.orm import Upload
from app.domain.upload_state import UploadState
from app.http.bodies import check_declared, receive
from app.http.deps import IdempotencyKeyHeader, ServicesDep, TenantId, path_id
from app.http.problem import problems
from app.http.responses import created
from app.http.services import Services
from app.http.sink import file_sink
from app.uploads.parts import MAX_PARTS, part_bytes, part_size_mismatch
from app.uploads.schemas import PartOut, PartUrl, UploadIn, UploadOut

router = APIRouter(prefix="/uploads", tags=["uploads"])

UploadId = Annotated[str, path_id("upload")]
PartNumber = Annotated[int, Path(ge=1, le=MAX_PARTS)]
WithUrls = Annotated[
    bool, Query(description="false: without `part_urls`, to be asked for one by one when they are needed")
]
_PART_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_RETRY_S = 1


@router.post("", status_code=201, response_model=UploadOut, responses=problems(400, 409, 413, 507))
async def create_upload(
    body: UploadIn,
    services: ServicesDep,
    tenant_id: TenantId,
    key: IdempotencyKeyHeader = None,
    part_urls: WithUrls = True,
) -> Response:
    """Open an upload session: the part size and where to PUT the parts (in parallel, repeated, in any order)."""

    def create() -> tuple[UploadOut, bool]:
        row, new = services.uploads.create(tenant_id, body.filename, body.size_bytes, body.sha256, key)
        return _out(services, row, part_urls), new

    return created(*await services.storage.run(tenant_id, create))


@router.get("/{upload_id}", response_model=UploadOut, responses=problems(404))
async def get_upload(
    services: ServicesDep, tenant_id: TenantId, upload_id: UploadId, part_urls: WithUrls = True
) -> UploadOut:
    """The session with the parts that have arrived and fresh URLs. A completion that was left (the process died) goes
    on when it is asked for."""
    row = await anyio.to_thread.run_sync(services.uploads.get, tenant_id, upload_id)
    lease = row.lease_expires_at
    if row.status == UploadState.COMPLETING and (lease is None or lease < utcnow()):
        _start_completion(services, tenant_id, upload_id)
    return await services.storage.run(tenant_id, _out, services, row, part_urls)


@router.get("/{upload_id}/parts/{number}", response_model=PartUrl, responses=problems(404, 409))
async def get_part_url(services: ServicesDep, tenant_id: TenantId, upload_id: UploadId, number: PartNumber) -> PartUrl:
    """Where to PUT this part, and how many bytes it has: a URL that is signed now."""

    def sign() -> PartUrl:
        row = services.uploads.open_session(tenant_id, upload_id)
        size_bytes = part_bytes(row, number)
        return PartUrl(number=number, size_bytes=size_bytes, url=services.uploads.part_url(row, number))

    return await services.storage.run(tenant_id, sign)


@router.put(
    "/{upload_id}/parts/{number}",
    response_model=PartOut,
    responses=problems(400, 404, 409, 413, 507),
    openapi_extra=_PART_BODY,
)
async def put_part(
    request: Request, services: ServicesDep, tenant_id: TenantId, upload_id: UploadId, number: PartNumber
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
        part = await services.storage.run(
            tenant_id, services.uploads.put_part, tenant_id, upload_id, number, sink.path, sink.size_bytes
        )
        services.metrics.uploaded.inc(sink.size_bytes)
        return PartOut(number=part.number, size_bytes=part.size_bytes)


@router.post(
    "/{upload_id}/complete",
    response_model=UploadOut,
    responses={
        202: {"model": UploadOut, "description": "It takes long: GET the session until it is no longer `completing`"},
        **problems(404, 409, 413, 507),
    },
)
async def complete_upload(services: ServicesDep, tenant_id: TenantId, upload_id: UploadId) -> Response:
    """Join the parts and check size and digest. May be repeated at any time; it goes on where one stopped."""
    running = _start_completion(services, tenant_id, upload_id)
    done, _ = await asyncio.wait({running}, timeout=services.settings.limits.complete_wait_s)
    row = running.result() if done else await anyio.to_thread.run_sync(services.uploads.outcome, tenant_id, upload_id)
    body = UploadOut.of(row, [], []).model_dump_json()
    if row.status in (UploadState.OPEN, UploadState.COMPLETING):
        return Response(body, 202, {"Retry-After": str(_RETRY_S)}, "application/json")
    return Response(body, media_type="application/json")


@router.delete("/{upload_id}", status_code=204, responses=problems(404, 413, 507))
async def abort_upload(services: ServicesDep, tenant_id: TenantId, upload_id: UploadId) -> None:
    """Forget the session and its bytes; what became a model or a data set stays."""
    await services.storage.run(tenant_id, services.uploads.abort, tenant_id, upload_id)


def _start_completion(services: Services, tenant_id: str, upload_id: str) -> asyncio.Task[Upload]:
    """One at a time in this process, and it goes on when its client has gone; the lease sees to other processes."""
    key = ("complete", tenant_id, upload_id)
    complete = services.uploads.complete
    return services.reads.start(key, lambda: services.creations.run(tenant_id, complete, tenant_id, upload_id))


def _out(services: Services, row: Upload, with_urls: bool) -> UploadOut:
    urls = services.uploads.part_urls(row) if with_urls else []
    return UploadOut.of(row, urls, services.uploads.received(row))
