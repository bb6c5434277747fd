"""Migrations: up from empty, nothing left to generate, one head, down again, and safe when several start at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.blobs.references import referenced
from app.capabilities.repository import StatisticsRepository
from app.db import postgres
from app.db.base import make_engine
from app.db.migrate import alembic_config
from app.db.orm import LOCAL_TENANT
from app.settings import Settings

_NOW = "'2026-11-01 12:00:00'"
_MODEL = f"""
    INSERT INTO source_models
        (id, tenant_id, name, filename, format, sha256, size_bytes, inputs, outputs, detail, created_at)
    VALUES ('mdl_1', '{LOCAL_TENANT}', 'net', 'net.onnx', 'onnx', '{"a" * 64}', 1, '[]', '[]', '{{}}', {_NOW})
"""
_JOB = f"""
    INSERT INTO jobs
        (id, tenant_id, model_id, status, progress, spec, queue, stages, engine_ids, report_sha256, correlation_id,
         version, attempts, fencing_token, dispatches, webhook_attempts, created_at, finished_at)
    VALUES ('job_1', '{LOCAL_TENANT}', 'mdl_1', 'failed', 0, '{{}}', 'q', '[]', '[]', '{"r" * 64}', 'c',
         2, 1, 1, 1, 0, {_NOW}, {_NOW})
"""
_EVENT = f"""
    INSERT INTO job_events (job_id, seq, type, data, created_at) VALUES ('job_1', 1, 'state', '{{}}', {_NOW})
"""
_OUTPUTS = (
    {"model": [{"name": "m", "sha256": "b" * 64}], "data": [{"sha256": "c" * 64}, {"sha256": "b" * 64}]},
    {"model": [{"name": "m", "sha256": "d" * 64, "size_bytes": 1}]},
    {"model": []},
    {},
)
_RESULTS = [
    f"""
    INSERT INTO stage_results (tenant_id, key, stage, outputs, data, seconds, created_at, used_at)
    VALUES ('{LOCAL_TENANT}', '{key}', 'export', '{json.dumps(outputs)}', '{{}}', 1.0, {_NOW}, {_NOW})
    """
    for key, outputs in enumerate(_OUTPUTS)
]
_OF_VERSION_0004 = [_MODEL, _JOB, _EVENT, *_RESULTS]


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


def test_several_processes_may_migrate_at_once(fresh_postgres: str) -> None:
    command_line = [sys.executable, "-m", "app", "migrate"]
    environment = {**os.environ, "DATABASE_URL": fresh_postgres}
    processes = [subprocess.Popen(command_line, env=environment) for _ in range(3)]
    assert [p.wait(timeout=60) for p in processes] == [0, 0, 0]
    assert "jobs" in _tables(Settings(DATABASE_URL=fresh_postgres).database)


def test_what_stood_there_before_is_found_afterwards(database_url: str) -> None:
    config = alembic_config(database_url)
    command.upgrade(config, "0004")
    engine = make_engine(database_url)
    try:
        with engine.begin() as connection:
            for statement in _OF_VERSION_0004:
                connection.exec_driver_sql(statement)
        for _ in range(2):
            command.upgrade(config, "head")
            command.check(config)
            with Session(engine) as session:
                held = [sha256 * 64 for sha256 in "abcdr"]
                assert referenced(session, LOCAL_TENANT, [*held, "e" * 64]) == set(held)
                assert referenced(session, "tnt_other", held) == set()
                assert StatisticsRepository(session).job_counts()[0]["failed"] == 1
                assert StatisticsRepository(session).tally(10) == 1
                session.commit()
                assert StatisticsRepository(session).job_counts()[0]["failed"] == 1
            command.downgrade(config, "0004")
            with engine.connect() as connection:
                events = connection.exec_driver_sql("SELECT count(*) FROM job_events").scalar_one()
                assert events == 1, "what refers to a table that was changed is still there"
    finally:
        engine.dispose()


def test_an_index_that_was_left_half_built_is_built_again(fresh_postgres: str) -> None:
    url = Settings(DATABASE_URL=fresh_postgres).database
    config = alembic_config(url)
    command.upgrade(config, "0005")
    engine = make_engine(url)
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE INDEX ix_jobs_untallied ON jobs (status)")
            connection.exec_driver_sql(
                "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_jobs_untallied'::regclass"
            )
        command.upgrade(config, "head")
        command.check(config)
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM pg_index WHERE NOT indisvalid").scalar_one() == 0
    finally:
        engine.dispose()


_SLOW = """
from alembic import op

revision, down_revision, branch_labels, depends_on = "9999", "{head}", None, None


def upgrade():
    op.execute("SELECT pg_sleep(1.5)")
    op.execute("CREATE TABLE slowly_made (id int)")


def downgrade():
    op.execute("DROP TABLE slowly_made")
"""


def test_a_migration_takes_as_long_as_it_takes(
    fresh_postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is longer than any statement of the service may be, and says nothing meanwhile."""
    monkeypatch.setattr(postgres, "_STATEMENT_S", 0.4)
    monkeypatch.setattr(make_engine, "__defaults__", (0.5,))  # silence_s
    url = Settings(DATABASE_URL=fresh_postgres).database
    config = alembic_config(url)
    command.upgrade(config, "head")
    head = ScriptDirectory.from_config(config).get_current_head()
    (tmp_path / "9999_slow.py").write_text(_SLOW.format(head=head))
    own = Path(config.get_main_option("script_location") or "") / "versions"
    config.set_main_option("version_locations", os.pathsep.join([str(own), str(tmp_path)]))
    command.upgrade(config, "head")
    assert "slowly_made" in _tables(url)

    engine = make_engine(url)
    try:
        with engine.connect() as connection:
            began = time.monotonic()
            with pytest.raises(OperationalError, match="statement timeout"):
                connection.execute(text("SELECT pg_sleep(30)"))
            assert time.monotonic() - began < 20
    finally:
        engine.dispose()
