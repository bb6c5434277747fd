"""The declarative base, portable column types and engine construction. Nothing connects here."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, DateTime, Engine, MetaData, create_engine, event, make_url
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.types import TypeDecorator

from app.db.clock import CLOCK
from app.names import storable

# Names are explicit so that migrations can find a constraint on every database.
NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

JsonColumn = JSON().with_variant(JSONB(), "postgresql")
NullableJson = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")  # None is NULL, not `null`


def dump_json(value: Any) -> str:
    """JSON that every database stores: NUL and lone surrogates, which PostgreSQL refuses, become U+FFFD. Names are
    checked where they come in; this is for what quotes them all the same, such as a library's error message."""
    text = json.dumps(value)
    # In ASCII both can only stand there escaped; pairs of surrogates (emoji) look alike and come out as they were.
    if "\\u0000" in text or "\\ud" in text:
        text = json.dumps(_storable(value))
    return text


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item) for item in value]
    return value


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes on every database (SQLite stores none with a zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("naive datetime")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


_SILENCE_S = 75.0  # longer than any statement may take


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)


def utcnow() -> datetime:
    """By the clock that all processes share."""
    return datetime.fromtimestamp(CLOCK.now(), UTC)


def make_engine(url: str, silence_s: float = _SILENCE_S) -> Engine:
    """An engine for SQLite (WAL, writers queue on the write lock) or PostgreSQL (statement time-out; a server that says
    nothing for `silence_s` is given up)."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(url, parsed.database)
    from app.db.postgres import make_postgres_engine

    return make_postgres_engine(
        url, silence_s, json_serializer=dump_json, pool_pre_ping=True, pool_size=10, max_overflow=20
    )


def _sqlite(url: str, database: str | None) -> Engine:
    if database:
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url,
        json_serializer=dump_json,
        connect_args={"timeout": 20, "check_same_thread": False},
        pool_size=20,
        max_overflow=40,
    )

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # this module says BEGIN itself, see below
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")  # WAL: safe against process death, loses nothing committed by it
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA busy_timeout=20000")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Any) -> None:
        # A deferred transaction that turns into a writer fails at once with "database is locked" where another wrote
        # in between; a writer that takes the lock first waits for its turn.
        write = connection.get_execution_options().get("anneal_write", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
