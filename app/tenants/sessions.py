"""Browsers that sign in with an API key, or at the identity provider, for some hours."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import timedelta

from app.audit import record
from app.db.accounts import BrowserSession, SubjectSession
from app.db.base import utcnow
from app.db.uow import Database
from app.names import storable
from app.tenants.callers import Caller, actor_of, caller_of_key, hash_key, utterable
from app.tenants.repository import TenantRepository

SESSION_TIME = timedelta(hours=12)


def sign_in(db: Database, key: str, address: str = "") -> str | None:
    """Begin a browser's session by a live key: its token, 43 characters; None for any other key. 403 where the key's
    tenant is switched off. `address`: of the browser, for the audit row."""
    caller = caller_of_key(db, key)
    if caller is None or caller.expired() or caller.disabled:
        _note_refusal(db, key, address)
        if caller is not None:
            caller.admitted()
        return None
    token, now = secrets.token_urlsafe(32), utcnow()
    with db.write() as uow:
        TenantRepository(uow.session).forget_sessions()
        uow.session.add(
            BrowserSession(
                token_sha256=hash_key(token), key_id=caller.key_id, created_at=now, expires_at=now + SESSION_TIME
            )
        )
        record(uow.session, caller.tenant_id, caller.actor, "session.begin", caller.key_id, {"address": address})
    return token


def sign_in_subject(db: Database, caller: Caller, name: str, lasts: timedelta, address: str = "") -> str:
    """The same for a subject of the identity provider, who is shown as `name`."""
    if caller.disabled:
        note_refused_subject(db, caller.subject or "", "tenant_disabled", address, caller.tenant_id)
        caller.admitted()
    token, now = secrets.token_urlsafe(32), utcnow()
    with db.write() as uow:
        TenantRepository(uow.session).forget_sessions()
        uow.session.add(
            SubjectSession(
                token_sha256=hash_key(token),
                tenant_id=caller.tenant_id,
                subject=caller.subject,
                name=name,
                role=caller.role.value,
                created_at=now,
                expires_at=now + lasts,
            )
        )
        detail = {"address": address, "name": name, "role": caller.role.value}
        record(uow.session, caller.tenant_id, caller.actor, "session.begin", None, detail)
    return token


def note_refused_subject(db: Database, subject: str, code: str, address: str, tenant_id: str | None = None) -> None:
    """Of a person whom the provider knows, and who has no place here."""
    with db.write() as uow:
        detail = {"address": address, "reason": code}
        record(uow.session, tenant_id, actor_of(subject), "session.refuse", None, detail)


def sign_out(db: Database, token: str) -> None:
    """End a browser's session. Other API processes forget it within two seconds."""
    with db.write() as uow:
        TenantRepository(uow.session).forget_sessions(hash_key(token))


def sessions(db: Database, tenant_id: str | None, *, limit: int) -> Sequence[SubjectSession]:
    """Of subjects of the identity provider, those that have not ended, newest first; of all tenants for None."""
    with db.read() as session:
        return TenantRepository(session).subjects_sessions(tenant_id, limit=limit)


def end_sessions(db: Database, subject: str, *, actor: str) -> int:
    """Sign a subject out everywhere: how many browsers that were. API processes forget them within two seconds. What
    the subject may do with a token of the provider's, and with keys that it made, stays as it is."""
    with db.write() as uow:
        tenants = TenantRepository(uow.session)
        found = tenants.subjects_sessions(None, subject=storable(subject))
        for row in found:
            uow.session.delete(row)
        for tenant_id in sorted({row.tenant_id for row in found}):
            record(uow.session, tenant_id, actor, "session.end", None, {"subject": subject})
        return len(found)


def _note_refusal(db: Database, key: str, address: str) -> None:
    """Of a key that has ended, in its tenant's name; of what is none, in nobody's. Never what was typed."""
    with db.write() as uow:
        tenants = TenantRepository(uow.session)
        row = tenants.key(tenants.named("", hash_key(key))) if utterable(key) else None
        tenant_id, resource = (None, None) if row is None else (row.tenant_id, row.id)
        record(uow.session, tenant_id, f"address:{address or 'unknown'}", "session.refuse", resource)
