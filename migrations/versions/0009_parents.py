"""Jobs that are compared by another one.

Revision: 0009, after 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: str | None = None
depends_on: str | None = None

_CHILDREN = sa.text("parent_id IS NOT NULL")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("parent_id", sa.String(64), nullable=True))
    op.create_index(
        "ix_jobs_parent_id", "jobs", ["parent_id", "id"], sqlite_where=_CHILDREN, postgresql_where=_CHILDREN
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_parent_id", "jobs")
    op.drop_column("jobs", "parent_id")
