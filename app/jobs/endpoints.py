"""`/v1/jobs`: submit, poll, follow, cancel, delete; report and manifest."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.db.orm import Job
from app.domain.artifact_key import digest_of
from app.domain.comparison import Comparison
from app.domain.report import Report
from app.domain.spec import OptimizationSpec
from app.errors import AppError, FieldError, conflict, invalid_request
from app.http.deps import (
    IdempotencyKeyHeader,
    IdFilter,
    PageDep,
    ServicesDep,
    TenantId,
    check_id,
    current_tenant,
    path_id,
)
from app.http.downloads import etag_matches
from app.http.pagination import page_response
from app.http.problem import prefers_html, problems
from app.http.services import Services
from app.idempotency import Idempotency
from app.jobs.comparison import compare
from app.jobs.documents import JobDocument
from app.jobs.events import event_stream
from app.jobs.family import PARENTS
from app.jobs.report_page import PAGE_POLICY, comparison_page, report_page
from app.jobs.schemas import JobOut, JobPage, Status, is_terminal, version_in
from app.names import storable

router = APIRouter(prefix="/jobs", tags=["jobs"])

JobId = Annotated[str, path_id("job")]
WithEngines = Annotated[bool, Query(description="Delete the engines that it delivered, too")]
_JSON = "application/json"
_LONGEST_WAIT_S = 3600
WAITED_FOR = ("change", "state", "end")


# Declared here and read by hand below: FastAPI's own reading of parameters would take a fifth of a poll's time.
_POLL_PARAMETERS: dict[str, Any] = {
    "parameters": [
        {"name": "job_id", "in": "path", "required": True, "schema": {"type": "string"}},
        {"name": "If-None-Match", "in": "header", "required": False, "schema": {"type": "string"}},
        {
            "name": "wait",
            "in": "query",
            "required": False,
            "schema": {"type": "number", "minimum": 0, "maximum": _LONGEST_WAIT_S, "default": 0},
            "description": "Seconds to wait for a change; the service may wait less",
        },
        {
            "name": "for",
            "in": "query",
            "required": False,
            "schema": {"type": "string", "enum": [*WAITED_FOR], "default": WAITED_FOR[0]},
            "description": "What `wait` waits for: any change, progress among them; another state than the one that "
            "the job is in; or its end",
        },
    ]
}


@router.get(
    "/{job_id}",
    response_model=JobOut,
    responses={304: {"description": "The job is still as If-None-Match says"}, **problems(404)},
    openapi_extra=_POLL_PARAMETERS,
)
async def get_job(request: Request) -> Response:
    """The job now; with `wait`, as soon as it differs from the ETag in If-None-Match (or from what it is now); with
    `for=state` or `for=end`, as soon as its status is another, or its last."""
    services: Services = request.app.state.services
    tenant_id = await current_tenant(request)
    job_id = check_id("job", request.path_params["job_id"])
    if_none_match = request.headers.get("if-none-match")
    wait, until = 0.0, WAITED_FOR[0]
    if request.scope["query_string"]:
        wait, until = _seconds(request.query_params.get("wait")), _waited_for(request.query_params.get("for"))
    job = await anyio.to_thread.run_sync(services.job_documents.get, tenant_id, job_id)
    if wait and not job.terminal:
        known = version_in(if_none_match, job_id)
        fresh = until == "change" and known is not None and known != job.version
        # With very many waiting requests of this tenant, it waits less: not at all.
        if not fresh and not services.waiting.full(tenant_id):
            job = await _waited(request, tenant_id, job_id, job, wait, until)
    headers = {"ETag": job.etag, "Cache-Control": "private, no-cache"}
    if if_none_match is not None and etag_matches(if_none_match, job.etag):
        return Response(status_code=304, headers=headers)
    return Response(job.body, headers=headers, media_type=_JSON)


@router.post("", status_code=202, response_model=JobOut, responses=problems(400, 409, 413, 429, 507))
def submit_job(
    request: Request,
    spec: OptimizationSpec,
    services: ServicesDep,
    tenant_id: TenantId,
    key: IdempotencyKeyHeader = None,
) -> Response:
    """Optimize a model. Only `model_id` is required; every default is echoed in the job's `spec`. With `targets`, each
    of them gets a job, and this one compares them."""
    # Without what has its default: a version to come has more fields, and the client may send this again then.
    document = spec.model_dump(mode="json", exclude_defaults=True)
    _check_size(document, services.settings.limits.spec_bytes)
    _refuse_unstorable(document, "/body")
    idempotency = None if key is None else Idempotency(key, digest_of(["job", document]))
    correlation_id = request.scope["anneal.request_id"]
    row, new = services.jobs.submit(
        tenant_id,
        spec,
        correlation_id=correlation_id,
        idempotency=idempotency,
        traceparent=request.scope.get("anneal.traceparent"),
    )
    job = services.job_documents.get(tenant_id, row.id)
    headers = {"Location": f"/v1/jobs/{row.id}", "ETag": job.etag}
    if not new:
        headers["Idempotency-Replayed"] = "true"
    return Response(job.body, 202, headers, _JSON)


@router.get("", response_model=JobPage)
def list_jobs(
    services: ServicesDep,
    tenant_id: TenantId,
    page: PageDep,
    status: Status | None = None,
    model_id: IdFilter = None,
) -> Response:
    """Jobs, newest first. `model_id`: of a job's model, or of any of its chain."""

    def fetch(limit: int, before: str | None) -> list[Job]:
        return services.jobs.list(tenant_id, limit=limit, before=before, status=status, model_id=model_id)

    return page_response(page, fetch, lambda row: services.job_documents.of(row).body)


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"description": "Server-sent events", "content": {"text/event-stream": {}}}, **problems(404, 429)},
)
async def follow_job(
    request: Request,
    services: ServicesDep,
    tenant_id: TenantId,
    job_id: JobId,
    last_event_id: Annotated[str | None, Header(description="Go on after this event", max_length=64)] = None,
) -> StreamingResponse:
    """Follow the job; the stream ends with its last event. Resumable by `Last-Event-ID`."""
    after = 0
    if last_event_id:
        if not last_event_id.isdecimal() or len(last_event_id) > 18:
            message = "must be the id of an event of this stream"
            raise invalid_request("Last-Event-ID " + message, [FieldError("/header/last-event-id", message)])
        after = int(last_event_id)
    job = await anyio.to_thread.run_sync(services.job_documents.get, tenant_id, job_id)
    if services.waiting.full(tenant_id):
        detail = f"{services.settings.limits.waiting_per_tenant} streams and long polls of this tenant are open."
        remedy = "Close some, or poll the jobs without `wait`."
        headers = {"Retry-After": "10"}
        raise AppError("too_many_streams", "Too many", 429, detail, retryable=True, remedy=remedy, headers=headers)
    # `no-transform` and X-Accel-Buffering keep proxies from gathering events.
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        event_stream(services, tenant_id, job_id, job, after, request.scope["anneal.credentials"]),
        headers=headers,
        media_type="text/event-stream",
    )


