"""Alembic's environment: one process at a time on PostgreSQL, as long as it takes; batch mode on SQLite."""

from __future__ import annotations

import math
import time

from alembic import context
from sqlalchemy import Connection, text

import app.db.orm  # noqa: F401  (the tables register themselves on the metadata)
from app.db.base import Base, make_engine
from app.settings import load_settings

_LOCK = 0x0A22EA1  # any number that no other application uses on this database
_LOOK_S = 0.1


def _run(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        _prepare_postgres(connection)
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        compare_server_default=True,
        # One that builds an index beside running jobs commits in its midst.
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def _prepare_postgres(connection: Connection) -> None:
    """Several API processes may start at once: the first migrates, the others wait, then find nothing to do."""
    # A change of a large table takes as long as it takes; the service's own statements do not.
    connection.execute(text("SET statement_timeout = 0"))
    connection.execute(text("SET lock_timeout = '60s'"))
    connection.commit()
    # The connection's, over all its transactions. Who waits for it does so in none: an index built beside others
    # waits for all of their transactions, and the two would wait for each other.
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:n)"), {"n": _LOCK}):
        connection.rollback()
        time.sleep(_LOOK_S)
    connection.commit()


def main() -> None:
    # A server that works on one statement for long says nothing meanwhile.
    engine = make_engine(context.config.attributes.get("url") or load_settings().database, silence_s=math.inf)
    try:
        with engine.connect() as connection:
            _run(connection)
    finally:
        engine.dispose()


if context.is_offline_mode():
    raise SystemExit("Offline migrations are not supported: the lock and the checks need a connection.")
main()
