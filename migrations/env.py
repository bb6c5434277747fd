"""Alembic's environment: one transaction, an advisory lock and time-outs on PostgreSQL, batch mode on SQLite."""

from __future__ import annotations

import math

from alembic import context
from sqlalchemy import Connection, text

import app.db.orm  # noqa: F401  (the tables register themselves on the metadata)
from app.db.base import Base, make_engine
from app.settings import load_settings

_LOCK = 0x0A22EA1  # any number that no other application uses on this database


def _run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        compare_server_default=True,
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            # Several API processes may start at once: the first migrates, the others wait, then find nothing to do.
            connection.execute(text("SET LOCAL lock_timeout = '60s'"))
            # A change of a large table takes as long as it takes; the service's own statements do not.
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _LOCK})
        context.run_migrations()


def main() -> None:
    connection = context.config.attributes.get("connection")
    if isinstance(connection, Connection):
        _run(connection)
        return
    # A server that rewrites a large table says nothing for as long as that takes.
    engine = make_engine(context.config.attributes.get("url") or load_settings().database, silence_s=math.inf)
    try:
        with engine.connect() as fresh:
            _run(fresh)
    finally:
        engine.dispose()


if context.is_offline_mode():
    raise SystemExit("Offline migrations are not supported: the lock and the checks need a connection.")
main()
