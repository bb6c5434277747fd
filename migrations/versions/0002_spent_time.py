"""What a job has spent of its budget, over all attempts, and when it will probably end.

Revision: 0002, after 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True))
        jobs.add_column(sa.Column("spent_seconds", sa.Float(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("expected_end", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("expected_end")
        jobs.drop_column("spent_seconds")
        jobs.drop_column("claimed_at")
