"""Migrated databases as copies of one that was migrated once in this process: the migrations take longer than most
tests do. That they run, on each kind of database and several at once, `tests/integration/test_migrations.py` shows."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from app.db.migrate import upgrade
from app.settings import Settings


@functools.cache
def migrated_sqlite() -> Path:
    """A migrated SQLite file without rows, to be copied; it goes with this process."""
    folder = Path(tempfile.mkdtemp(prefix="anneal-test-migrated-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    upgrade(f"sqlite:///{folder / 'anneal.db'}")
    return folder / "anneal.db"


def migrate(settings: Settings) -> None:
    """Bring the database of these settings to the newest schema, as `python -m app migrate` does."""
    file = settings.database.removeprefix("sqlite:///")
    if file != settings.database and not Path(file).exists():
        shutil.copy(migrated_sqlite(), file)
    else:
        upgrade(settings.database)
