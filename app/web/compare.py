"""Jobs and engines side by side: what each was asked for and came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app.db.orm import Engine
from app.errors import not_found
from app.figures import duration
from app.http.deps import ServicesDep, check_id
from app.http.services import Services
from app.web.access import PageRoute, Visitor
from app.web.job_view import asked_for
from app.web.rendering import page
from app.web.repository import EngineLine, JobLine, PageRepository

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_MOST = 4
Picked = Annotated[list[str] | None, Query(max_length=20)]


@dataclass(frozen=True)
class Column:
    """A job with the engine that it delivered, or an engine with the job that it is of, where that is still there."""

    id: str
    model: str
    job_id: str | None
    status: str | None
    made: datetime
    engine: Engine | None
    spec: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, Any]:
        return {} if self.engine is None else self.engine.metrics

    @property
    def words(self) -> str | None:
        return None if self.engine is None else f"{self.engine.backend}, {self.engine.precision}"

    @property
    def machine(self) -> str | None:
        if self.engine is None:
            return None
        hardware = self.engine.hardware
        return str(hardware.get("gpu") or hardware.get("cpu_model") or hardware.get("id") or "–")[:80]


@router.get("/compare")
def compare_page(
    request: Request, services: ServicesDep, tenant_id: Visitor, job: Picked = None, engine: Picked = None
) -> Response:
    """Of the first four, their figures and limits; 404 where one is not this tenant's."""
    picked = [("job", found) for found in job or []] + [("engine", found) for found in engine or []]
    ids = [*dict.fromkeys((kind, check_id(kind, found)) for kind, found in picked)]
    shown = _columns(services, tenant_id, ids[:_MOST])
    asked = _by_name([dict(asked_for(column.spec)) if column.spec else {} for column in shown])
    return page(request, "compare.html", columns=shown, left_out=len(ids) - len(shown), asked=asked)


def _columns(services: Services, tenant_id: str, ids: Sequence[tuple[str, str]]) -> list[Column]:
    jobs, engines = ([found for kind, found in ids if kind == wanted] for wanted in ("job", "engine"))
    with services.db.read() as session:
        pages = PageRepository(session)
        lines: dict[str, JobLine | EngineLine] = {}
        if jobs:
            lines |= {line.id: line for line in pages.lines(tenant_id, limit=_MOST, ids=jobs)}
        if engines:
            lines |= {line.engine.id: line for line in pages.engine_lines(tenant_id, limit=_MOST, ids=engines)}
        delivered = pages.engines(tenant_id, jobs)
    for kind, found in ids:
        if found not in lines:
            raise not_found(kind, found)
    return [_column(services, tenant_id, lines[found], delivered) for _, found in ids]


def _column(services: Services, tenant_id: str, line: JobLine | EngineLine, delivered: Mapping[str, Engine]) -> Column:
    job_id = line.job_id if isinstance(line, EngineLine) else line.id
    spec = {} if job_id is None else services.jobs.get(tenant_id, job_id).spec
    if isinstance(line, EngineLine):
        return Column(line.engine.id, line.model, job_id, None, line.engine.created_at, line.engine, spec)
    return Column(line.id, line.model, job_id, line.status, line.created_at, delivered.get(line.id), spec)


def _by_name(asked: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """What each was asked for, by what it is called; None where one has no such limit."""
    names = dict.fromkeys(name for found in asked for name in found)
    found = {name: [one.get(name) for one in asked] for name in names}
    if "Budget" in found:
        found["Budget"] = [None if value is None else duration(value) for value in found["Budget"]]
    return found
