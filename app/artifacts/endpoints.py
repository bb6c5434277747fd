"""`/v1/engines`: delivered engines and their deployment bundles."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Annotated, Any, BinaryIO, cast

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from app.artifacts.ensembles import NotChained, ensemble
from app.artifacts.kinds import PYTHON, BundleKind, Joined, KindMissing, Opener, Rearranged, Stored, rearranged
from app.artifacts.schemas import EngineOut, EnginePage
from app.blobs.content import blob_key
from app.db.orm import Engine
from app.errors import AppError, FieldError, conflict, invalid_request
from app.http.deps import IdFilter, PageDep, ServicesDep, TenantId, path_id
from app.http.downloads import Download, download_response
from app.http.pagination import page_response
from app.http.problem import problems
from app.http.responses import DOWNLOAD_RESPONSES, HEAD_RESPONSES
from app.http.services import Services

router = APIRouter(prefix="/engines", tags=["engines"])

_MOST_JOINTS = 100

EngineId = Annotated[str, path_id("engine")]
KindQuery = Annotated[BundleKind, Query(description="What it is to be served with")]
ConnectQuery = Annotated[
    list[str],
    Query(
        max_length=_MOST_JOINTS,
        description="With `then`: `output:input`, as often as needed; without, by equal names or the only ones",
    ),
]

_TAR = "application/x-tar"
_BUFFER = 64 << 10  # bytes that one read of the stored bundle asks for
# The bundle of kind `python` as it is stored; of the others a .tar that is made while it is sent.
_BUNDLE_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {**told, "content": {**told["content"], _TAR: {"schema": {"type": "string", "format": "binary"}}}}
    if status in (200, 206)
    else told
    for status, told in DOWNLOAD_RESPONSES.items()
}
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
@router.get("/{engine_id}/bundle", response_class=Response, responses=_BUNDLE_RESPONSES | problems(409))
async def download_bundle(  # the query's parameters
    request: Request,
    services: ServicesDep,
    tenant_id: TenantId,
    engine_id: EngineId,
    kind: KindQuery = PYTHON,
    then: IdFilter = None,
    connect: ConnectQuery = [],  # noqa: B006  # read only
) -> Response:
    """The deployment bundle. `python`: a .zip with the engine, its manifest and the scripts that run and serve it.
    `triton`: a .tar that is a model repository of Triton; with `then` it holds that engine too, and an ensemble of
    both (`connect`: what goes where). `kserve`: a .tar with the manifests for Kubernetes, beside what its image is
    built from."""
    row = await anyio.to_thread.run_sync(services.engines.get, tenant_id, engine_id)
    if then is not None:
        if kind != "triton":
            message = "only the kind `triton` holds two engines"
            raise invalid_request(f"then: {message}", [FieldError("/query/then", message)])
        second = await anyio.to_thread.run_sync(services.engines.get, tenant_id, then)
        rows = (row, second)
        file = await anyio.to_thread.run_sync(_ensemble, services, rows, tuple(connect), limiter=services.files)
        return await download_response(request, services, file)
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
    opened = _opener(services, bundle.tenant_id, bundle.sha256)
    try:
        with io.BufferedReader(Stored(opened, bundle.size_bytes), _BUFFER) as file:
            found = rearranged(file, kind)
    except KindMissing as missing:
        raise _missing(kind, missing) from missing
    return _sent(bundle.tenant_id, found, f"{_stem(bundle.filename)}-{kind}.tar", [opened])


def _ensemble(services: Services, rows: tuple[Engine, Engine], connect: tuple[str, ...]) -> Download:
    """Both engines and their ensemble. Raises 404 (`bundle_kind_missing`) where one has no kind `triton`, 409
    (`engines_do_not_fit`)."""
    tenant_id = rows[0].tenant_id
    opened = [_opener(services, tenant_id, row.bundle_sha256) for row in rows]
    known = (rows[0].bundle_sha256, rows[1].bundle_sha256, connect)
    try:
        with ExitStack() as stack:
            first, second = (
                stack.enter_context(io.BufferedReader(Stored(one, row.bundle_size_bytes), _BUFFER))
                for one, row in zip(opened, rows, strict=True)
            )
            found = services.engines.chains.of(known, lambda: ensemble(first, second, connect))
    except KindMissing as missing:
        raise _missing("triton", missing) from missing
    except NotChained as unfit:
        remedy = "Connect them by `connect=output:input`, or run the job of one of the models again with other names."
        raise conflict("engines_do_not_fit", f"{unfit}.", remedy) from unfit
    return _sent(tenant_id, found.joined, f"{found.name}-triton.tar", opened)


def _opener(services: Services, tenant_id: str, sha256: str) -> Opener:
    key = blob_key(tenant_id, sha256)
    return lambda start, length: services.content.store.open(key, start, length)


def _missing(kind: BundleKind, missing: KindMissing) -> AppError:
    detail = f"The engine has no {kind} bundle: {missing}"
    return AppError("bundle_kind_missing", "No such bundle", 404, detail, remedy=_PYTHON_ALWAYS)


def _stem(filename: str) -> str:
    return filename.removesuffix(".zip").removesuffix("-bundle")


def _sent(tenant_id: str, found: Rearranged, filename: str, opened: Sequence[Opener]) -> Download:
    return Download(
        tenant_id,
        found.sha256,
        found.size_bytes,
        filename,
        _TAR,
        lambda start, length: cast("BinaryIO", Joined(found.pieces, opened, start, length)),
    )
