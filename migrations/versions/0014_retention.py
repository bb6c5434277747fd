"""Retention by tenant, an index of ended jobs to find those that expire, and engines that outlive their job.

The release before goes on beside this one: it looks at none of it, and a job that was deleted is not there for it
either.

Revision: 0014, after 0013
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision: str = "0014"
down_revision: str | None = "0013"
branch_labels: str | None = None
depends_on: str | None = None

_JOB = "fk_engines_job_id_jobs"
_ENDED = sa.text("finished_at IS NOT NULL")


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        # Beside running jobs; one that was interrupted is built again.
        with op.get_context().autocommit_block():
            op.drop_index("ix_jobs_ended", "jobs", if_exists=True, postgresql_concurrently=True)
            op.create_index(
                "ix_jobs_ended",
                "jobs",
                ["tenant_id", "finished_at"],
                postgresql_where=_ENDED,
                postgresql_concurrently=True,
            )
    else:
        op.create_index("ix_jobs_ended", "jobs", ["tenant_id", "finished_at"], sqlite_where=_ENDED)
    # Nothing refers to this table, so on SQLite it can be made anew.
    with op.batch_alter_table("engines") as engines:
        engines.drop_constraint(_JOB, type_="foreignkey")
    op.add_column("tenants", sa.Column("retention", sa.JSON().with_variant(JSONB(), "postgresql"), nullable=True))


def downgrade() -> None:
    op.drop_column("tenants", "retention")
    op.execute("DELETE FROM engines WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.id = engines.job_id)")
    with op.batch_alter_table("engines") as engines:
        engines.create_foreign_key(_JOB, "jobs", ["job_id"], ["id"])
    op.drop_index("ix_jobs_ended", "jobs")
