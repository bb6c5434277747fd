"""A tenant's own account: its plan and what is used of it, its keys."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from app.db.base import utcnow
from app.domain.plan import WINDOW_DAYS
from app.domain.roles import Role
from app.errors import AppError, invalid_request
from app.http.deps import CallerDep, ServicesDep, current_caller, path_id
from app.http.services import Services
from app.library import clean_name
from app.tenants.callers import Caller
from app.tenants.keys import LONGEST_LIFE, MadeKey
from app.web.access import PageRoute, SentForm, Visitor, text_field, visitor
from app.web.rendering import page, see_other

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_KEYS = 200
_ROLES = {
    "submit": "upload, run and cancel jobs, delete",
    "read": "look and download",
    "admin": "all of it, and keys",
}


async def _admin(request: Request) -> Caller:
    """Who may see the tenant's keys; 403 for others."""
    await visitor(request)
    caller = await current_caller(request)
    caller.require(Role.ADMIN)
    return caller


Admin = Annotated[Caller, Depends(_admin)]


@router.get("/account")
def account_page(request: Request, services: ServicesDep, _tenant_id: Visitor, caller: CallerDep) -> Response:
    """The plan, and what is used of it."""
    tenant, plan, limits, usage = services.tenants.standing(caller.tenant_id)
    stored, active = usage.stored_bytes + usage.upload_bytes, usage.jobs_queued + usage.jobs_running
    spent = f"GPU seconds of the last {WINDOW_DAYS} days"
    # What is limited, what is used, what is allowed, and whether these are bytes.
    rows = [
        ("Files, open uploads included", stored, limits.stored_bytes, True),
        ("Jobs that wait and run", active, limits.active_jobs, False),
        ("Jobs that run", usage.jobs_running, limits.running_jobs, False),
        (spent, round(usage.gpu_seconds), limits.gpu_seconds, False),
        ("One model", None, limits.model_bytes, True),
        ("Requests a minute", None, limits.requests_per_minute, False),
    ]
    return page(request, "account.html", tenant=tenant, plan=plan, rows=rows, caller=caller)


@router.get("/keys")
def keys_page(request: Request, services: ServicesDep, caller: Admin) -> Response:
    """The tenant's API keys, as far as the service knows them."""
    return _keys(request, services, caller)


@router.post("/keys")
def make_key(request: Request, services: ServicesDep, caller: Admin, form: SentForm) -> Response:
    """A new key, shown on the page that answers, once."""
    problem, made = None, None
    try:
        name, days = clean_name(text_field(form, "name"), ""), text_field(form, "days")
        role = _role(text_field(form, "role"))
        made = services.keys.make(caller.tenant_id, name, role, _life(days), actor=caller.actor)
    except AppError as error:
        problem = error
    return _keys(request, services, caller, made, problem)


@router.post("/keys/{key_id}/revoke")
def revoke_key(
    services: ServicesDep, caller: Admin, key_id: Annotated[str, path_id("key")], _form: SentForm
) -> Response:
    """End a key, and back to the list."""
    services.keys.revoke(caller.tenant_id, key_id, actor=caller.actor)
    return see_other("/keys")


def _keys(
    request: Request,
    services: Services,
    caller: Caller,
    made: MadeKey | None = None,
    problem: AppError | None = None,
) -> Response:
    rows = services.keys.page(caller.tenant_id, limit=_KEYS)
    values: dict[str, Any] = {"keys": rows, "made": made, "problem": problem, "roles": _ROLES, "own": caller.key_id}
    code = 422 if problem else 201 if made else 200
    return page(request, "keys.html", code=code, today=utcnow(), most_days=LONGEST_LIFE.days, **values)


def _role(typed: str) -> Role:
    """One that a tenant's admin can give; operators' keys are made at the command line alone."""
    if typed not in _ROLES:
        raise invalid_request(f"There is no role {typed[:40]!r}.", remedy=f"Choose one of {', '.join(_ROLES)}.")
    return Role(typed)


def _life(days: str) -> timedelta | None:
    if not days:
        return None
    if not days.isdecimal() or not 1 <= int(days[:9]) <= LONGEST_LIFE.days:
        raise invalid_request(f"A key lasts 1 to {LONGEST_LIFE.days} days, or for good.")
    return timedelta(days=int(days))
