"""Who completes an upload, and why one was aborted.

Revision: 0003, after 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    with op.batch_alter_table("uploads") as uploads:
        uploads.add_column(sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True))
        json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
        uploads.add_column(sa.Column("error", json, nullable=True))
        uploads.create_index(op.f("ix_uploads_lease_expires_at"), ["lease_expires_at"])


def downgrade() -> None:
    with op.batch_alter_table("uploads") as uploads:
        uploads.drop_index(op.f("ix_uploads_lease_expires_at"))
        uploads.drop_column("error")
        uploads.drop_column("lease_expires_at")
