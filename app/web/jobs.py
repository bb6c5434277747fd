"""Jobs: the list, a job while it runs and with its report, cancel."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.db.base import utcnow
from app.db.orm import Job
from app.errors import AppError
from app.http.auth import Credentials
from app.http.deps import IdFilter, ServicesDep, path_id
from app.http.pagination import CURSOR, decode_cursor, encode_cursor
from app.http.problem import prefers_html, problem_response
from app.http.services import Services
from app.jobs.comparison_page import comparison_body
from app.jobs.endpoints import report_document
from app.jobs.family import PARENTS
from app.jobs.report_page import report_body
from app.jobs.schemas import Status
from app.web.access import PageRoute, SentForm, Visitor, visitor
from app.web.job_view import Board, JobView, asked_for
from app.web.rendering import fragment, page, part, see_other
from app.web.repository import PageRepository
from app.web.streaming import live_stream

router = APIRouter(route_class=PageRoute, include_in_schema=False)

JobId = Annotated[str, path_id("job")]
_ROWS = 50
_FEW = 8
StatusFilter = Annotated[Status | Literal[""], Query()]  # a form sends an empty one for any
Cursor = Annotated[str | None, Query(max_length=200, pattern=CURSOR)]


@router.get("/", response_model=None)
async def start_page(request: Request, services: ServicesDep) -> Response:
    """For browsers; who asks for JSON is told, as ever, that there is nothing here."""
    if not prefers_html(request.headers.get("accept", "")):
        remedy = "The API is below /v1 (GET /openapi.json describes it); a browser gets a page here."
        nothing = AppError("not_found", "Not found", 404, "There is nothing at this path.", remedy=remedy)
        return problem_response(nothing, request)
    tenant_id = await visitor(request)

    def read() -> dict[str, Any]:
        with services.db.read() as session:
            pages = PageRepository(session)
            lines, active = pages.lines(tenant_id, limit=_FEW), pages.active(tenant_id)
        return {"lines": lines, "active": active, "workers": services.capabilities.live()}

    values = await anyio.to_thread.run_sync(read)
    return page(request, "start.html", **values)


@router.get("/jobs")
def list_page(
    request: Request,
    services: ServicesDep,
    tenant_id: Visitor,
    status: StatusFilter = "",
    model_id: IdFilter = None,
    cursor: Cursor = None,
) -> Response:
    """Newest first, by filters, a page at a time."""
    values = _listed(services, tenant_id, status or None, model_id, cursor)
    return page(request, "jobs.html", **values)


@router.get("/jobs/rows")
def list_rows(
    services: ServicesDep,
    tenant_id: Visitor,
    status: StatusFilter = "",
    model_id: IdFilter = None,
    cursor: Cursor = None,
) -> Response:
    """The rows alone, as they are now."""
    return part(fragment("_job_rows.html", **_listed(services, tenant_id, status or None, model_id, cursor)))


def _listed(
    services: Services, tenant_id: str, status: str | None, model_id: str | None, cursor: str | None
) -> dict[str, Any]:
    before = decode_cursor(cursor) if cursor else None
    with services.db.read() as session:
        pages = PageRepository(session)
        lines = pages.lines(tenant_id, limit=_ROWS + 1, before=before, status=status, model_id=model_id)
        name = pages.model_name(tenant_id, model_id) if model_id else None
    more = len(lines) > _ROWS
    lines = lines[:_ROWS]
    return {
        "lines": lines,
        "status": status,
        "model_id": model_id,
        "model_name": name or model_id,
        "cursor": cursor,
        "next_cursor": encode_cursor(lines[-1].id) if more else None,
        "statuses": ("queued", "running", "succeeded", "failed", "cancelled"),
    }


@router.get("/jobs/{job_id}")
async def job_page(request: Request, services: ServicesDep, tenant_id: Visitor, job_id: JobId) -> Response:
    """A job: live while it runs, with its report once it has one."""
    view = await anyio.to_thread.run_sync(view_of, services, tenant_id, job_id)
    values = await _outcome(services, view)
    return page(request, "job.html", view=view, asked=asked_for(view.job.spec), **values)


@router.get("/jobs/{job_id}/outcome")
async def job_outcome(services: ServicesDep, tenant_id: Visitor, job_id: JobId) -> Response:
    """The report within the page of a job that has just ended."""
    view = await anyio.to_thread.run_sync(view_of, services, tenant_id, job_id)
    return part(fragment("_outcome.html", view=view, **await _outcome(services, view)))


@router.get("/jobs/{job_id}/live")
async def job_live(request: Request, services: ServicesDep, tenant_id: Visitor, job_id: JobId) -> Response:
    """The job's state as a stream of fragments, one for each change, until it has ended."""
    await anyio.to_thread.run_sync(services.jobs.version, tenant_id, job_id)
    if services.waiting.full(tenant_id):
        raise AppError("too_many_streams", "Too many", 429, "Too many pages of running jobs are open.", retryable=True)
    credentials = Credentials.of(request.scope)

    def render() -> tuple[int, bool, str]:
        view = view_of(services, tenant_id, job_id)
        return view.job.version, view.terminal, fragment("_job_live.html", view=view, streamed=True)

    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    stream = live_stream(services, tenant_id, job_id, credentials, render)
    return StreamingResponse(stream, headers=headers, media_type="text/event-stream")


@router.post("/jobs/{job_id}/cancel")
def cancel(services: ServicesDep, tenant_id: Visitor, job_id: JobId, _form: SentForm) -> Response:
    """Cancel, and back to the job."""
    services.jobs.cancel(tenant_id, job_id)
    return see_other(f"/jobs/{job_id}")


def view_of(services: Services, tenant_id: str, job_id: str) -> JobView:
    """The job as it is now; raises 404."""
    job = services.jobs.get(tenant_id, job_id)
    with services.db.read() as session:
        pages = PageRepository(session)
        told = pages.told(job_id, "candidates")
        lines = pages.lines(tenant_id, limit=1, ids=[job_id])
    outlook = services.job_documents.get(tenant_id, job_id).outlook if job.status == "queued" else None
    return JobView(job, lines[0].model if lines else job.model_id, Board.of(told), utcnow(), outlook)


async def _outcome(services: Services, view: JobView) -> dict[str, Any]:
    """The report of a job that has one, and the engine that it delivered."""
    job = view.job
    if not view.terminal:
        return {"report": None, "engine": None}
    engine = await anyio.to_thread.run_sync(_engine, services, job)
    if job.report_sha256 is None and job.queue != PARENTS:
        return {"report": None, "engine": engine}
    document = json.loads(await services.storage.run(job.tenant_id, report_document, services, job))
    make = comparison_body if job.queue == PARENTS else report_body
    body = await anyio.to_thread.run_sync(make, document)
    return {"report": body, "engine": engine}


def _engine(services: Services, job: Job) -> Any:
    with services.db.read() as session:
        return PageRepository(session).engines(job.tenant_id, [job.id]).get(job.id)
