"""A tenant's own account, its keys and what was done in its name, as clients see them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.db.accounts import ApiKey, AuditEvent
from app.domain.plan import Limits
from app.domain.roles import Role
from app.schemas import ItemPage, Resource, UploadName
from app.tenants.keys import LONGEST_GRACE, LONGEST_LIFE, USUAL_GRACE


class UsageOut(BaseModel):
    """What stands against the limits."""

    stored_bytes: int
    upload_bytes: int = Field(description="What open upload sessions were declared with; it counts for `stored_bytes`")
    jobs_queued: int
    jobs_running: int
    gpu_seconds: float = Field(description="Of the last 30 days, running jobs included")


class TenantOut(BaseModel):
    """Whose key or token this is, what it may do, and how much of the service is left."""

    id: str
    name: str
    role: Role = Field(description="Of the key or the token that asks")
    key_id: str | None = Field(description="Of the key that asks; null where none is needed, and for a token")
    key_expires_at: datetime | None
    subject: str | None = Field(
        default=None, description="Who asks, as the identity provider has it: `sub` of the token; null for a key"
    )
    plan: str
    limits: Limits
    usage: UsageOut
    created_at: datetime
    links: dict[str, str]


class KeyIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: UploadName = Field(description="What the key is for")
    role: Literal[Role.READ, Role.SUBMIT, Role.ADMIN] = Field(default=Role.SUBMIT, description="What it may do")
    expires_in_days: int | None = Field(
        default=None, ge=1, le=LONGEST_LIFE.days, description="null: it does not end by itself"
    )


class RotationIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    grace_seconds: int = Field(
        default=int(USUAL_GRACE.total_seconds()),
        ge=0,
        le=int(LONGEST_GRACE.total_seconds()),
        description="How long the old key goes on beside the new one",
    )


class KeyOut(Resource):
    """A key as far as it is known: all but the key itself."""

    name: str
    role: Role
    expires_at: datetime | None
    last_used_at: datetime | None = Field(description="To within a minute")
    revoked_at: datetime | None

    @classmethod
    def of(cls, row: ApiKey) -> KeyOut:
        return cls(**_fields(row))


class KeyMade(KeyOut):
    """A new key. It is shown this once."""

    key: str

    @classmethod
    def made(cls, row: ApiKey, secret: str) -> KeyMade:
        return cls(**_fields(row), key=secret)


def _fields(row: ApiKey) -> dict[str, Any]:
    self = f"/v1/keys/{row.id}"
    return {
        "id": row.id,
        "created_at": row.created_at,
        "name": row.name,
        "role": Role(row.role),
        "expires_at": row.expires_at,
        "last_used_at": row.last_used_at,
        "revoked_at": row.revoked_at,
        "links": {"self": self, "rotate": f"{self}/rotate"},
    }


class KeyPage(ItemPage[KeyOut]):
    """A tenant's keys."""


class AuditOut(BaseModel):
    """Something that was done."""

    id: str
    created_at: datetime
    actor: str = Field(
        description="`key:key_…`, `oidc:SUBJECT` of the identity provider, `local` where no key is needed, "
        "`operator:NAME`, `address:…` of who is not known, or `system`"
    )
    action: str = Field(description="What is acted on, and how", examples=["job.submit", "key.revoke", "session.begin"])
    resource: str | None = Field(description="Its id")
    detail: dict[str, Any]

    @classmethod
    def of(cls, row: AuditEvent) -> AuditOut:
        return cls(
            id=row.id,
            created_at=row.created_at,
            actor=row.actor,
            action=row.action,
            resource=row.resource,
            detail=row.detail,
        )


class AuditPage(ItemPage[AuditOut]):
    """What was done in a tenant's name."""
