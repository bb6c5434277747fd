"""`/v1/operator`: what `anneal-admin` does, for programs of whoever runs the service. Needs a key of the role
`operator`, which only the command line makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from app.blobs.retention import policy_of
from app.db.accounts import ApiKey, AuditEvent, Plan, Tenant
from app.domain.plan import Limits
from app.errors import not_found
from app.http.deps import OPERATOR, CallerDep, PageDep, ServicesDep, path_id
from app.http.pagination import page_response
from app.http.problem import problems
from app.http.services import Services
from app.jobs.operator import JobOperator
from app.library import clean_name
from app.operators import schemas as out
from app.operators.service import NEVER, WorkerStanding, set_retention, workers
from app.tenants.keys import MadeKey
from app.tenants.schemas import AuditOut, KeyIn, KeyOut, RotationIn, UsageOut
from app.tenants.sessions import end_sessions, sessions

router = APIRouter(prefix="/operator", tags=["operator"], **OPERATOR)

TenantPath = Annotated[str, path_id("tenant")]
TenantQuery = Annotated[str | None, Query(pattern=r"^[a-z]{3}_[0-9a-zA-Z]{1,60}$", description="Of this tenant only")]
WorkerPath = Annotated[str, Path(max_length=255)]
_MOST_SESSIONS = 1000
_ONCE = {"Cache-Control": "no-store"}


@router.get("/tenants", response_model=out.TenantPage)
def list_tenants(services: ServicesDep, page: PageDep) -> Response:
    """All tenants, newest first, and what each uses."""
    return page_response(
        page, services.tenants.page, lambda row: _standing(services, row.id).model_dump_json().encode()
    )


@router.post("/tenants", status_code=201, response_model=out.TenantStanding, responses=problems(400, 404, 409, 413))
def create_tenant(services: ServicesDep, caller: CallerDep, body: out.TenantIn) -> out.TenantStanding:
    """Make a tenant. `POST /v1/operator/tenants/{id}/keys` makes its first key."""
    return _standing(services, services.tenants.create(body.name, body.plan, actor=caller.actor).id)


@router.get("/tenants/{tenant_id}", response_model=out.TenantStanding, responses=problems(404))
def get_tenant(services: ServicesDep, tenant_id: TenantPath) -> out.TenantStanding:
    """One tenant, what holds for it, and what it uses."""
    return _standing(services, tenant_id)


@router.patch("/tenants/{tenant_id}", response_model=out.TenantStanding, responses=problems(400, 404, 413))
def change_tenant(
    services: ServicesDep, caller: CallerDep, tenant_id: TenantPath, body: out.TenantChange
) -> out.TenantStanding:
    """Switch a tenant off and on, put it on a plan, give it limits and retention of its own."""
    actor = caller.actor
    if body.plan is not None or body.limits is not None or body.clear_limits:
        services.tenants.put_on(tenant_id, body.plan, body.limits, clear=body.clear_limits, actor=actor)
    if body.retention is not None:
        named = body.retention.model_dump(exclude_unset=True)
        days = {kind: NEVER if value is None else value for kind, value in named.items()}
        set_retention(services.db, tenant_id, days, actor=actor)
    if body.enabled is not None:
        services.tenants.switch(tenant_id, on=body.enabled, actor=actor)
    return _standing(services, tenant_id)


@router.post(
    "/tenants/{tenant_id}/keys",
    status_code=201,
    response_model=out.OperatorKeyMade,
    responses=problems(400, 404, 409, 413),
)
def create_key(services: ServicesDep, caller: CallerDep, tenant_id: TenantPath, body: KeyIn) -> Response:
    """Make a key of a tenant. The answer shows it, this once."""
    life = None if body.expires_in_days is None else timedelta(days=body.expires_in_days)
    return _made(services.keys.make(tenant_id, clean_name(body.name, ""), body.role, life, actor=caller.actor))


@router.get("/keys", response_model=out.OperatorKeyPage)
def list_keys(services: ServicesDep, page: PageDep, tenant_id: TenantQuery = None) -> Response:
    """Keys of all tenants, newest first, revoked ones too."""

    def fetch(limit: int, before: str | None) -> Sequence[ApiKey]:
        return services.keys.page(tenant_id, limit=limit, before=before)

    return page_response(page, fetch, lambda row: _key(row).model_dump_json().encode())


@router.delete("/keys/{key_id}", status_code=204, responses=problems(404, 413))
def revoke_key(services: ServicesDep, caller: CallerDep, key_id: Annotated[str, path_id("key")]) -> None:
    """Revoke any key, with every browser that signed in with it."""
    services.keys.revoke(None, key_id, actor=caller.actor)


@router.post(
    "/keys/{key_id}/rotate",
    status_code=201,
    response_model=out.OperatorKeyMade,
    responses=problems(400, 404, 409, 413),
)
def rotate_key(
    services: ServicesDep,
    caller: CallerDep,
    key_id: Annotated[str, path_id("key")],
    body: RotationIn | None = None,
) -> Response:
    """A new key in the place of any; that one goes on for the grace."""
    grace = timedelta(seconds=(body or RotationIn()).grace_seconds)
    return _made(services.keys.rotate(None, key_id, grace, actor=caller.actor))


@router.get("/plans", response_model=out.PlanList)
def list_plans(services: ServicesDep) -> out.PlanList:
    """All plans, by name."""
    return out.PlanList(plans=[_plan(plan) for plan in services.tenants.plans()])


@router.put("/plans/{name}", response_model=out.PlanOut, responses=problems(400, 413))
def set_plan(
    services: ServicesDep, caller: CallerDep, name: Annotated[str, Path(max_length=64)], body: out.PlanIn
) -> out.PlanOut:
    """Make a plan, or give one these limits in the place of those that it has: they hold from the next request on."""
    return _plan(services.tenants.set_plan(name, body.limits, actor=caller.actor))


@router.get("/audit", response_model=out.OperatorAuditPage)
def list_audit(
    services: ServicesDep,
    page: PageDep,
    tenant_id: TenantQuery = None,
    action: Annotated[str | None, Query(pattern=r"^[a-z_]{1,32}\.[a-z_]{1,31}$", examples=["key.create"])] = None,
) -> Response:
    """What was done in any tenant's name, newest first."""

    def fetch(limit: int, before: str | None) -> Sequence[AuditEvent]:
        return services.tenants.audit(tenant_id, limit=limit, before=before, action=action)

    def render(row: AuditEvent) -> bytes:
        common = AuditOut.of(row).model_dump()
        return out.OperatorAudit(**common, tenant_id=row.tenant_id).model_dump_json().encode()

    return page_response(page, fetch, render)


