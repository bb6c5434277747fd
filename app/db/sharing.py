"""What the worker of a running job hands out to others of its kind."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, JsonColumn, UtcDateTime, utcnow


class SharedCall(Base):
    """A call of a job's search that another worker may answer, as long as the job runs under this `token`. `id`: of
    what is asked; `kind`: of the workers whose answer would be the same; `apart`: the machine on which nobody is to.
    Those with a small `turn` are taken first.

    `lease_owner` holds it until `lease_expires_at`, for the `takes`-th time, which fences off who held it before. From
    `begun_at` on it computes, now the stage with the key `doing`; `ended_at`: the results are in storage."""

    __tablename__ = "shared_calls"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    token: Mapped[int] = mapped_column(Integer)
    kind: Mapped[str] = mapped_column(String(64), index=True)
    apart: Mapped[str | None] = mapped_column(String(64))
    turn: Mapped[int] = mapped_column(Integer)
    body: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    offered_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utcnow)
    takes: Mapped[int] = mapped_column(Integer, default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    begun_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    doing: Mapped[str | None] = mapped_column(String(64))
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
