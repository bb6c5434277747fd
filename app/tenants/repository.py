"""All SQL on tenants, their keys and the sessions of browsers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, delete, func, or_, select, update
from sqlalchemy.orm import Session

from app.db.accounts import ApiKey, AuditEvent, BrowserSession, Plan, SubjectSession, Tenant
from app.db.base import utcnow
from app.db.locks import lock
from app.domain.plan import DEFAULT_PLAN


def lock_tenant(session: Session, tenant_id: str) -> None:
    """Until the end of this transaction nobody else passes here with this tenant: who adds to what it has, of which
    there may be so much. Not by the lock of its row: workers note there whom they served, and wait for nobody
    (`app.jobs.schedule`); a tenant that asks all the time would never be noted, and served first for ever."""
    lock(session, f"tenant/{tenant_id}")


class TenantRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    # Tenants

    def by_name(self, name: str) -> Tenant | None:
        return self.session.scalar(select(Tenant).where(Tenant.name == name))

    def get(self, tenant_id: str, *, lock: bool = False) -> Tenant | None:
        """`lock`: as `lock_tenant`, and what is read was read under it."""
        if lock:
            lock_tenant(self.session, tenant_id)
        query = select(Tenant).where(Tenant.id == tenant_id)
        return self.session.scalar(query.execution_options(populate_existing=lock))

    def all(self) -> Sequence[Tenant]:
        return [*self.session.scalars(select(Tenant).order_by(Tenant.name))]

    def tenants(self, *, limit: int, before: str | None = None) -> Sequence[Tenant]:
        """Newest first."""
        query = select(Tenant).order_by(Tenant.id.desc()).limit(limit)
        return [*self.session.scalars(query if before is None else query.where(Tenant.id < before))]

    # Keys

    def key(self, which: ColumnElement[bool], *, tenant_id: str | None = None, lock: bool = False) -> ApiKey | None:
        """One key, revoked or not; of this tenant where one is named."""
        query = select(ApiKey).where(which)
        if tenant_id is not None:
            query = query.where(ApiKey.tenant_id == tenant_id)
        return self.session.scalar(query.with_for_update() if lock else query)

    def named(self, key_id: str, key_sha256: str = "") -> ColumnElement[bool]:
        """The key with this id or this digest."""
        return or_(ApiKey.key_sha256 == key_sha256, ApiKey.id == key_id)

    def page(self, tenant_id: str | None, *, limit: int, before: str | None = None) -> Sequence[ApiKey]:
        """Newest first, revoked ones too; of all tenants for None."""
        query = select(ApiKey).order_by(ApiKey.id.desc()).limit(limit)
        if tenant_id is not None:
            query = query.where(ApiKey.tenant_id == tenant_id)
        if before is not None:
            query = query.where(ApiKey.id < before)
        return [*self.session.scalars(query)]

    def count_live(self, tenant_id: str) -> int:
        live = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > utcnow())
        query = select(func.count()).where(ApiKey.tenant_id == tenant_id, ApiKey.revoked_at.is_(None), live)
        return self.session.scalar(query) or 0

    def owner_of_key(self, key_sha256: str) -> Row[Any] | None:
        """Who asks with a key that is not revoked: see `_OWNER`."""
        return self.session.execute(_OWNER.where(ApiKey.key_sha256 == key_sha256)).one_or_none()

    def owner_of_session(self, token_sha256: str) -> Row[Any] | None:
        """The same of a session that has not ended, by time or with its key."""
        query = _OWNER.join(BrowserSession, BrowserSession.key_id == ApiKey.id)
        live = BrowserSession.expires_at > utcnow()
        return self.session.execute(query.where(BrowserSession.token_sha256 == token_sha256, live)).one_or_none()

    def owner_of_subjects_session(self, token_sha256: str) -> Row[Any] | None:
        """The same of a session of a subject of the identity provider that has not ended."""
        return self.session.execute(
            select(SubjectSession.subject, SubjectSession.role, SubjectSession.expires_at, *_STANDING)
            .select_from(SubjectSession)
            .join(Tenant, Tenant.id == SubjectSession.tenant_id)
            .outerjoin(Plan, _PLAN)
            .where(SubjectSession.token_sha256 == token_sha256, SubjectSession.expires_at > utcnow())
        ).one_or_none()

    def by_name_with_plan(self, name: str) -> Row[Any] | None:
        """What of a tenant says whether and how often it may ask."""
        query = select(*_STANDING).select_from(Tenant).outerjoin(Plan, _PLAN).where(Tenant.name == name)
        return self.session.execute(query).one_or_none()

    def used(self, key_id: str, at: datetime, before: datetime) -> None:
        """Note a use, unless one was noted since `before`."""
        late = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < before)
        self.session.execute(update(ApiKey).where(ApiKey.id == key_id, late).values(last_used_at=at))

    # Sessions

    def forget_sessions(self, token_sha256: str | None = None) -> None:
        """This one; or those whose time is over."""
        for kind in (BrowserSession, SubjectSession):
            over = kind.expires_at <= utcnow()
            which = over if token_sha256 is None else kind.token_sha256 == token_sha256
            self.session.execute(delete(kind).where(which))

    def subjects_sessions(
        self, tenant_id: str | None, *, subject: str | None = None, limit: int | None = None
    ) -> Sequence[SubjectSession]:
        """Those of subjects of the identity provider that have not ended, newest first; None: of all."""
        query = select(SubjectSession).where(SubjectSession.expires_at > utcnow())
        if tenant_id is not None:
            query = query.where(SubjectSession.tenant_id == tenant_id)
        if subject is not None:
            query = query.where(SubjectSession.subject == subject)
        return [*self.session.scalars(query.order_by(SubjectSession.created_at.desc()).limit(limit))]

    # Audit rows

    def audit(
        self, tenant_id: str | None, *, limit: int, before: str | None = None, action: str | None = None
    ) -> Sequence[AuditEvent]:
        """Newest first; of all tenants, and of nobody known, for None."""
        query = select(AuditEvent).order_by(AuditEvent.id.desc()).limit(limit)
        if tenant_id is not None:
            query = query.where(AuditEvent.tenant_id == tenant_id)
        if before is not None:
            query = query.where(AuditEvent.id < before)
        if action is not None:
            query = query.where(AuditEvent.action == action)
        return [*self.session.scalars(query)]


_STANDING: tuple[Any, ...] = (
    Tenant.id.label("tenant_id"),
    Tenant.name.label("tenant_name"),
    Tenant.disabled_at,
    Tenant.limits.label("own_limits"),
    Plan.limits.label("plan_limits"),
)
_PLAN = Plan.name == func.coalesce(Tenant.plan, DEFAULT_PLAN)
_OWNER: Select[Any] = (
    select(ApiKey.id, ApiKey.role, ApiKey.expires_at, ApiKey.last_used_at, *_STANDING)
    .select_from(ApiKey)
    .join(Tenant, Tenant.id == ApiKey.tenant_id)
    .outerjoin(Plan, _PLAN)
    .where(ApiKey.revoked_at.is_(None))
)