@router.get("/workers", response_model=out.WorkerList)
def list_workers(services: ServicesDep) -> out.WorkerList:
    """Workers of the last 24 hours, and the jobs that they hold."""
    return out.WorkerList(workers=[_worker(found) for found in workers(services.db, services.capabilities)])


@router.post("/workers/{worker_id}/drain", status_code=204, responses=problems(404, 413))
def drain_worker(services: ServicesDep, worker_id: WorkerPath) -> None:
    """From its next heartbeat on it takes no job any more, until it starts anew; what it has it ends."""
    _drain(services, worker_id, draining=True)


@router.post("/workers/{worker_id}/resume", status_code=204, responses=problems(404, 413))
def resume_worker(services: ServicesDep, worker_id: WorkerPath) -> None:
    """It takes jobs again."""
    _drain(services, worker_id, draining=False)


@router.post("/workers/{worker_id}/requeue", response_model=out.Requeued, responses=problems(413))
def requeue_worker(services: ServicesDep, worker_id: WorkerPath) -> out.Requeued:
    """Every job that this worker holds goes back to the queue: it is dead, or hangs."""
    return out.Requeued(jobs=[*_jobs(services).requeue_all(worker_id)])


@router.post("/jobs/{job_id}/requeue", response_model=out.Requeued, responses=problems(404, 409, 413))
def requeue_job(services: ServicesDep, job_id: Annotated[str, path_id("job")]) -> out.Requeued:
    """A running job goes back to the queue, to be begun at once by whoever is free; a queued one's pause ends."""
    _jobs(services).requeue(job_id)
    return out.Requeued(jobs=[job_id])


