"""Jobs side by side: what each was asked for and came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app.db.orm import Engine
from app.errors import not_found
from app.figures import duration
from app.http.deps import ServicesDep, check_id
from app.web.access import PageRoute, Visitor
from app.web.job_view import asked_for
from app.web.rendering import page
from app.web.repository import PageRepository

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_MOST = 4


@router.get("/compare")
def compare_page(
    request: Request,
    services: ServicesDep,
    tenant_id: Visitor,
    job: Annotated[list[str] | None, Query(max_length=20)] = None,
) -> Response:
    """Of the first four, their figures and limits; 404 where one is not this tenant's."""
    ids = [*dict.fromkeys(check_id("job", found) for found in job or [])]
    shown = ids[:_MOST]
    with services.db.read() as session:
        pages = PageRepository(session)
        lines = {line.id: line for line in pages.lines(tenant_id, limit=_MOST, ids=shown)} if shown else {}
        engines = pages.engines(tenant_id, shown)
    missing = next((found for found in shown if found not in lines), None)
    if missing is not None:
        raise not_found("job", missing)
    asked = [dict(asked_for(services.jobs.get(tenant_id, found).spec)) for found in shown]
    delivered = [engines.get(found) for found in shown]
    return page(
        request,
        "compare.html",
        lines=[lines[found] for found in shown],
        left_out=len(ids) - len(shown),
        engine_words=[e and f"{e.backend}, {e.precision}" for e in delivered],
        machines=[_machine(e) for e in delivered],
        asked=_by_name(asked),
    )


def _machine(engine: Engine | None) -> str | None:
    if engine is None:
        return None
    hardware = engine.hardware
    return str(hardware.get("gpu") or hardware.get("cpu_model") or hardware.get("id") or "–")[:80]


def _by_name(asked: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """What each job was asked for, by what it is called; None where a job has no such limit."""
    names = dict.fromkeys(name for found in asked for name in found)
    found = {name: [one.get(name) for one in asked] for name in names}
    if "Budget" in found:
        found["Budget"] = [None if value is None else duration(value) for value in found["Budget"]]
    return found
