"""Alembic's environment: one process at a time on PostgreSQL, as long as it takes, beside a service that goes on; batch
mode on SQLite."""

from __future__ import annotations

import math
import time
from typing import Any

from alembic import context
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError

import app.db.orm  # noqa: F401  (the tables register themselves on the metadata)
from app.db.base import Base, make_engine
from app.db.retired import RETIRED
from app.settings import load_settings

_LOCK = 0x0A22EA1  # any number that no other application uses on this database
_LOOK_S = 0.1
# Whoever waits for a table's lock holds up all that come later, so it is not waited for but asked for again
# (`app.db.migrate.upgrade`): for less than PostgreSQL takes to look for deadlocks, so that it is the migration that
# gives in. An index that is built beside others holds up nobody while it waits for their transactions.
_LOCK_MS = 800
_CONCURRENT_LOCK_MS = 900_000


def _run(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        _prepare_postgres(connection)
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        include_object=_is_known,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        compare_server_default=True,
        # One that builds an index beside running jobs commits in its midst.
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def _is_known(item: Any, name: str | None, kind: str, reflected: bool, _to: Any) -> bool:
    """Not what is there for the release before alone."""
    return not (kind == "column" and reflected and (item.table.name, name) in RETIRED)


def _prepare_postgres(connection: Connection) -> None:
    """Several API processes may start at once: the first migrates, the others wait, then find nothing to do."""
    # A change of a large table takes as long as it takes; the service's own statements do not.
    connection.execute(text("SET statement_timeout = 0"))
    connection.commit()
    _end_with_the_client(connection)
    # The connection's, over all its transactions. Who waits for it does so in none: an index built beside others
    # waits for all of their transactions, and the two would wait for each other.
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:n)"), {"n": _LOCK}):
        connection.rollback()
        time.sleep(_LOOK_S)
    connection.commit()
    event.listen(connection, "before_cursor_execute", _set_patience)


def _end_with_the_client(connection: Connection) -> None:
    """A migration that is killed in a long statement goes on in the server, and keeps the lock, unless that looks."""
    try:
        connection.execute(text("SET client_connection_check_interval = '2s'"))
    except DBAPIError:  # before PostgreSQL 14, or on a system where it cannot
        connection.rollback()
    connection.commit()


def _set_patience(_connection: Connection, cursor: Any, statement: str, *_: object) -> None:
    cursor.execute(f"SET lock_timeout = {_CONCURRENT_LOCK_MS if 'CONCURRENTLY' in statement else _LOCK_MS}")


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
