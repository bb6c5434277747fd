"""Which backends take a model: questions, and the workers' answers.

Revision: 0007, after 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from app.db.base import JsonColumn, UtcDateTime

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.create_table(
        "examinations",
        sa.Column("model_id", sa.String(64), sa.ForeignKey("source_models.id"), primary_key=True),
        sa.Column("backend", sa.String(64), primary_key=True),
        sa.Column("tenant_id", sa.String(64), sa.ForeignKey("tenants.id"), nullable=False),
        sa.Column("version", sa.String(200), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("answer", JsonColumn, nullable=True),
        sa.Column("error", JsonColumn, nullable=True),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("lease_owner", sa.String(200), nullable=True),
        sa.Column("lease_expires_at", UtcDateTime, nullable=True),
        sa.Column("asked_at", UtcDateTime, nullable=False),
        sa.Column("answered_at", UtcDateTime, nullable=True),
        sa.CheckConstraint("status IN ('asked', 'answered', 'failed')", name="status"),
    )
    waits = sa.text("status = 'asked'")
    op.create_index("ix_examinations_asked", "examinations", ["asked_at"], sqlite_where=waits, postgresql_where=waits)


def downgrade() -> None:
    op.drop_table("examinations")
