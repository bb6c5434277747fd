"""Running migrations from code, with the URL of the settings."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.exc import OperationalError

from app.db.base import make_engine
from app.db.uow import Database
from app.errors import AppError

# Beside `app`, in the checkout as in an installed wheel, which has no alembic.ini: that is for the command line.
_MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"


log = structlog.get_logger(__name__)

_PATIENCE_S = 30.0  # with those who hold what a migration needs
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 3.0
_IN_THE_WAY = ("55P03", "40P01")  # SQLSTATE: lock not available, deadlock detected
_OLD_TRANSACTIONS = text("""
    SELECT format('pid %s (%s, %s), open for %s s', pid, coalesce(nullif(application_name, ''), usename), state,
        round(extract(epoch FROM clock_timestamp() - xact_start)))
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
    ORDER BY xact_start LIMIT 3
""")


def alembic_config(database_url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = database_url
    return config


def upgrade(database_url: str, patience_s: float = _PATIENCE_S) -> None:
    """Bring the database to the newest revision, beside a service that goes on; several processes may do so at once.

    A table that somebody holds is asked for again and again, in between all others get through. Raises `AppError` where
    it is still held after `patience_s`; whatever was done by then stays, and the next call goes on from there."""
    until, pause = time.monotonic() + patience_s, _FIRST_PAUSE_S
    while True:
        try:
            command.upgrade(alembic_config(database_url), "head")
            return
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) not in _IN_THE_WAY:
                raise
            if time.monotonic() + pause > until:
                raise _blocked(database_url) from error
            log.warning("migration_waits", again_in_s=pause, error=str(error.orig)[:200])
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _blocked(database_url: str) -> AppError:
    engine = make_engine(database_url)
    try:
        with engine.connect() as connection:
            oldest = [*connection.scalars(_OLD_TRANSACTIONS)]
    finally:
        engine.dispose()
    detail = f"A table is held by other transactions. The oldest ones are: {'; '.join(oldest) or 'gone by now'}."
    remedy = "Wait for them to end, or end them (`SELECT pg_terminate_backend(PID)`), and run it again."
    return AppError("migration_blocked", "Blocked", 503, detail, retryable=True, remedy=remedy)


def check_revision(db: Database) -> str:
    """The database's revision, if this code can work with it: the newest one, or one that this code does not know yet,
    because a newer version has migrated first. Raises `AppError` where migrations are missing."""
    newest, known = _revisions()
    with db.read() as session:
        found = None
        if inspect(session.connection()).has_table("alembic_version"):
            found = session.scalar(text("SELECT version_num FROM alembic_version"))
    if found is None or (found in known and found != newest):
        detail = f"The database is at revision {found}, not at {newest}: run `python -m app migrate`."
        raise AppError("not_migrated", "Not migrated", 503, detail, retryable=True)
    return str(found)


@functools.cache
def _revisions() -> tuple[str | None, frozenset[str]]:
    """The newest revision, and all that this code knows."""
    scripts = ScriptDirectory.from_config(alembic_config(""))
    return scripts.get_current_head(), frozenset(script.revision for script in scripts.walk_revisions())
