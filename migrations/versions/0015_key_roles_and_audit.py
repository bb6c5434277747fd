"""What a key may do and how long, tenants that are switched off, and what was done in whose name.

Every key of before may do what it could: all.

Revision: 0015, after 0014
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from app.db.base import UtcDateTime

revision: str = "0015"
down_revision: str | None = "0014"
branch_labels: str | None = None
depends_on: str | None = None

JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("tenants", sa.Column("disabled_at", UtcDateTime, nullable=True))
    op.add_column("api_keys", sa.Column("role", sa.String(16), nullable=False, server_default=sa.text("'admin'")))
    op.add_column("api_keys", sa.Column("expires_at", UtcDateTime, nullable=True))
    op.add_column("api_keys", sa.Column("last_used_at", UtcDateTime, nullable=True))
    op.create_table(
        "audit_events",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant_id", sa.String(64), sa.ForeignKey("tenants.id"), nullable=True),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("resource", sa.String(200), nullable=True),
        sa.Column("detail", JSON, nullable=False),
        sa.Column("created_at", UtcDateTime, nullable=False),
    )
    op.create_index("ix_audit_events_tenant_id_id", "audit_events", ["tenant_id", "id"])
    op.create_index("ix_audit_events_created_at", "audit_events", ["created_at"])


def downgrade() -> None:
    op.drop_table("audit_events")
    for column in ("last_used_at", "expires_at", "role"):
        op.drop_column("api_keys", column)
    op.drop_column("tenants", "disabled_at")
