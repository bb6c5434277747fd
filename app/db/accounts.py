"""Whose everything is: tenants, their API keys, and the browsers that signed in with one."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, NullableJson, UtcDateTime, utcnow

LOCAL_TENANT = "tnt_local"


class Tenant(Base):
    """`served_at`: when a worker took one of its jobs last (`app.jobs.schedule`). `retention`: days after which what is
    named there expires (`app.blobs.retention`), null for never; the settings say it of what is not named."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    served_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    retention: Mapped[dict[str, int | None] | None] = mapped_column(NullableJson)


class ApiKey(Base):
    """Only the SHA-256 of a key is stored; keys are 256 random bits, so no salt or slow hash is needed."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str] = mapped_column(String(200))
    key_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class BrowserSession(Base):
    """A browser that signed in with an API key; it ends with the key. Of its token, 256 random bits, only the SHA-256
    is stored."""

    __tablename__ = "browser_sessions"

    token_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
