"""`/v1/datasets`: calibration and validation data."""

from __future__ import annotations

from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from app.datasets.schemas import DatasetOut, DatasetPage
from app.db.orm import Dataset
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

router = APIRouter(prefix="/datasets", tags=["datasets"])

DatasetId = Annotated[str, path_id("data set")]


@router.post(
    "",
    status_code=201,
    response_model=DatasetOut,
    responses=problems(400, 404, 409, 413, 415, 507),
    openapi_extra={"requestBody": BODY_DESCRIPTION},
)
async def create_dataset(
    request: Request,
    services: ServicesDep,
    tenant_id: TenantId,
    key: IdempotencyKeyHeader = None,
    name: GivenName = None,
    filename: GivenFilename = None,
) -> Response:
    """Upload a data set: `.npz` (arrays named by the model's inputs, first axis = samples), or an archive of such."""
    row, new = await create_from_request(
        request, services, services.datasets, tenant_id, name=name, filename=filename, key=key
    )
    policy = await anyio.to_thread.run_sync(services.policies.of, tenant_id)
    return created(DatasetOut.of(row, policy), new)


@router.get("", response_model=DatasetPage)
def list_datasets(services: ServicesDep, tenant_id: TenantId, page: PageDep, name: NameFilter = None) -> Response:
    """Uploaded data sets, newest first."""

    def fetch(limit: int, before: str | None) -> list[Dataset]:
        return services.datasets.page(tenant_id, limit=limit, before=before, name=name)

    policy = services.policies.of(tenant_id)
    return page_response(page, fetch, lambda row: DatasetOut.of(row, policy).model_dump_json().encode())


@router.get("/{dataset_id}", response_model=DatasetOut, responses=problems(404))
def get_dataset(services: ServicesDep, tenant_id: TenantId, dataset_id: DatasetId) -> DatasetOut:
    """One data set."""
    return DatasetOut.of(services.datasets.get(tenant_id, dataset_id), services.policies.of(tenant_id))


@router.head("/{dataset_id}/download", response_class=Response, responses=HEAD_RESPONSES)
@router.get("/{dataset_id}/download", response_class=Response, responses=DOWNLOAD_RESPONSES)
async def download_dataset(
    request: Request, services: ServicesDep, tenant_id: TenantId, dataset_id: DatasetId
) -> Response:
    """The file as it was uploaded."""
    row = await anyio.to_thread.run_sync(services.datasets.get, tenant_id, dataset_id)
    return await download_response(request, services, Download(tenant_id, row.sha256, row.size_bytes, row.filename))


@router.delete("/{dataset_id}", status_code=204, responses=problems(404, 409, 413, 507))
async def delete_dataset(services: ServicesDep, tenant_id: TenantId, dataset_id: DatasetId) -> None:
    """Delete a data set that no queued or running job uses."""
    await services.storage.run(tenant_id, services.datasets.delete, tenant_id, dataset_id)