@router.get("/sessions", response_model=out.SessionList)
def list_sessions(
    services: ServicesDep,
    tenant_id: TenantQuery = None,
    limit: Annotated[int, Query(ge=1, le=_MOST_SESSIONS)] = 200,
) -> out.SessionList:
    """Who is signed in by the identity provider."""
    fields = ("subject", "name", "tenant_id", "role", "created_at", "expires_at")
    rows = sessions(services.db, tenant_id, limit=limit)
    return out.SessionList(sessions=[out.SessionOut(**{f: getattr(row, f) for f in fields}) for row in rows])


@router.post("/sessions/end", response_model=out.SessionsEnded, responses=problems(400, 413))
def sign_out(services: ServicesDep, caller: CallerDep, body: out.SubjectIn) -> out.SessionsEnded:
    """Sign a person out everywhere, within two seconds."""
    return out.SessionsEnded(ended=end_sessions(services.db, body.subject, actor=caller.actor))


def _standing(services: Services, tenant_id: str) -> out.TenantStanding:
    tenant, plan, limits, usage = services.tenants.standing(tenant_id)
    return out.TenantStanding(
        id=tenant.id,
        created_at=tenant.created_at,
        links=_links(tenant),
        name=tenant.name,
        plan=plan,
        limits=limits,
        own_limits=sorted({*(tenant.limits or {})} & {*Limits.model_fields}),
        usage=UsageOut(
            stored_bytes=usage.stored_bytes,
            upload_bytes=usage.upload_bytes,
            jobs_queued=usage.jobs_queued,
            jobs_running=usage.jobs_running,
            gpu_seconds=round(usage.gpu_seconds, 1),
        ),
        retention=out.RetentionOut(**asdict(policy_of(services.settings, tenant.retention))),
        disabled_at=tenant.disabled_at,
    )


def _links(tenant: Tenant) -> dict[str, str]:
    self = f"/v1/operator/tenants/{tenant.id}"
    return {
        "self": self,
        "keys": f"/v1/operator/keys?tenant_id={tenant.id}",
        "audit": f"/v1/operator/audit?tenant_id={tenant.id}",
    }


def _key(row: ApiKey) -> out.OperatorKey:
    common = KeyOut.of(row).model_dump()
    return out.OperatorKey(**{**common, "links": _key_links(row)}, tenant_id=row.tenant_id)


def _key_links(row: ApiKey) -> dict[str, str]:
    self = f"/v1/operator/keys/{row.id}"
    return {"self": self, "rotate": f"{self}/rotate"}


def _made(made: MadeKey) -> Response:
    body = out.OperatorKeyMade(**_key(made.row).model_dump(), key=made.secret)
    return Response(body.model_dump_json(), 201, _ONCE, "application/json")


def _plan(row: Plan) -> out.PlanOut:
    known = {name: value for name, value in row.limits.items() if name in Limits.model_fields}
    return out.PlanOut(name=row.name, limits=Limits.model_validate(known), created_at=row.created_at)


def _worker(found: WorkerStanding) -> out.WorkerState:
    row = found.worker
    hardware = row.hardware.get("id")
    return out.WorkerState(
        id=row.id,
        state=found.state,
        hostname=row.hostname,
        hardware=None if hardware is None else str(hardware),
        queues=[*row.queues],
        jobs=[*found.jobs],
        last_seen_at=found.last_seen_at,
        missing=[*(row.hardware.get("isolation") or {}).get("missing", ())],
    )


def _drain(services: Services, worker_id: str, *, draining: bool) -> None:
    if not services.capabilities.drain(worker_id, draining=draining):
        raise not_found("worker", worker_id)


def _jobs(services: Services) -> JobOperator:
    return JobOperator(services.db, services.jobs.dispatch, services.settings.worker)
