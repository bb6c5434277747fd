"""In whose name a job was submitted: its worker's log lines say so.

Revision: 0021, after 0020
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0021"
down_revision: str | None = "0020"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("actor", sa.String(200), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "actor")
