"""Which stage results hold a blob, and how many jobs have ended in which way: found and counted without a walk through
the whole table.

Workers of the version before go on meanwhile. A result that they write is not noted here: its files may be collected
after their grace, and it is made again when it is wanted. A job that they end is tallied like any other.

Revision: 0005, after 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | None = None
depends_on: str | None = None

_NOTE = {
    "postgresql": """
        INSERT INTO stage_files (tenant_id, key, sha256)
        SELECT DISTINCT r.tenant_id, r.key, file.value ->> 'sha256'
        FROM stage_results r, jsonb_each(r.outputs) output, jsonb_array_elements(output.value) file
    """,
    "sqlite": """
        INSERT INTO stage_files (tenant_id, key, sha256)
        SELECT DISTINCT r.tenant_id, r.key, json_extract(file.value, '$.sha256')
        FROM stage_results r, json_each(r.outputs) output, json_each(output.value) file
    """,
}


def upgrade() -> None:
    op.create_table(
        "stage_files",
        sa.Column("tenant_id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "key"],
            ["stage_results.tenant_id", "stage_results.key"],
            name=op.f("fk_stage_files_tenant_id_stage_results"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "key", "sha256", name=op.f("pk_stage_files")),
    )
    op.execute(_NOTE[op.get_bind().dialect.name])
    # After the rows: built in one go.
    op.create_index("ix_stage_files_tenant_id_sha256", "stage_files", ["tenant_id", "sha256"])

    tallies = op.create_table(
        "job_tallies",
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("jobs", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("status", name=op.f("pk_job_tallies")),
    )
    op.bulk_insert(tallies, [{"status": status, "jobs": 0} for status in ("succeeded", "failed", "cancelled")])
    # No ended job bears it yet: workers tally them, some at a time.
    op.add_column("jobs", sa.Column("tallied_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    # Not in batch mode, which makes the table anew on SQLite and takes what refers to it along.
    op.execute("ALTER TABLE jobs DROP COLUMN tallied_at")
    op.drop_table("job_tallies")
    op.drop_table("stage_files")
