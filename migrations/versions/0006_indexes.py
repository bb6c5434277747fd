"""An index for every question that was answered by reading a whole table.

On PostgreSQL they are built beside running jobs, outside a transaction. One that is interrupted stays there unusable:
so each step begins with removing what stands under its name, and the migration can be run again from where it stopped.

Revision: 0006, after 0005
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | None = None
depends_on: str | None = None

_NEW: Sequence[tuple[str, list[str], str | None]] = (
    ("engines", ["tenant_id", "bundle_sha256"], None),
    ("engines", ["tenant_id", "sha256"], None),
    ("jobs", ["model_id", "id"], None),
    ("jobs", ["tenant_id", "manifest_sha256"], None),
    ("jobs", ["tenant_id", "report_sha256"], None),
    ("jobs", ["tenant_id", "status", "id"], None),
    ("uploads", ["tenant_id", "sha256"], None),
)
# What the new ones begin with.
_OLD: Sequence[tuple[str, list[str], str | None]] = (
    ("jobs", ["model_id"], None),
    ("jobs", ["tenant_id", "status"], None),
    ("uploads", ["tenant_id"], None),
)
_UNTALLIED = ("jobs", ["status", "queue"], "tallied_at IS NULL")


def upgrade() -> None:
    with _outside_a_transaction():
        for index in _NEW:
            _create(*index)
        _create(*_UNTALLIED, name="ix_jobs_untallied")
        for table, columns, _ in _OLD:
            _drop(_name(table, columns), table)


def downgrade() -> None:
    with _outside_a_transaction():
        for index in _OLD:
            _create(*index)
        _drop("ix_jobs_untallied", "jobs")
        for table, columns, _ in _NEW:
            _drop(_name(table, columns), table)


def _outside_a_transaction() -> AbstractContextManager[None]:
    return op.get_context().autocommit_block() if _on_postgres() else nullcontext()


def _on_postgres() -> bool:
    return op.get_bind().dialect.name == "postgresql"


def _name(table: str, columns: Sequence[str]) -> str:
    return f"ix_{table}_{'_'.join(columns)}"


def _create(table: str, columns: list[str], where: str | None, name: str | None = None) -> None:
    name = name or _name(table, columns)
    _drop(name, table)
    condition = sa.text(where) if where else None
    op.create_index(
        name,
        table,
        columns,
        postgresql_where=condition,
        sqlite_where=condition,
        postgresql_concurrently=_on_postgres(),
    )


def _drop(name: str, table: str) -> None:
    op.drop_index(name, table, if_exists=True, postgresql_concurrently=_on_postgres())
