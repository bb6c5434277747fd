"""Who asks: a key, a subject of the identity provider, or the session of a browser that signed in with either, as the
tenant and the role that it has."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import anyio.to_thread
import structlog
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError

from app.db.accounts import LOCAL_TENANT
from app.db.base import utcnow
from app.db.uow import Database
from app.domain.plan import effective
from app.domain.roles import Role
from app.errors import AppError
from app.tenants.repository import TenantRepository

log = structlog.get_logger(__name__)

_LONGEST_KEY = 200
_ROLES = frozenset(Role)
_USE_NOTED = timedelta(minutes=1)
_WRITTEN_S = 5.0
_LONGEST_SHOWN = 150  # of a subject, in audit rows


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def utterable(key: str) -> bool:
    """Whether it can be a key at all; what cannot never reaches the database."""
    return key.isascii() and "\0" not in key and len(key) <= _LONGEST_KEY


@dataclass(frozen=True)
class Caller:
    """`key_id`: None where no key is needed, and where the identity provider says who it is: `subject`. `expires_at`:
    of the key, the token or the session. `disabled`: its tenant is switched off. `requests_per_minute`: that its
    tenant may make, None for any number."""

    tenant_id: str
    role: Role
    key_id: str | None = None
    tenant_name: str = "local"
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    disabled: bool = False
    requests_per_minute: int | None = None
    subject: str | None = None

    @property
    def actor(self) -> str:
        """As audit rows have it."""
        if self.subject is not None:
            return actor_of(self.subject)
        return "local" if self.key_id is None else f"key:{self.key_id}"

    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= utcnow()

    def require(self, role: Role) -> None:
        """403 `role_required` for who may less."""
        if not self.role.may(role):
            detail = f"This needs a key of the role {role.value!r}; this one has the role {self.role.value!r}."
            remedy = "Use a key of that role: an admin of the tenant makes one with POST /v1/keys, or an operator does."
            if role is Role.OPERATOR:
                remedy = "`anneal-admin keys create --role operator` makes one; without keys use `anneal-admin` itself."
            if self.subject is not None:
                detail = f"This needs the role {role.value!r}; the identity provider gives you {self.role.value!r}."
                remedy = "Ask whoever runs the identity provider for that role, or use a key of it."
            extra = {"role": self.role.value, "needed": role.value}
            raise AppError("role_required", "Not allowed", 403, detail, remedy=remedy, extra=extra)

    def admitted(self) -> Caller:
        """Itself; 403 `tenant_disabled` where its tenant is switched off."""
        if self.disabled:
            detail = f"The tenant {self.tenant_name!r} is switched off."
            remedy = "Ask the operator of this service."
            raise AppError("tenant_disabled", "Tenant switched off", 403, detail, remedy=remedy)
        return self


def actor_of(subject: str) -> str:
    """As audit rows have a subject of the identity provider; two that begin alike stay apart."""
    if len(subject) > _LONGEST_SHOWN:
        subject = f"{subject[:_LONGEST_SHOWN]}…{hash_key(subject)[:16]}"
    return f"oidc:{subject}"


LOCAL = Caller(LOCAL_TENANT, Role.ADMIN)  # whoever uses the embedded default


def caller_of_key(db: Database, key: str) -> Caller | None:
    """Who asks with this key, which may have expired; None where there is none, or it was revoked."""
    if not utterable(key):
        return None
    with db.read() as session:
        return _caller(TenantRepository(session).owner_of_key(hash_key(key)))


def caller_of_session(db: Database, token: str) -> Caller | None:
    """The same for a browser's session that has not ended."""
    if not utterable(token):
        return None
    with db.read() as session:
        tenants = TenantRepository(session)
        digest = hash_key(token)
        found = _caller(tenants.owner_of_session(digest))
        if found is None and (row := tenants.owner_of_subjects_session(digest)) is not None:
            found = _subject(row, row.subject, _role(row.role), row.expires_at)
        return found


def caller_of_subject(db: Database, tenant_name: str, subject: str, role: Role, expires_at: datetime) -> Caller | None:
    """Who asks as a subject of the identity provider, in the tenant of this name; None where there is no such one."""
    with db.read() as session:
        row = TenantRepository(session).by_name_with_plan(tenant_name)
        return None if row is None else _subject(row, subject, role, expires_at)


def _subject(row: Row[Any], subject: str, role: Role, expires_at: datetime) -> Caller:
    return Caller(
        tenant_id=row.tenant_id,
        role=role,
        tenant_name=row.tenant_name,
        expires_at=expires_at,
        disabled=row.disabled_at is not None,
        requests_per_minute=effective(row.plan_limits, row.own_limits).requests_per_minute,
        subject=subject,
    )


def _role(name: str) -> Role:
    return Role(name) if name in _ROLES else Role.READ  # what a newer version made


def _caller(row: Row[Any] | None) -> Caller | None:
    if row is None:
        return None
    return Caller(
        tenant_id=row.tenant_id,
        role=_role(row.role),
        key_id=row.id,
        tenant_name=row.tenant_name,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
        disabled=row.disabled_at is not None,
        requests_per_minute=effective(row.plan_limits, row.own_limits).requests_per_minute,
    )


class KeyUses:
    """When keys were used last: noted by requests in memory, written beside them, at most once a minute for a key."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._due: dict[str, datetime] = {}

    def note(self, caller: Caller) -> None:
        now = utcnow()
        last = caller.last_used_at
        if caller.key_id is not None and (last is None or now - last >= _USE_NOTED):
            self._due[caller.key_id] = now

    async def run(self) -> None:
        """In the background, for good. What a database that is away does not take is noted anew by the next use."""
        while True:
            await asyncio.sleep(_WRITTEN_S)
            await self.write()

    async def write(self) -> None:
        due, self._due = self._due, {}
        if due:
            try:
                await anyio.to_thread.run_sync(self._write, due)
            except SQLAlchemyError as error:
                log.warning("key_uses_not_written", error=str(error)[:200])

    def _write(self, due: Mapping[str, datetime]) -> None:
        with self._db.write() as uow:
            for key_id, at in sorted(due.items()):  # one order everywhere
                TenantRepository(uow.session).used(key_id, at, at - _USE_NOTED)
