"""What was done in whose name, noted in the transaction that does it: neither stands without the other."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from sqlalchemy.orm import Session

from app.db.accounts import AuditEvent
from app.db.ids import new_id
from app.logging import redact
from app.names import storable

SYSTEM = "system"
_LONGEST = 200
_actor: ContextVar[str] = ContextVar("anneal_actor", default=SYSTEM)


def acting(actor: str) -> None:
    """From here on, in this context (a request, with the threads that it asks), it is `actor` who does things."""
    _actor.set(actor)


def current_actor() -> str:
    """Who acts here: `key:key_…` (of a request, or of the session of a browser), `oidc:SUBJECT` (likewise, whom the
    identity provider names), `local` (no key is needed), `operator:NAME` (at the command line), `address:…` (who is
    not known), `system`."""
    return _actor.get()


def as_stored(actor: str) -> str:
    """As rows have it: at most 200 characters that every database takes."""
    return storable(actor)[:_LONGEST]


def record(
    session: Session,
    tenant_id: str | None,
    actor: str,
    action: str,
    resource: str | None = None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Note `action` (`job.submit`, `key.revoke`: what is acted on, and how) on `resource`, an id, in the transaction of
    `session`. Of `detail`, what looks like a secret is left out."""
    session.add(
        AuditEvent(
            id=new_id("aud"),
            tenant_id=tenant_id,
            actor=as_stored(actor),
            action=action,
            resource=None if resource is None else storable(resource)[:_LONGEST],
            detail=dict(redact(None, "", dict(detail or {}))),
        )
    )
