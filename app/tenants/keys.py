"""API keys: made, listed, replaced, revoked. Only the SHA-256 of a key is stored; it is shown once, when it is made."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from app.audit import record
from app.db.accounts import ApiKey, Tenant
from app.db.base import utcnow
from app.db.ids import new_id
from app.db.uow import Database, UnitOfWork
from app.domain.roles import Role
from app.errors import AppError, conflict, not_found
from app.tenants.callers import hash_key, utterable
from app.tenants.repository import TenantRepository

KEY_PREFIX = "ank_"
MOST_LIVE = 200  # keys of a tenant
LONGEST_LIFE = timedelta(days=3650)
LONGEST_GRACE = timedelta(days=30)
USUAL_GRACE = timedelta(days=1)


@dataclass(frozen=True)
class MadeKey:
    """A new key: its row, and what is shown once, `ank_` and 43 characters."""

    row: ApiKey
    secret: str


class KeyService:
    """Calls block. `tenant_id`: None for an operator, who may name any tenant's key. `actor`: see `app.audit`."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def make(self, tenant_id: str, name: str, role: Role, life: timedelta | None, *, actor: str) -> MadeKey:
        """A new key of a tenant, for good or for so long. 409 where it has very many."""
        with self._db.write() as uow:
            tenant = TenantRepository(uow.session).get(tenant_id, lock=True)
            if tenant is None:
                raise not_found("tenant", tenant_id)
            return self._make(uow, tenant, name, role, life, actor)

    def get(self, tenant_id: str, key_id: str) -> ApiKey | None:
        with self._db.read() as session:
            tenants = TenantRepository(session)
            return tenants.key(tenants.named(key_id), tenant_id=tenant_id)

    def page(self, tenant_id: str | None, *, limit: int, before: str | None = None) -> Sequence[ApiKey]:
        """Newest first, as far as they are known: all but the keys themselves."""
        with self._db.read() as session:
            return TenantRepository(session).page(tenant_id, limit=limit, before=before)

    def revoke(self, tenant_id: str | None, key_id: str, *, actor: str, key_sha256: str = "") -> ApiKey:
        """End a live key, given its id (or digest). Running API processes forget it within two seconds. 404 where there
        is none; nothing where it is revoked already."""
        with self._db.write() as uow:
            row = self._named(uow, tenant_id, key_id, key_sha256)
            if row.revoked_at is None:
                row.revoked_at = utcnow()
                record(uow.session, row.tenant_id, actor, "key.revoke", row.id, {"name": row.name})
            return row

    def rotate(self, tenant_id: str | None, key_id: str, grace: timedelta, *, actor: str) -> MadeKey:
        """A new key in the place of a live one, of the same name, role and length of life; the old one ends after
        `grace`, or when it would have anyway."""
        with self._db.write() as uow:
            old = self._named(uow, tenant_id, key_id)
            now = utcnow()
            if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= now):
                raise conflict("key_ended", "The key has ended: there is nothing to replace.", "Make a new one.")
            tenant = TenantRepository(uow.session).get(old.tenant_id)
            assert tenant is not None  # a foreign key
            life = None if old.expires_at is None else old.expires_at - old.created_at
            made = self._make(uow, tenant, old.name, Role(old.role), life, actor, replaces=old.id)
            old.expires_at = min(old.expires_at or now + grace, now + grace)
            return made

    def _named(self, uow: UnitOfWork, tenant_id: str | None, key_id: str, key_sha256: str = "") -> ApiKey:
        tenants = TenantRepository(uow.session)
        row = tenants.key(tenants.named(key_id, key_sha256), tenant_id=tenant_id, lock=True)
        if row is None:
            raise not_found("key", key_id)
        return row

    def _make(
        self,
        uow: UnitOfWork,
        tenant: Tenant,
        name: str,
        role: Role,
        life: timedelta | None,
        actor: str,
        *,
        replaces: str | None = None,
    ) -> MadeKey:
        if TenantRepository(uow.session).count_live(tenant.id) >= MOST_LIVE:
            detail = f"The tenant has {MOST_LIVE} live keys already."
            raise AppError("too_many_keys", "Too many keys", 409, detail, remedy="Revoke those that nobody uses.")
        secret, now = KEY_PREFIX + secrets.token_urlsafe(32), utcnow()
        row = ApiKey(
            id=new_id("key"),
            tenant_id=tenant.id,
            name=name,
            key_sha256=hash_key(secret),
            role=role.value,
            created_at=now,
            expires_at=None if life is None else now + life,
        )
        uow.session.add(row)
        told: dict[str, Any] = {"name": name, "role": role.value}
        if row.expires_at is not None:
            told["expires_at"] = row.expires_at.isoformat()
        if replaces is not None:
            told["old"] = replaces
        record(uow.session, tenant.id, actor, "key.rotate" if replaces else "key.create", row.id, told)
        return MadeKey(row, secret)


def create_key(db: Database, tenant_name: str, key_name: str, role: Role = Role.ADMIN, actor: str = "operator") -> str:
    """Make a key for the tenant of this name (made too where there is none) and return it: `ank_` + 43 characters."""
    with db.write() as uow:
        tenant = TenantRepository(uow.session).by_name(tenant_name)
        if tenant is None:
            tenant = Tenant(id=new_id("tnt"), name=tenant_name)
            uow.session.add(tenant)
            uow.session.flush()
            record(uow.session, tenant.id, actor, "tenant.create", tenant.id, {"name": tenant_name})
    return KeyService(db).make(tenant.id, key_name, role, None, actor=actor).secret


def key_id(db: Database, key: str) -> str | None:
    """The id of a key, by which it can be revoked without being shown again."""
    with db.read() as session:
        tenants = TenantRepository(session)
        row = tenants.key(tenants.named("", hash_key(key)))
        return None if row is None else row.id


def revoke_key(db: Database, key: str, actor: str = "operator") -> bool:
    """Revoke a key, given itself or its id; False where there is no such live key."""
    if not utterable(key):
        return False
    with db.read() as session:
        tenants = TenantRepository(session)
        row = tenants.key(tenants.named(key, hash_key(key)))
    if row is None or row.revoked_at is not None:
        return False
    KeyService(db).revoke(None, row.id, actor=actor)
    return True
