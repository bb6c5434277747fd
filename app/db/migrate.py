"""Running migrations from code, with the URL of the settings."""

from __future__ import annotations

import functools
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from app.db.uow import Database
from app.errors import AppError

# Beside `app`, in the checkout as in an installed wheel, which has no alembic.ini: that is for the command line.
_MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"


def alembic_config(database_url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["url"] = database_url
    return config


def upgrade(database_url: str) -> None:
    """Bring the database to the newest revision; several processes may do so at once."""
    command.upgrade(alembic_config(database_url), "head")


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
