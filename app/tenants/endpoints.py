"""`/v1/tenant`, `/v1/keys`, `/v1/audit`: a tenant's own account."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query, Response

from app.db.accounts import ApiKey, AuditEvent
from app.domain.roles import Role
from app.errors import not_found
from app.http.deps import ADMIN, CallerDep, PageDep, ServicesDep, path_id
from app.http.pagination import page_response
from app.http.problem import problems
from app.library import clean_name
from app.tenants.keys import MadeKey
from app.tenants.schemas import (
    AuditOut,
    AuditPage,
    KeyIn,
    KeyMade,
    KeyOut,
    KeyPage,
    RotationIn,
    TenantOut,
    UsageOut,
)

router = APIRouter(tags=["tenant"])

KeyId = Annotated[str, path_id("key")]
_ONCE = {"Cache-Control": "no-store"}


@router.get("/tenant", response_model=TenantOut)
def get_tenant(services: ServicesDep, caller: CallerDep) -> TenantOut:
    """Whose key or token this is, its role, and what the plan allows beside what is used."""
    tenant, plan, limits, usage = services.tenants.standing(caller.tenant_id)
    return TenantOut(
        id=tenant.id,
        name=tenant.name,
        role=caller.role,
        key_id=caller.key_id,
        key_expires_at=None if caller.key_id is None else caller.expires_at,
        subject=caller.subject,
        plan=plan,
        limits=limits,
        usage=UsageOut(
            stored_bytes=usage.stored_bytes,
            upload_bytes=usage.upload_bytes,
            jobs_queued=usage.jobs_queued,
            jobs_running=usage.jobs_running,
            gpu_seconds=round(usage.gpu_seconds, 1),
        ),
        created_at=tenant.created_at,
        links={"keys": "/v1/keys", "audit": "/v1/audit"},
    )


@router.get("/keys", response_model=KeyPage, **ADMIN)
def list_keys(services: ServicesDep, caller: CallerDep, page: PageDep) -> Response:
    """The tenant's keys, newest first, revoked ones too."""

    def fetch(limit: int, before: str | None) -> Sequence[ApiKey]:
        return services.keys.page(caller.tenant_id, limit=limit, before=before)

    return page_response(page, fetch, lambda row: KeyOut.of(row).model_dump_json().encode())


@router.post("/keys", status_code=201, response_model=KeyMade, responses=problems(400, 409, 413, 507), **ADMIN)
def create_key(services: ServicesDep, caller: CallerDep, body: KeyIn) -> Response:
    """Make a key of the tenant. The answer shows it, this once; an Idempotency-Key is not looked at."""
    name = clean_name(body.name, "")
    life = None if body.expires_in_days is None else timedelta(days=body.expires_in_days)
    return _made(services.keys.make(caller.tenant_id, name, body.role, life, actor=caller.actor))


@router.get("/keys/{key_id}", response_model=KeyOut, responses=problems(404), **ADMIN)
def get_key(services: ServicesDep, caller: CallerDep, key_id: KeyId) -> KeyOut:
    """One key."""
    row = services.keys.get(caller.tenant_id, key_id)
    if row is None:
        raise not_found("key", key_id)
    return KeyOut.of(row)


@router.delete("/keys/{key_id}", status_code=204, responses=problems(404, 413, 507), **ADMIN)
def revoke_key(services: ServicesDep, caller: CallerDep, key_id: KeyId) -> None:
    """Revoke a key, with every browser that signed in with it: within two seconds it opens nothing any more."""
    services.keys.revoke(caller.tenant_id, key_id, actor=caller.actor)


@router.post(
    "/keys/{key_id}/rotate",
    status_code=201,
    response_model=KeyMade,
    responses=problems(400, 404, 409, 413, 507),
    **ADMIN,
)
def rotate_key(services: ServicesDep, caller: CallerDep, key_id: KeyId, body: RotationIn | None = None) -> Response:
    """A new key in the place of this one, of the same name and role; this one goes on for the grace. The answer shows
    the new key, this once."""
    row = services.keys.get(caller.tenant_id, key_id)
    if row is not None:  # a key in the place of an operator's is one
        caller.require(Role(row.role))
    grace = timedelta(seconds=(body or RotationIn()).grace_seconds)
    return _made(services.keys.rotate(caller.tenant_id, key_id, grace, actor=caller.actor))


@router.get("/audit", response_model=AuditPage, **ADMIN)
def list_audit(
    services: ServicesDep,
    caller: CallerDep,
    page: PageDep,
    action: Annotated[str | None, Query(pattern=r"^[a-z_]{1,32}\.[a-z_]{1,31}$", examples=["key.create"])] = None,
) -> Response:
    """What was done in the tenant's name: keys, sign-ins, jobs, deletions, its plan. Newest first."""

    def fetch(limit: int, before: str | None) -> Sequence[AuditEvent]:
        return services.tenants.audit(caller.tenant_id, limit=limit, before=before, action=action)

    return page_response(page, fetch, lambda row: AuditOut.of(row).model_dump_json().encode())


def _made(made: MadeKey) -> Response:
    body = KeyMade.made(made.row, made.secret)
    return Response(body.model_dump_json(), 201, {**_ONCE, "Location": body.links["self"]}, "application/json")
