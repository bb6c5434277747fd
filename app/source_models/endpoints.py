"""`/v1/models`: uploaded ML models."""

from __future__ import annotations

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from app.compatibility.schemas import CompatibilityOut
from app.db.orm import SourceModel
from app.http.bodies import BODY_DESCRIPTION, create_from_request
from app.http.deps import (
    GivenFilename,
    GivenName,
    IdempotencyKeyHeader,
    NameFilter,
    PageDep,
    ServicesDep,
    TenantId,
    path_id,
)
from app.http.downloads import Download, download_response
from app.http.pagination import page_response
from app.http.problem import problems
from app.http.responses import DOWNLOAD_RESPONSES, HEAD_RESPONSES, created
from app.source_models.schemas import ModelOut, ModelPage

router = APIRouter(prefix="/models", tags=["models"])

_RETRY_S = "2"

ModelId = Annotated[str, path_id("model")]


@router.post(
    "",
    status_code=201,
    response_model=ModelOut,
    responses=problems(400, 404, 409, 413, 415, 507),
    openapi_extra={"requestBody": BODY_DESCRIPTION},
)
async def create_model(
    request: Request,
    services: ServicesDep,
    tenant_id: TenantId,
    key: IdempotencyKeyHeader = None,
    name: GivenName = None,
    filename: GivenFilename = None,
) -> Response:
    """Upload a model: `.onnx`, a `.zip`/`.tar` of one `.onnx` and its external data, or `.pt2`."""
    row, new = await create_from_request(
        request, services, services.models, tenant_id, name=name, filename=filename, key=key
    )
    policy = await anyio.to_thread.run_sync(services.policies.of, tenant_id)
    return created(ModelOut.of(row, policy), new)


@router.get("", response_model=ModelPage)
def list_models(services: ServicesDep, tenant_id: TenantId, page: PageDep, name: NameFilter = None) -> Response:
    """Uploaded models, newest first."""

    def fetch(limit: int, before: str | None) -> list[SourceModel]:
        return services.models.page(tenant_id, limit=limit, before=before, name=name)

    policy = services.policies.of(tenant_id)
    return page_response(page, fetch, lambda row: ModelOut.of(row, policy).model_dump_json().encode())


@router.get("/{model_id}", response_model=ModelOut, responses=problems(404))
def get_model(services: ServicesDep, tenant_id: TenantId, model_id: ModelId) -> ModelOut:
    """One model."""
    return ModelOut.of(services.models.get(tenant_id, model_id), services.policies.of(tenant_id))


@router.head("/{model_id}/download", response_class=Response, responses=HEAD_RESPONSES)
@router.get("/{model_id}/download", response_class=Response, responses=DOWNLOAD_RESPONSES)
async def download_model(request: Request, services: ServicesDep, tenant_id: TenantId, model_id: ModelId) -> Response:
    """The file as it was uploaded."""
    row = await anyio.to_thread.run_sync(services.models.get, tenant_id, model_id)
    return await download_response(request, services, Download(tenant_id, row.sha256, row.size_bytes, row.filename))


@router.get(
    "/{model_id}/compatibility",
    response_model=CompatibilityOut,
    responses={202: {"description": "Not every backend has answered yet", "model": CompatibilityOut}, **problems(404)},
)
def get_compatibility(services: ServicesDep, tenant_id: TenantId, model_id: ModelId) -> Response:
    """Which backends take this model: the nodes that each refuses, the precisions that the graph admits, what to
    change. The first call asks; idle workers answer within seconds, and their answers stay."""
    model = services.models.get(tenant_id, model_id)
    found = CompatibilityOut.of(model_id, services.compatibility.ask(model))
    body = found.model_dump_json()
    if found.status == "complete":
        return Response(body, media_type="application/json")
    return Response(body, 202, {"Retry-After": _RETRY_S}, "application/json")


@router.delete("/{model_id}", status_code=204, responses=problems(404, 409, 413, 507))
async def delete_model(services: ServicesDep, tenant_id: TenantId, model_id: ModelId) -> None:
    """Delete a model that no queued or running job uses. Engines made of it stay."""
    await services.storage.run(tenant_id, services.models.delete, tenant_id, model_id)
