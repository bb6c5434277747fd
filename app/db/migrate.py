"""Running migrations from code, with the URL of the settings."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

_ROOT = Path(__file__).resolve().parents[2]


def alembic_config(database_url: str) -> Config:
    config = Config(str(_ROOT / "alembic.ini"))
    config.attributes["url"] = database_url
    return config


def upgrade(database_url: str) -> None:
    """Bring the database to the newest revision; several processes may do so at once."""
    command.upgrade(alembic_config(database_url), "head")
