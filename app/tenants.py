"""Tenants, their API keys, and the browsers that signed in with one. Only the SHA-256 of a key is stored; a key is
shown once, when it is made."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from app.db.accounts import LOCAL_TENANT, ApiKey, BrowserSession, Tenant
from app.db.base import utcnow
from app.db.ids import new_id
from app.db.uow import Database

KEY_PREFIX = "ank_"
SESSION_TIME = timedelta(hours=12)
_LONGEST_KEY = 200


class TenantRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    def by_name(self, name: str) -> Tenant | None:
        return self.session.scalar(select(Tenant).where(Tenant.name == name))

    def tenant_of_key(self, key_sha256: str) -> str | None:
        query = select(ApiKey.tenant_id).where(ApiKey.key_sha256 == key_sha256, ApiKey.revoked_at.is_(None))
        return self.session.scalar(query)

    def id_of_key(self, key_sha256: str) -> str | None:
        return self.session.scalar(select(ApiKey.id).where(ApiKey.key_sha256 == key_sha256))

    def revoke(self, key_sha256: str, key_id: str) -> bool:
        """The live key with this digest or this id."""
        which = or_(ApiKey.key_sha256 == key_sha256, ApiKey.id == key_id)
        statement = update(ApiKey).where(which, ApiKey.revoked_at.is_(None))
        return self.session.scalar(statement.values(revoked_at=utcnow()).returning(ApiKey.id)) is not None

    def keys(self, tenant_id: str) -> Sequence[ApiKey]:
        """Newest first, revoked ones too."""
        query = select(ApiKey).where(ApiKey.tenant_id == tenant_id).order_by(ApiKey.id.desc())
        return [*self.session.scalars(query.limit(200))]

    def tenant_of_session(self, token_sha256: str) -> str | None:
        """Of one that has not ended, by time or with its key."""
        query = select(ApiKey.tenant_id).join(BrowserSession, BrowserSession.key_id == ApiKey.id)
        live = [BrowserSession.expires_at > utcnow(), ApiKey.revoked_at.is_(None)]
        return self.session.scalar(query.where(BrowserSession.token_sha256 == token_sha256, *live))

    def forget_sessions(self, token_sha256: str | None = None) -> None:
        """This one; or those whose time is over."""
        over = BrowserSession.expires_at <= utcnow()
        which = over if token_sha256 is None else BrowserSession.token_sha256 == token_sha256
        self.session.execute(delete(BrowserSession).where(which))


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def create_key(db: Database, tenant_name: str, key_name: str) -> str:
    """Make a key for the tenant of this name (made too where there is none) and return it: `ank_` + 43 characters."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    with db.write() as uow:
        tenant = TenantRepository(uow.session).by_name(tenant_name)
        if tenant is None:
            tenant = Tenant(id=new_id("tnt"), name=tenant_name)
            uow.session.add(tenant)
            uow.session.flush()
        uow.session.add(ApiKey(id=new_id("key"), tenant_id=tenant.id, name=key_name, key_sha256=hash_key(key)))
    return key


def key_id(db: Database, key: str) -> str | None:
    """The id of a key, by which it can be revoked without being shown again."""
    with db.read() as session:
        return TenantRepository(session).id_of_key(hash_key(key))


def revoke_key(db: Database, key: str) -> bool:
    """Revoke a key, given itself or its id; False where there is no such live key. Running API processes forget it
    within two seconds."""
    if not key.isascii() or "\0" in key:
        return False
    with db.write() as uow:
        return TenantRepository(uow.session).revoke(hash_key(key), key)


def tenant_of(db: Database, key: str) -> str | None:
    """The tenant id of a live key, or None."""
    if not key.isascii() or len(key) > _LONGEST_KEY:
        return None
    with db.read() as session:
        return TenantRepository(session).tenant_of_key(hash_key(key))


def keys_of(db: Database, tenant_id: str) -> Sequence[ApiKey]:
    """A tenant's keys, newest first, as far as they are known: name and dates."""
    with db.read() as session:
        return TenantRepository(session).keys(tenant_id)


def sign_in(db: Database, key: str) -> str | None:
    """Begin a browser's session by a live key: its token, 43 characters; None for any other key."""
    if tenant_of(db, key) is None:
        return None
    token, now = secrets.token_urlsafe(32), utcnow()
    with db.write() as uow:
        tenants = TenantRepository(uow.session)
        tenants.forget_sessions()
        by = tenants.id_of_key(hash_key(key))
        uow.session.add(
            BrowserSession(token_sha256=hash_key(token), key_id=by, created_at=now, expires_at=now + SESSION_TIME)
        )
    return token


def sign_out(db: Database, token: str) -> None:
    """End a browser's session. Other API processes forget it within two seconds."""
    with db.write() as uow:
        TenantRepository(uow.session).forget_sessions(hash_key(token))


def tenant_of_session(db: Database, token: str) -> str | None:
    """The tenant id of a session that has not ended, or None."""
    if not token.isascii() or len(token) > _LONGEST_KEY:
        return None
    with db.read() as session:
        return TenantRepository(session).tenant_of_session(hash_key(token))


__all__ = [
    "KEY_PREFIX",
    "LOCAL_TENANT",
    "SESSION_TIME",
    "create_key",
    "key_id",
    "keys_of",
    "revoke_key",
    "sign_in",
    "sign_out",
    "tenant_of",
    "tenant_of_session",
]
