"""`/v1/engines`: delivered engines and their deployment bundles."""

from __future__ import annotations

import io
from typing import Annotated, BinaryIO, cast

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from app.artifacts.kinds import PYTHON, BundleKind, Joined, KindMissing, Stored, rearranged
from app.artifacts.schemas import EngineOut, EnginePage
from app.blobs.content import blob_key
from app.db.orm import Engine
from app.errors import AppError
from app.http.deps import IdFilter, PageDep, ServicesDep, TenantId, path_id
from app.http.downloads import Download, download_response
from app.http.pagination import page_response
from app.http.problem import problems
from app.http.responses import DOWNLOAD_RESPONSES, HEAD_RESPONSES
from app.http.services import Services

router = APIRouter(prefix="/engines", tags=["engines"])

EngineId = Annotated[str, path_id("engine")]
KindQuery = Annotated[BundleKind, Query(description="What it is to be served with")]

_BUFFER = 64 << 10  # bytes that one read of the stored bundle asks for
_PYTHON_ALWAYS = "Every engine has the kind `python`."


@router.get("", response_model=EnginePage)
def list_engines(
    services: ServicesDep, tenant_id: TenantId, page: PageDep, job_id: IdFilter = None, model_id: IdFilter = None
) -> Response:
    """Delivered engines, newest first."""

    def fetch(limit: int, before: str | None) -> list[Engine]:
        return services.engines.page(tenant_id, limit=limit, before=before, job_id=job_id, model_id=model_id)

    policy = services.policies.of(tenant_id)
    return page_response(page, fetch, lambda row: EngineOut.of(row, policy).model_dump_json().encode())


@router.get("/{engine_id}", response_model=EngineOut, responses=problems(404))
def get_engine(services: ServicesDep, tenant_id: TenantId, engine_id: EngineId) -> EngineOut:
    """One engine."""
    return EngineOut.of(services.engines.get(tenant_id, engine_id), services.policies.of(tenant_id))


@router.head("/{engine_id}/download", response_class=Response, responses=HEAD_RESPONSES)
@router.get("/{engine_id}/download", response_class=Response, responses=DOWNLOAD_RESPONSES)
async def download_engine(
    request: Request, services: ServicesDep, tenant_id: TenantId, engine_id: EngineId
) -> Response:
    """The engine's bytes; the ETag is their SHA-256."""
    row = await anyio.to_thread.run_sync(services.engines.get, tenant_id, engine_id)
    return await download_response(request, services, Download(tenant_id, row.sha256, row.size_bytes, row.filename))


@router.head("/{engine_id}/bundle", response_class=Response, responses=HEAD_RESPONSES)
@router.get("/{engine_id}/bundle", response_class=Response, responses=DOWNLOAD_RESPONSES)
async def download_bundle(
    request: Request, services: ServicesDep, tenant_id: TenantId, engine_id: EngineId, kind: KindQuery = PYTHON
) -> Response:
    """The deployment bundle. `python`: a .zip with the engine, its manifest and the scripts that run and serve it.
    `triton`: a .tar that is a model repository of Triton. `kserve`: a .tar with the manifests for Kubernetes, beside
    what its image is built from."""
    row = await anyio.to_thread.run_sync(services.engines.get, tenant_id, engine_id)
    file = Download(tenant_id, row.bundle_sha256, row.bundle_size_bytes, row.bundle_filename)
    if kind != PYTHON:
        file = await anyio.to_thread.run_sync(_kind, services, file, kind, limiter=services.files)
    return await download_response(request, services, file)


@router.delete("/{engine_id}", status_code=204, responses=problems(404, 413, 507))
async def delete_engine(services: ServicesDep, tenant_id: TenantId, engine_id: EngineId) -> None:
    """Delete an engine and its bundle. Its job and the report stay; the job names it no more."""
    await services.storage.run(tenant_id, services.engines.delete, tenant_id, engine_id)


def _kind(services: Services, bundle: Download, kind: BundleKind) -> Download:
    """The bundle in another order. Raises 404 (`bundle_kind_missing`) where it has no such kind."""
    key = blob_key(bundle.tenant_id, bundle.sha256)

    def opened(start: int, length: int | None) -> BinaryIO:
        return services.content.store.open(key, start, length)

    try:
        with io.BufferedReader(Stored(opened, bundle.size_bytes), _BUFFER) as file:
            found = rearranged(file, kind)
    except KindMissing as missing:
        detail = f"The engine has no {kind} bundle: {missing}"
        raise AppError("bundle_kind_missing", "No such bundle", 404, detail, remedy=_PYTHON_ALWAYS) from missing
    return Download(
        bundle.tenant_id,
        found.sha256,
        found.size_bytes,
        f"{bundle.filename.removesuffix('.zip').removesuffix('-bundle')}-{kind}.tar",
        "application/x-tar",
        lambda start, length: cast("BinaryIO", Joined(found.pieces, opened, start, length)),
    )
