"""Models, data sets, engines and workers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app.capabilities.schemas import CapabilitiesOut
from app.compatibility.schemas import CompatibilityOut
from app.http.deps import ServicesDep, path_id
from app.http.pagination import CURSOR, decode_cursor, encode_cursor
from app.web.access import PageRoute, Visitor
from app.web.rendering import page
from app.web.repository import PageRepository

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_ROWS = 50
_FEW = 10
ModelId = Annotated[str, path_id("model")]
DatasetId = Annotated[str, path_id("dataset")]
Cursor = Annotated[str | None, Query(max_length=200, pattern=CURSOR)]


@router.get("/models")
def models_page(request: Request, services: ServicesDep, tenant_id: Visitor, cursor: Cursor = None) -> Response:
    """Uploaded models, and where to upload one."""
    rows = services.models.page(tenant_id, limit=_ROWS + 1, before=_before(cursor))
    return page(request, "models.html", **_page_of(rows))


@router.get("/models/{model_id}")
def model_page(
    request: Request, services: ServicesDep, tenant_id: Visitor, model_id: ModelId, ask: bool = False
) -> Response:
    """A model: inputs, outputs, structure, operators, what its file says of itself, its jobs. `ask`: and which backends
    take it, which idle workers find out."""
    model = services.models.get(tenant_id, model_id)
    asked = CompatibilityOut.of(model_id, services.compatibility.ask(model)) if ask else None
    with services.db.read() as session:
        lines = PageRepository(session).lines(tenant_id, limit=_FEW, model_id=model_id)
    detail = dict(model.detail)
    ops = detail.pop("ops", None) or detail.pop("op_counts", None)
    counted = sorted(ops.items(), key=lambda item: -item[1]) if isinstance(ops, dict) else []
    facts = {name: value for name, value in detail.items() if isinstance(value, str | int | float)}
    most = counted[0][1] if counted else 1
    values: dict[str, Any] = {"ops": counted, "most": most, "facts": facts, "lines": lines, "asked": asked}
    return page(request, "model.html", model=model, outline=detail.get("outline"), **values)


@router.get("/datasets")
def datasets_page(request: Request, services: ServicesDep, tenant_id: Visitor, cursor: Cursor = None) -> Response:
    """Uploaded data sets, how to make one, and where to upload it."""
    rows = services.datasets.page(tenant_id, limit=_ROWS + 1, before=_before(cursor))
    return page(request, "datasets.html", **_page_of(rows))


@router.get("/datasets/{dataset_id}")
def dataset_page(request: Request, services: ServicesDep, tenant_id: Visitor, dataset_id: DatasetId) -> Response:
    """A data set: its arrays."""
    return page(request, "dataset.html", data=services.datasets.get(tenant_id, dataset_id))


@router.get("/engines")
def engines_page(request: Request, services: ServicesDep, tenant_id: Visitor, cursor: Cursor = None) -> Response:
    """Delivered engines, also of jobs that were deleted; to compare and to download."""
    with services.db.read() as session:
        found = PageRepository(session).engine_lines(tenant_id, limit=_ROWS + 1, before=_before(cursor))
    lines, more = found[:_ROWS], len(found) > _ROWS
    next_cursor = encode_cursor(lines[-1].engine.id) if more else None
    return page(request, "engines.html", lines=lines, next_cursor=next_cursor)


@router.get("/workers")
def workers_page(request: Request, services: ServicesDep, _tenant_id: Visitor) -> Response:
    """Live workers and what they offer."""
    return page(request, "workers.html", offer=CapabilitiesOut.of(services.capabilities.live()))


def _before(cursor: str | None) -> str | None:
    return decode_cursor(cursor) if cursor else None


def _page_of(rows: list[Any]) -> dict[str, Any]:
    shown = rows[:_ROWS]
    return {"rows": shown, "next_cursor": encode_cursor(shown[-1].id) if len(rows) > _ROWS else None}
