"""`/v1/engines`: delivered engines and their deployment bundles."""

from __future__ import annotations

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from app.artifacts.schemas import EngineOut, EnginePage
from app.db.orm import Engine
from app.http.deps import IdFilter, PageDep, ServicesDep, TenantId, path_id
from app.http.downloads import Download, download_response
from app.http.pagination import page_response
from app.http.problem import problems
from app.http.responses import DOWNLOAD_RESPONSES, HEAD_RESPONSES

router = APIRouter(prefix="/engines", tags=["engines"])

EngineId = Annotated[str, path_id("engine")]


@router.get("", response_model=EnginePage)
def list_engines(
    services: ServicesDep, tenant_id: TenantId, page: PageDep, job_id: IdFilter = None, model_id: IdFilter = None
) -> Response:
    """Delivered engines, newest first."""

    def fetch(limit: int, before: str | None) -> list[Engine]:
        return services.engines.page(tenant_id, limit=limit, before=before, job_id=job_id, model_id=model_id)

    return page_response(page, fetch, lambda row: EngineOut.of(row).model_dump_json().encode())


@router.get("/{engine_id}", response_model=EngineOut, responses=problems(404))
def get_engine(services: ServicesDep, tenant_id: TenantId, engine_id: EngineId) -> EngineOut:
    """One engine."""
    return EngineOut.of(services.engines.get(tenant_id, engine_id))


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
    request: Request, services: ServicesDep, tenant_id: TenantId, engine_id: EngineId
) -> Response:
    """The deployment bundle: the engine, its manifest and a script that runs it."""
    row = await anyio.to_thread.run_sync(services.engines.get, tenant_id, engine_id)
    file = Download(tenant_id, row.bundle_sha256, row.bundle_size_bytes, row.bundle_filename)
    return await download_response(request, services, file)
