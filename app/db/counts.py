"""Counts that outlive the process which counts, kept with what they count in one transaction.

They are written last, just before the commit, and in one order: a row that everybody writes is held for the length of
a commit, and nobody who holds one waits for anything else. So only what is rare is counted here; what happens at every
job or stage is counted in the workers' own metrics.
"""

from __future__ import annotations

import functools
from collections import Counter

from sqlalchemy import Executable, bindparam, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.db.operations import OperationCount

FAILED = "jobs_failed"  # by code
REQUEUED = "jobs_requeued"  # by what led to it

_NOTED = "anneal_counts"
_LONGEST = 64


def note(session: Session, name: str, label: str) -> None:
    """Count it once more, if this transaction is committed."""
    noted: Counter[tuple[str, str]] = session.info.setdefault(_NOTED, Counter())
    noted[name, label[:_LONGEST]] += 1


def write_noted(session: Session) -> None:
    """Of `Database.write`, before it commits."""
    noted: Counter[tuple[str, str]] = session.info.pop(_NOTED, Counter())
    if not noted:
        return
    session.flush()  # whatever else this transaction locks, it has locked by now
    more = _more(session.get_bind().dialect.name)
    for (name, label), value in sorted(noted.items()):
        session.execute(more, {"of": name, "by": label, "more": value})


@functools.cache
def _more(dialect: str) -> Executable:
    """Adds `more` to what stands under the name `of` and the label `by`. Composed once for each dialect."""
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    table = OperationCount.metadata.tables[OperationCount.__tablename__]
    row = insert(table).values(name=bindparam("of"), label=bindparam("by"), value=bindparam("more"))
    more = {"value": table.c.value + row.excluded.value}
    return row.on_conflict_do_update(index_elements=["name", "label"], set_=more)


def counted(session: Session) -> dict[str, dict[str, int]]:
    """Name → label → how often."""
    found: dict[str, dict[str, int]] = {}
    for name, label, value in session.execute(select(OperationCount.name, OperationCount.label, OperationCount.value)):
        found.setdefault(name, {})[label] = value
    return found
