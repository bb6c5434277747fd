"""What the operator counts of the service as a whole, and no worker's end may forget."""

from __future__ import annotations

from sqlalchemy import BigInteger, String
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base


class OperationCount(Base):
    """How often something has happened, ever; `label` is what of it (a failure's code, say). It only grows."""

    __tablename__ = "operation_counts"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    label: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)
