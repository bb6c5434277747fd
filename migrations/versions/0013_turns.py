"""Whose turn is next: priorities, pauses and latest starts of jobs; workers that take no more of them.

On PostgreSQL the indexes are built beside running jobs, outside a transaction. One that is interrupted can be run again
from where it stopped: columns that are there are left alone, and an index begins with removing what stands under its
name.

Revision: 0013, after 0012
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import sqlalchemy as sa
from alembic import op

from app.db.base import UtcDateTime

revision: str = "0013"
down_revision: str | None = "0012"
branch_labels: str | None = None
depends_on: str | None = None

_QUEUED = sa.text("status = 'queued'")
_BOUNDED = sa.text("status = 'queued' AND start_by IS NOT NULL")
_TURN = ["tenant_id", "turn", "id", "queue"]


def upgrade() -> None:
    _add("jobs", sa.Column("priority", sa.Integer, nullable=False, server_default=sa.text("0")))
    _add("jobs", sa.Column("turn", sa.Integer, nullable=False, server_default=sa.text("1")))
    _add("jobs", sa.Column("not_before", UtcDateTime, nullable=True))
    _add("jobs", sa.Column("start_by", UtcDateTime, nullable=True))
    _add("tenants", sa.Column("served_at", UtcDateTime, nullable=True))
    _add("workers", sa.Column("draining_at", UtcDateTime, nullable=True))
    with _outside_a_transaction():
        _drop_indexes()
        concurrently = _on_postgres()
        op.create_index(
            "ix_jobs_waiting", "jobs", _TURN,
            sqlite_where=_QUEUED, postgresql_where=_QUEUED, postgresql_concurrently=concurrently,
        )  # fmt: skip
        op.create_index(
            "ix_jobs_start_by", "jobs", ["start_by"],
            sqlite_where=_BOUNDED, postgresql_where=_BOUNDED, postgresql_concurrently=concurrently,
        )  # fmt: skip


def downgrade() -> None:
    with _outside_a_transaction():
        _drop_indexes()
    op.drop_column("workers", "draining_at")
    op.drop_column("tenants", "served_at")
    for name in ("start_by", "not_before", "turn", "priority"):
        op.drop_column("jobs", name)


def _add(table: str, column: sa.Column[Any]) -> None:
    if column.name not in {found["name"] for found in sa.inspect(op.get_bind()).get_columns(table)}:
        op.add_column(table, column)


def _drop_indexes() -> None:
    for name in ("ix_jobs_waiting", "ix_jobs_start_by"):
        op.drop_index(name, "jobs", if_exists=True, postgresql_concurrently=_on_postgres())


def _outside_a_transaction() -> AbstractContextManager[None]:
    return op.get_context().autocommit_block() if _on_postgres() else nullcontext()


def _on_postgres() -> bool:
    return op.get_bind().dialect.name == "postgresql"
