"""Whose everything is: tenants and their plans, their API keys, the browsers that signed in with one, and what was done
in whose name."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

from sqlalchemy import Date, Float, ForeignKey, Index, String, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, JsonColumn, NullableJson, UtcDateTime, utcnow

LOCAL_TENANT = "tnt_local"


class Plan(Base):
    """Limits that tenants share (`app.domain.plan.Limits`, without those that are not set)."""

    __tablename__ = "plans"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    limits: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)


class Tenant(Base):
    """`disabled_at`: since then its keys open nothing. `plan`: its name, None for the default one; `limits` stand in
    the place of the plan's. `served_at`: when a worker took one of its jobs last (`app.jobs.schedule`). `retention`:
    days after which what is named there expires (`app.blobs.retention`), null for never; the settings say it of what
    is not named."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    served_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    retention: Mapped[dict[str, int | None] | None] = mapped_column(NullableJson)
    disabled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    plan: Mapped[str | None] = mapped_column(String(64))
    limits: Mapped[dict[str, Any] | None] = mapped_column(JsonColumn)


class GpuUse(Base):
    """Seconds that a tenant's jobs have spent on GPUs, by the day (UTC) on which they ended or were given back. They
    stay when the jobs are deleted."""

    __tablename__ = "gpu_uses"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    seconds: Mapped[float] = mapped_column(Float)


class ApiKey(Base):
    """Only the SHA-256 of a key is stored; keys are 256 random bits, so no salt or slow hash is needed. `role`:
    `app.domain.roles`. `last_used_at` is right to within a minute."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str] = mapped_column(String(200))
    key_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(16), default="admin", server_default=text("'admin'"))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class BrowserSession(Base):
    """A browser that signed in with an API key; it ends with the key. Of its token, 256 random bits, only the SHA-256
    is stored."""

    __tablename__ = "browser_sessions"

    token_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class SubjectSession(Base):
    """A browser that signed in at the identity provider, as its subject `subject`, who is shown as `name`. What the
    provider said of tenant and role at that time holds until the session ends."""

    __tablename__ = "subject_sessions"

    token_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    subject: Mapped[str] = mapped_column(String(255))
    name: Mapped[str] = mapped_column(String(200))
    role: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class AuditEvent(Base):
    """What was done, by whom, to what (`app.audit`). `tenant_id`: None where it is not known whose name was meant."""

    __tablename__ = "audit_events"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str | None] = mapped_column(ForeignKey("tenants.id"))
    actor: Mapped[str] = mapped_column(String(200))
    action: Mapped[str] = mapped_column(String(64))
    resource: Mapped[str | None] = mapped_column(String(200))
    detail: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow, index=True)

    __table_args__ = (Index("ix_audit_events_tenant_id_id", "tenant_id", "id"),)
