"""Tables of chains of models. Here for `app.db.orm`, which knows every table."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base


class ChainMember(Base):
    """A model behind the first one of a job's chain, which the job's own row names: by it the job is found."""

    __tablename__ = "chain_members"

    model_id: Mapped[str] = mapped_column(String(64), ForeignKey("source_models.id"), primary_key=True)
    job_id: Mapped[str] = mapped_column(
        String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True, index=True
    )
