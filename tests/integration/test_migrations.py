"""Migrations: up from empty, nothing left to generate, one head, down again, and safe when several start at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from app.db import postgres
from app.db.base import make_engine
from app.db.migrate import alembic_config
from app.settings import Settings


def _tables(url: str) -> set[str]:
    engine = make_engine(url)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def test_up_check_down_up(database_url: str) -> None:
    config = alembic_config(database_url)
    command.upgrade(config, "head")
    command.check(config)
    assert {"jobs", "engines", "api_keys", "tenants"} <= _tables(database_url)
    command.downgrade(config, "base")
    assert _tables(database_url) <= {"alembic_version"}
    command.upgrade(config, "head")


def test_one_head() -> None:
    assert len(ScriptDirectory.from_config(alembic_config("sqlite://")).get_heads()) == 1


def test_a_migration_takes_as_long_as_it_takes(fresh_postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the service's time-out of statements ends it, nor its patience with a server that says nothing."""
    with psycopg.connect(fresh_postgres, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION slow() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF to_regclass('public.alembic_version') IS NULL THEN PERFORM pg_sleep(2); END IF; END $$"
        )
        connection.execute("CREATE EVENT TRIGGER slow ON ddl_command_start EXECUTE FUNCTION slow()")
    monkeypatch.setattr(postgres, "_STATEMENT_S", 1.0)
    monkeypatch.setattr(make_engine, "__defaults__", (1.0,))
    started = time.monotonic()
    command.upgrade(alembic_config(Settings(DATABASE_URL=fresh_postgres).database), "head")
    assert time.monotonic() - started > 2
    monkeypatch.undo()
    assert "jobs" in _tables(Settings(DATABASE_URL=fresh_postgres).database)


def test_several_processes_may_migrate_at_once(fresh_postgres: str) -> None:
    command_line = [sys.executable, "-m", "app", "migrate"]
    environment = {**os.environ, "DATABASE_URL": fresh_postgres}
    processes = [subprocess.Popen(command_line, env=environment) for _ in range(3)]
    assert [p.wait(timeout=60) for p in processes] == [0, 0, 0]
    assert "jobs" in _tables(Settings(DATABASE_URL=fresh_postgres).database)
