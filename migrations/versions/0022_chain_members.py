"""Which jobs have a model in their chains, behind the first one. No release before knows chains: there is nothing to
fill in.

Revision: 0022, after 0021
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0022"
down_revision: str | None = "0021"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.create_table(
        "chain_members",
        sa.Column("model_id", sa.String(64), sa.ForeignKey("source_models.id"), primary_key=True),
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    )
    op.create_index("ix_chain_members_job_id", "chain_members", ["job_id"])


def downgrade() -> None:
    op.drop_table("chain_members")
