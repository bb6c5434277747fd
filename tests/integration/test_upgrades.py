"""Migrations beside the release before: what they leave it, what they hold, and what holds them up."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import CheckConstraint, Engine, ForeignKeyConstraint, MetaData, Table, UniqueConstraint, event

import app.db.orm  # noqa: F401
from app.db.base import Base, make_engine
from app.db.migrate import alembic_config, upgrade
from app.db.retired import RETIRED
from app.errors import AppError
from app.settings import Settings
from tests.factories.previous_release import NoHistory, check_out, previous_release
from tests.integration.conftest import Desk

PREVIOUS = previous_release()
# What an index, a check or a foreign key on a table of before may not do: hold it while it reads all of it.
_READS_ALL = re.compile(
    r"(CREATE (UNIQUE )?INDEX (?!CONCURRENTLY)"
    r"|ALTER TABLE \w+ (ADD CONSTRAINT (?!.*NOT VALID)|ALTER COLUMN \w+ (SET NOT NULL|TYPE)))",
    re.IGNORECASE | re.DOTALL,
)
_TABLE = re.compile(r"^\s*(?:ALTER TABLE (\w+)|CREATE (?:UNIQUE )?INDEX .*? ON (\w+))", re.IGNORECASE | re.DOTALL)


@pytest.fixture
def url(fresh_postgres: str) -> str:
    """A database of the release before."""
    url = Settings(DATABASE_URL=fresh_postgres).database
    command.upgrade(alembic_config(url), PREVIOUS.revision)
    return url


def reflected(url: str) -> MetaData:
    engine = make_engine(url)
    try:
        found = MetaData()
        found.reflect(engine)
        return found
    finally:
        engine.dispose()


def _demands(table: Table) -> set[str]:
    """Names of what refuses rows."""
    kinds = (CheckConstraint, UniqueConstraint, ForeignKeyConstraint)
    constraints = {str(c.name) for c in table.constraints if isinstance(c, kinds)}
    return constraints | {str(index.name) for index in table.indexes if index.unique}


def test_the_release_before_goes_on_with_the_new_schema(url: str) -> None:
    """It finds what it knows, and what it writes is taken."""
    before = reflected(url)
    upgrade(url)
    after = reflected(url)
    for table in before.sorted_tables:
        now = after.tables[table.name]
        for column in table.columns:
            if f"{table.name}.{column.name}" in PREVIOUS.retired:
                continue
            assert column.name in now.columns, f"{table.name}.{column.name} is gone"
            changed = now.columns[column.name]
            assert str(changed.type) == str(column.type), f"{table.name}.{column.name}"
            assert changed.nullable >= column.nullable, f"{table.name}.{column.name} may no longer be NULL"
        for column in now.columns:
            new = column.name not in table.columns
            assert not new or column.nullable or column.server_default is not None, f"{table.name}.{column.name}"
        more = _demands(now) - _demands(table)
        assert not more, f"{table.name}: the release before may break {more}"


def test_what_is_kept_for_the_release_before_is_written_without_it(url: str) -> None:
    upgrade(url)
    after = reflected(url)
    for table, name in RETIRED:
        column = after.tables[table].columns[name]
        assert column.nullable or column.server_default is not None
        assert name not in Base.metadata.tables[table].columns


@contextmanager
def listening(told: Callable[[str], None]) -> Iterator[None]:
    def tell(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        told(statement)

    event.listen(Engine, "before_cursor_execute", tell)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", tell)


def test_no_migration_rewrites_or_reads_a_table_that_it_holds(url: str) -> None:
    """Of those of this release, on PostgreSQL: tables that were there before may have any number of rows."""
    config, before = alembic_config(url), set(reflected(url).tables)
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:

        def files() -> dict[str, int]:
            query = "SELECT relname, relfilenode FROM pg_class WHERE relkind = 'r' AND relname = ANY(%s)"
            return dict(connection.execute(query, [sorted(before)]).fetchall())

        stored = files()
        for script in reversed([*ScriptDirectory.from_config(config).iterate_revisions("head", PREVIOUS.revision)]):
            statements = list[str]()
            with listening(statements.append):
                command.upgrade(config, script.revision)
            assert files() == stored, f"{script.revision} rewrites a table"
            for statement in statements:
                found = _TABLE.match(statement)
                if found and (found[1] or found[2]) in before:
                    assert not _READS_ALL.search(statement), f"{script.revision}: {statement}"


def test_a_table_that_is_held_for_long(url: str) -> None:
    """It is told who holds it; whoever comes meanwhile gets through; and it can be run again."""
    plain, through, over = url.replace("+psycopg", ""), list[int](), threading.Event()

    def go_on() -> None:
        with psycopg.connect(plain, autocommit=True) as other:
            other.execute("SET lock_timeout = '20s'")  # the service's own
            while not over.is_set():
                other.execute("SELECT count(*) FROM jobs")
                through.append(1)
                time.sleep(0.01)

    service = threading.Thread(target=go_on)
    with psycopg.connect(plain) as holder:
        holder.execute("SELECT * FROM jobs")
        service.start()
        try:
            with pytest.raises(AppError, match=f"pid {holder.info.backend_pid} ") as blocked:
                upgrade(url, patience_s=2)
        finally:
            over.set()
            service.join()
        assert blocked.value.code == "migration_blocked"
        assert blocked.value.retryable
        assert "run it again" in (blocked.value.remedy or "")
    assert len(through) > 1
    upgrade(url)
    command.check(alembic_config(url))


def test_a_migration_that_is_killed_half_way(url: str) -> None:
    """Its columns are there and its index is half built: the server gives up for it, and the next one goes on."""
    plain = url.replace("+psycopg", "")
    building = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' "
        "AND query LIKE 'CREATE INDEX CONCURRENTLY%'"
    )
    environment = {**os.environ, "DATABASE_URL": plain}
    with psycopg.connect(plain) as old, psycopg.connect(plain, autocommit=True) as looking:
        # An index that is built beside others waits for every transaction that is older.
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1")
        process = subprocess.Popen([sys.executable, "-m", "app", "migrate"], env=environment)
        try:
            deadline = time.monotonic() + 30
            while not _count(looking, building):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert _count(looking, "SELECT count(*) FROM pg_index WHERE NOT indisvalid")
        while _count(looking, building):  # although what it waits for is still there
            assert time.monotonic() < deadline
            time.sleep(0.1)
    upgrade(url)
    command.check(alembic_config(url))
    with psycopg.connect(plain) as connection:
        assert not _count(connection, "SELECT count(*) FROM pg_index WHERE NOT indisvalid")


def _count(connection: psycopg.Connection[Any], query: str) -> int:
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_worker_of_the_release_before_reads_a_job_of_this_one(desk: Desk, tmp_path: Path) -> None:
    """A field that it does not know would fail the job there; one that is left at its default stays away."""
    try:
        tree = check_out(tmp_path / "previous")
    except NoHistory as missing:
        pytest.skip(str(missing))
    stored = json.dumps(desk.submit().spec)
    read = (
        "import json, sys; from app.domain.spec import OptimizationSpec; "
        "OptimizationSpec.model_validate(json.load(sys.stdin)); import app; print(app.__file__)"
    )
    assert tree.run(os.environ, sys.executable, "-c", read, stdin=stored).startswith(str(tree.folder))
