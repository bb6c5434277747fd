"""Plans, the limits of a tenant, and what its jobs have spent on GPUs.

Revision: 0016, after 0015
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from app.db.base import UtcDateTime

revision: str = "0016"
down_revision: str | None = "0015"
branch_labels: str | None = None
depends_on: str | None = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    plans = op.create_table(
        "plans",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("limits", JSON, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
    )
    # What the service itself takes: nothing changes for whoever has no other plan.
    op.execute(plans.insert().values(name="default", limits={}, created_at=sa.func.now()))
    op.add_column("tenants", sa.Column("plan", sa.String(64), nullable=True))
    op.add_column("tenants", sa.Column("limits", JSON, nullable=True))
    op.create_table(
        "gpu_uses",
        sa.Column("tenant_id", sa.String(64), sa.ForeignKey("tenants.id"), primary_key=True),
        sa.Column("day", sa.Date(), primary_key=True),
        sa.Column("seconds", sa.Float(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("gpu_uses")
    op.drop_column("tenants", "limits")
    op.drop_column("tenants", "plan")
    op.drop_table("plans")
