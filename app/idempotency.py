"""`Idempotency-Key`: the same key and request answers the same resource; the same key with another request is refused.

The answer is noted in the transaction that makes the resource. Where two equal requests race, the second commit fails
on the primary key (`IntegrityError`): `once` rolls it back and has it done again, and then `recall` finds the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.db.orm import IdempotencyKey
from app.errors import AppError, conflict


@dataclass(frozen=True)
class Idempotency:
    """The client's key and the hex SHA-256 over everything that its request says (kind, fields, content)."""

    key: str
    request_sha256: str


T = TypeVar("T")


def once(idempotency: Idempotency | None, make: Callable[[], T]) -> T:
    """What `make` answers, a transaction that begins with `recall`; where another request with the same key won at the
    same time, that one's resource."""
    try:
        return make()
    except IntegrityError:
        if idempotency is None:
            raise
        return make()


def recall(session: Session, tenant_id: str, idempotency: Idempotency | None) -> str | None:
    """The id of the resource that this key made, or None; raises 409 `idempotency_conflict` for another request."""
    if idempotency is None:
        return None
    row = session.get(IdempotencyKey, (tenant_id, idempotency.key))
    if row is None:
        return None
    if row.request_sha256 != idempotency.request_sha256:
        raise conflict(
            "idempotency_conflict",
            "This Idempotency-Key was used for another request.",
            remedy="Send a new Idempotency-Key with every new request; repeat one only with the same body.",
        )
    return row.resource_id


def resource_gone(kind: str) -> AppError:
    """What a repeated request gets whose resource was made, and deleted since: neither it nor another one."""
    detail = f"The {kind} that this Idempotency-Key made was deleted."
    return conflict("idempotency_resource_gone", detail, "Send a new Idempotency-Key to make another one.")


def remember(session: Session, tenant_id: str, idempotency: Idempotency | None, resource_id: str) -> None:
    """Note that this key made `resource_id`; to be called in the transaction that makes it."""
    if idempotency is None:
        return
    session.add(
        IdempotencyKey(
            tenant_id=tenant_id,
            key=idempotency.key,
            request_sha256=idempotency.request_sha256,
            resource_id=resource_id,
        )
    )
