"""What tells the workers of a machine that one of them is dead.

Revision: 0017, after 0016
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0017"
down_revision: str | None = "0016"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("lease_lock", sa.String(100), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "lease_lock")
