"""Whose end the webhook endpoints were told, and columns that nobody writes any more get a default.

Jobs of before have nothing to tell: endpoints are younger than they are. Those that are queued or run may be ended by a
worker of the release before, which tells no endpoint. One that is interrupted can be run again.

Revision: 0019, after 0018
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0019"
down_revision: str | None = "0018"
branch_labels: str | None = None
depends_on: str | None = None

_UNTOLD = sa.text("finished_at IS NOT NULL AND NOT told")


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        _on_postgres()
        return
    op.add_column("jobs", sa.Column("told", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute("UPDATE jobs SET told = true WHERE finished_at IS NOT NULL")
    op.create_index("ix_jobs_untold", "jobs", ["finished_at"], sqlite_where=_UNTOLD)
    # SQLite changes no default of a column. What stands there counts for nobody.
    op.drop_column("jobs", "dispatches")
    op.add_column("jobs", sa.Column("dispatches", sa.Integer(), nullable=False, server_default=sa.text("0")))


def _on_postgres() -> None:
    if "told" not in {column["name"] for column in sa.inspect(op.get_bind()).get_columns("jobs")}:
        # A constant is the default of all rows that there are, without one being written.
        op.add_column("jobs", sa.Column("told", sa.Boolean(), nullable=False, server_default=sa.true()))
    op.alter_column("jobs", "told", server_default=sa.false())
    op.alter_column("jobs", "dispatches", server_default=sa.text("0"))
    with op.get_context().autocommit_block():
        op.execute("UPDATE jobs SET told = false WHERE status IN ('queued', 'running')")
        op.drop_index("ix_jobs_untold", "jobs", if_exists=True, postgresql_concurrently=True)
        op.create_index(
            "ix_jobs_untold", "jobs", ["finished_at"], postgresql_where=_UNTOLD, postgresql_concurrently=True
        )


def downgrade() -> None:
    op.drop_index("ix_jobs_untold", "jobs")
    op.drop_column("jobs", "told")
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("jobs", "dispatches", server_default=None)