@router.post("/{job_id}/cancel", status_code=202, response_model=JobOut, responses=problems(404, 413, 507))
def cancel_job(services: ServicesDep, tenant_id: TenantId, job_id: JobId) -> Response:
    """Cancel the job, in any state; one that has ended stays as it is."""
    job = services.job_documents.of(services.jobs.cancel(tenant_id, job_id))
    return Response(job.body, 202, {"ETag": job.etag}, _JSON)


@router.delete("/{job_id}", status_code=204, responses=problems(404, 409, 413, 507))
async def delete_job(services: ServicesDep, tenant_id: TenantId, job_id: JobId, engines: WithEngines = False) -> None:
    """Delete a job that has ended, with its events, report and manifest. Its engines stay, unless `engines` is true. A
    job with `targets` goes with the jobs of these."""

    def delete() -> None:
        services.jobs.delete(tenant_id, job_id, engines=engines)

    await services.storage.run(tenant_id, delete)


@router.get(
    "/{job_id}/report",
    response_class=Response,
    responses={
        200: {"description": "The report", "model": Report | Comparison, "content": {"text/html": {}}},
        **problems(404, 409),
    },
)
async def get_report(request: Request, services: ServicesDep, tenant_id: TenantId, job_id: JobId) -> Response:
    """What was measured and what came out of it; as a page with plots for `Accept: text/html`. Of a job with `targets`:
    what its traffic costs on each."""
    row = await anyio.to_thread.run_sync(services.jobs.get, tenant_id, job_id)
    make_page = comparison_page if row.queue == PARENTS else report_page
    body = await services.storage.run(tenant_id, report_document, services, row)
    headers = {"Vary": "Accept", "Cache-Control": "private, no-cache"}
    if prefers_html(request.headers.get("accept", "")):
        headers["Content-Security-Policy"] = PAGE_POLICY
        page = await anyio.to_thread.run_sync(lambda: make_page(json.loads(body), job_id))
        return Response(page, headers=headers, media_type="text/html")
    return Response(body, headers=headers, media_type=_JSON)


