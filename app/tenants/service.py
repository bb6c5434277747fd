"""Tenants and plans, as an operator has them: made, switched off and on, put on a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.audit import record
from app.db.accounts import AuditEvent, Plan, Tenant
from app.db.base import utcnow
from app.db.ids import new_id
from app.db.uow import Database
from app.domain.plan import DEFAULT_PLAN, Limits
from app.errors import AppError, conflict, invalid_request, not_found
from app.names import forbidden_character
from app.settings import LimitSettings
from app.tenants.quotas import Quotas, Usage
from app.tenants.repository import TenantRepository

_LONGEST_NAME = 200
_LONGEST_PLAN = 64


class TenantService:
    """Calls block. Tenants are named by their name or id. `actor`: see `app.audit`."""

    def __init__(self, db: Database, limits: LimitSettings) -> None:
        self._db = db
        self._limits = limits

    def all(self) -> Sequence[Tenant]:
        with self._db.read() as session:
            return TenantRepository(session).all()

    def page(self, limit: int, before: str | None = None) -> Sequence[Tenant]:
        """Newest first."""
        with self._db.read() as session:
            return TenantRepository(session).tenants(limit=limit, before=before)

    def get(self, which: str) -> Tenant:
        with self._db.read() as session:
            return _tenant(session, which)

    def create(self, name: str, plan: str | None = None, *, actor: str) -> Tenant:
        """409 where there is one of this name."""
        _check_name(name, _LONGEST_NAME, "tenant")
        try:
            with self._db.write() as uow:
                if plan is not None:
                    _plan(uow.session, plan)
                tenant = Tenant(id=new_id("tnt"), name=name, created_at=utcnow(), plan=plan)
                uow.session.add(tenant)
                uow.session.flush()
                record(uow.session, tenant.id, actor, "tenant.create", tenant.id, {"name": name, "plan": plan})
        except IntegrityError as error:
            raise conflict("tenant_exists", f"There is a tenant {name!r} already.") from error
        return tenant

    def switch(self, which: str, *, on: bool, actor: str) -> Tenant:
        """Off: its keys and browsers are answered 403, within two seconds; its jobs go on to their end. Nothing is
        lost."""
        with self._db.write() as uow:
            tenant = _tenant(uow.session, which, lock=True)
            if on == (tenant.disabled_at is not None):
                tenant.disabled_at = None if on else utcnow()
                action = "tenant.enable" if on else "tenant.disable"
                record(uow.session, tenant.id, actor, action, tenant.id)
            return tenant

    def put_on(
        self, which: str, plan: str | None, own: Limits | None, *, clear: bool = False, actor: str
    ) -> tuple[Tenant, Limits]:
        """Put a tenant on a plan (None: it stays on its own), and set its own limits beside those that it has (`clear`:
        in their place). The limits that hold now."""
        with self._db.write() as uow:
            session = uow.session
            tenant = _tenant(session, which, lock=True)
            if plan is not None:
                tenant.plan = _plan(session, plan).name
            kept = {} if clear else dict(tenant.limits or {})
            tenant.limits = {**kept, **(own.named() if own else {})} or None
            detail = {"plan": tenant.plan or DEFAULT_PLAN, "limits": tenant.limits}
            record(session, tenant.id, actor, "tenant.plan", tenant.id, detail)
            session.flush()
            return tenant, Quotas(session, tenant.id, self._limits).limits

    def plans(self) -> Sequence[Plan]:
        with self._db.read() as session:
            return [*session.scalars(select(Plan).order_by(Plan.name))]

    def set_plan(self, name: str, limits: Limits, *, actor: str) -> Plan:
        """Make a plan, or give one other limits: they hold for its tenants from the next request on."""
        _check_name(name, _LONGEST_PLAN, "plan")
        with self._db.write() as uow:
            found = uow.session.get(Plan, name, with_for_update=True)
            before = None if found is None else found.limits
            if found is None:
                found = Plan(name=name, limits={}, created_at=utcnow())
                uow.session.add(found)
            found.limits = limits.named()
            record(uow.session, None, actor, "plan.set", name, {"limits": found.limits, "before": before})
            return found

    def standing(self, tenant_id: str) -> tuple[Tenant, str, Limits, Usage]:
        """A tenant, the name of its plan, the limits that hold, and what it uses."""
        with self._db.read() as session:
            tenant = _tenant(session, tenant_id)
            quotas = Quotas(session, tenant.id, self._limits, lock=False)
            limits = quotas.limits
            if limits.active_jobs is None:
                limits = limits.model_copy(update={"active_jobs": self._limits.active_jobs_per_tenant})
            if limits.model_bytes is None:
                limits = limits.model_copy(update={"model_bytes": self._limits.upload_bytes})
            return tenant, quotas.plan, limits, quotas.usage()

    def audit(
        self, tenant_id: str | None, *, limit: int, before: str | None = None, action: str | None = None
    ) -> Sequence[AuditEvent]:
        """What was done, newest first; of all tenants for None."""
        with self._db.read() as session:
            return TenantRepository(session).audit(tenant_id, limit=limit, before=before, action=action)


def limits_of(values: dict[str, Any]) -> Limits:
    """Raises 422 for a name that there is not, or a value that makes no limit."""
    try:
        return Limits.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        remedy = f"The limits are {', '.join(Limits.model_fields)}: whole numbers, or none for no limit."
        raise invalid_request(f"{place}: {first['msg']}", remedy=remedy) from error


def _tenant(session: Session, which: str, *, lock: bool = False) -> Tenant:
    tenants = TenantRepository(session)
    found = tenants.get(which) or tenants.by_name(which)  # no name stands in for the id of another
    if found is not None and lock:
        found = tenants.get(found.id, lock=True)
    if found is None:
        raise not_found("tenant", which)
    return found


def _plan(session: Session, name: str) -> Plan:
    found = session.get(Plan, name)
    if found is None:
        raise not_found("plan", name)
    return found


def _check_name(name: str, longest: int, kind: str) -> None:
    if not 0 < len(name.strip()) <= longest or forbidden_character(name):
        detail = f"The name of a {kind} has 1 to {longest} characters, and no control character."
        raise AppError("invalid_request", "The request is not valid", 422, detail)
