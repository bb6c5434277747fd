"""Tenants, plans, keys, workers and audit rows of all tenants, as an operator's programs see them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.blobs.retention import LONGEST_DAYS
from app.domain.plan import Limits
from app.schemas import ItemPage, Resource
from app.tenants.schemas import AuditOut, KeyMade, KeyOut, UsageOut

TenantName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
PlanName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
_Days = Annotated[int, Field(ge=1, le=LONGEST_DAYS)] | Literal["default"] | None


class RetentionIn(BaseModel):
    """Days until each kind expires; null: never; `default`: as the settings of the service say. What is not named stays
    as it is."""

    model_config = ConfigDict(extra="forbid")

    jobs: _Days = None
    events: _Days = None
    engines: _Days = None
    models: _Days = None
    datasets: _Days = None
    uploads: _Days = None
    results: _Days = None


class RetentionOut(BaseModel):
    """Days until each kind expires; null: never."""

    jobs: int | None
    events: int | None
    engines: int | None
    models: int | None
    datasets: int | None
    uploads: int | None
    results: int | None


class TenantIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: TenantName
    plan: PlanName | None = Field(default=None, description="null: the plan `default`")


class TenantChange(BaseModel):
    """What is not named stays as it is."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool | None = Field(
        default=None, description="false: its keys and browsers get 403 within two seconds; its jobs go on to their end"
    )
    plan: PlanName | None = None
    limits: Limits | None = Field(default=None, description="Its own, before those of its plan; null in it: no limit")
    clear_limits: bool = Field(default=False, description="Drop the limits of its own that it has")
    retention: RetentionIn | None = None


class TenantStanding(Resource):
    """A tenant, what holds for it, and what it uses."""

    name: str
    plan: str
    limits: Limits
    own_limits: list[str] = Field(description="Names of those that are its own, not its plan's")
    usage: UsageOut
    retention: RetentionOut
    disabled_at: datetime | None


class TenantPage(ItemPage[TenantStanding]):
    """Tenants."""


class PlanIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limits: Limits = Field(description="In the place of those that it has; what is not named is not limited by it")


class PlanOut(BaseModel):
    name: str
    limits: Limits
    created_at: datetime


class PlanList(BaseModel):
    """All plans, by name."""

    plans: list[PlanOut]


class OperatorKey(KeyOut):
    """A key, and whose."""

    tenant_id: str


class OperatorKeyMade(KeyMade):
    """A new key, and whose. It is shown this once."""

    tenant_id: str


class OperatorKeyPage(ItemPage[OperatorKey]):
    """Keys of all tenants, or of one."""


class OperatorAudit(AuditOut):
    """Something that was done, and in whose name; null where that is not known."""

    tenant_id: str | None


class OperatorAuditPage(ItemPage[OperatorAudit]):
    """What was done in any tenant's name."""


class WorkerState(BaseModel):
    id: str
    state: Literal["live", "draining", "gone"]
    hostname: str
    hardware: str | None
    queues: list[str]
    jobs: list[str] = Field(description="Those that it holds")
    last_seen_at: datetime
    missing: list[str] = Field(description="What this machine lacks to keep untrusted models apart")


class WorkerList(BaseModel):
    """Workers of the last 24 hours."""

    workers: list[WorkerState]


class Requeued(BaseModel):
    jobs: list[str] = Field(description="Those that went back to the queue")


class SessionOut(BaseModel):
    """A browser that somebody signed in with at the identity provider."""

    subject: str
    name: str | None
    tenant_id: str
    role: str
    created_at: datetime
    expires_at: datetime


class SessionList(BaseModel):
    """Those that have not ended, newest first."""

    sessions: list[SessionOut]


class SubjectIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    subject: Annotated[str, StringConstraints(min_length=1, max_length=255)]


class SessionsEnded(BaseModel):
    ended: int