@router.get(
    "/{job_id}/manifest",
    response_class=Response,
    responses={
        200: {"description": "The manifest", "content": {_JSON: {"schema": {"type": "object"}}}},
        **problems(404, 409),
    },
)
async def get_manifest(services: ServicesDep, tenant_id: TenantId, job_id: JobId) -> Response:
    """Every input, stage key, option, library version, hardware fingerprint and output digest of the job."""
    row = await anyio.to_thread.run_sync(services.jobs.get, tenant_id, job_id)
    body = await services.storage.run(tenant_id, _document, services, row, row.manifest_sha256, "manifest")
    return Response(body, media_type=_JSON)


async def _waited(
    request: Request, tenant_id: str, job_id: str, job: JobDocument, wait: float, until: str
) -> JobDocument:
    """The job once it is what is waited for, or after `wait` seconds."""
    services: Services = request.app.state.services
    first, deadline = job, time.monotonic() + min(wait, services.settings.limits.wait_s)
    with services.waiting.taken(tenant_id):
        while (left := deadline - time.monotonic()) > 0:
            changed = await services.watcher.wait(job_id, job.version, left)
            await services.auth.tenant(request.scope["anneal.credentials"])  # it may have been revoked meanwhile
            if not changed:
                break
            shared = ("job", tenant_id, job_id, job.version)  # others wait for the same
            job = await services.reads.read(shared, services.job_documents.get, tenant_id, job_id)
            if until == "change" or job.terminal or (until == "state" and job.status != first.status):
                break
    return job


def _waited_for(value: str | None) -> str:
    """The query parameter `for`."""
    if value is None:
        return WAITED_FOR[0]
    if value not in WAITED_FOR:
        message = f"must be one of {', '.join(WAITED_FOR)}"
        raise invalid_request(f"for: {message}", [FieldError("/query/for", message)])
    return value


def _seconds(value: str | None) -> float:
    """The query parameter `wait`."""
    try:
        seconds = float(value) if value is not None else 0.0
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _LONGEST_WAIT_S:  # also false for NaN
        message = f"must be a number of seconds from 0 to {_LONGEST_WAIT_S}"
        raise invalid_request(f"wait: {message}", [FieldError("/query/wait", message)])
    return seconds


def report_document(services: Services, row: Job) -> bytes:
    """The report as JSON; of a job with `targets`, the comparison. Blocks; raises 404 or 409 where there is none."""
    if row.queue == PARENTS:
        return _comparison(services, row)
    return _document(services, row, row.report_sha256, "report")


def _document(services: Services, row: Job, sha256: str | None, kind: str) -> bytes:
    if sha256 is not None:
        return services.content.read_bytes(row.tenant_id, sha256)
    if is_terminal(row):
        remedy = "The job's `error` and `stages` say what happened."
        raise AppError(f"no_{kind}", "Not there", 404, f"The job is {row.status} and has no {kind}.", remedy=remedy)
    remedy = f"Wait for the job: GET /v1/jobs/{row.id}?wait=30&for=end"
    raise conflict(f"{kind}_not_ready", f"The job is {row.status}.", remedy)


def _comparison(services: Services, row: Job) -> bytes:
    """Of a job with targets, once all have ended."""
    if not is_terminal(row):
        _document(services, row, None, "report")
    children = services.jobs.children(row.tenant_id, row.id)
    reports = {
        child.id: json.loads(services.content.read_bytes(row.tenant_id, child.report_sha256))
        for child in children
        if child.report_sha256 is not None
    }
    return compare(row, children, reports).model_dump_json().encode()


def _check_size(document: Any, limit: int) -> None:
    """A spec stays with its job and comes back with every answer: one that is larger than a person needs is refused."""
    size = len(json.dumps(document))
    if size > limit:
        detail = f"The spec takes {size} bytes; at most {limit} are taken."
        remedy = "Leave out what has its default, and name only nodes and inputs that need it."
        raise AppError("spec_too_large", "Too large", 413, detail, remedy=remedy, extra={"limit": limit})


def _refuse_unstorable(value: Any, pointer: str) -> None:
    """422 for NUL and halves of surrogate pairs in a string: JSON can say them, a database cannot keep them."""
    if isinstance(value, str) and storable(value) != value:
        message = "must not hold NUL characters or lone surrogates"
        raise invalid_request(f"{pointer}: {message}", [FieldError(pointer, message)])
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_unstorable(name, pointer)
            _refuse_unstorable(item, f"{pointer}/{name}"[:200])
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_unstorable(item, f"{pointer}/{index}")
