"""What the service asks of a database with many rows, on SQLite and PostgreSQL: never to read a whole table."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select

from app.blobs.references import forget_results, is_referenced, is_uploaded, keep_result, referenced, references_between
from app.blobs.retention import Retention, change_policy
from app.capabilities.repository import StatisticsRepository
from app.db.orm import LOCAL_TENANT, Dataset, Job, SourceModel, StageFile, StageResult, Tenant
from app.db.uow import Database
from app.jobs.ledger import Claim
from app.jobs.removal import remove_engine, remove_jobs
from app.jobs.repository import JobRepository
from app.jobs.schedule import Offer
from app.library import LibraryRepository
from app.operations.statistics import take
from app.settings import LimitSettings, RetentionSettings, Settings
from app.tenants.quotas import Quotas
from app.web.repository import PageRepository
from tests.factories import filled
from tests.integration.conftest import Desk

_ROWS = 20_000
_LARGE = "jobs|engines|stage_results|stage_files|blobs"
_Statement = tuple[str, Any]


@contextmanager
def _watched(db: Database) -> Iterator[list[_Statement]]:
    seen: list[_Statement] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        seen.append((statement, parameters))

    event.listen(db.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(db.engine, "before_cursor_execute", note)


def _walks(db: Database, statement: _Statement) -> list[str]:
    """Where the plan reads a large table from end to end."""
    postgres = db.engine.dialect.name == "postgresql"
    explain = "EXPLAIN " if postgres else "EXPLAIN QUERY PLAN "
    with db.engine.connect() as connection:
        rows = connection.exec_driver_sql(explain + statement[0], statement[1]).all()
    plan = [str(row[-1]).strip() for row in rows]
    whole = rf"Seq Scan on ({_LARGE})\b" if postgres else rf"SCAN ({_LARGE})\b(?!.* USING .*INDEX ix_jobs_untallied)"
    return [f"{line} ← {statement[0]}" for line in plan if re.search(whole, line)]


@pytest.fixture
def grown(database: Database) -> Database:
    filled.fill(database.engine, _ROWS)
    with database.write() as uow:
        while StatisticsRepository(uow.session).tally(_ROWS):
            pass
    filled.analyze(database.engine)
    return database


def test_nothing_reads_a_whole_table(grown: Database) -> None:
    digest = filled.digest
    many = [digest(kind, n) for kind in ("report", "engine", "bundle", "output") for n in range(1, 101)]
    with _watched(grown) as seen, grown.write() as uow:
        session = uow.session
        for kind in ("model", "report", "manifest", "engine", "bundle", "output"):
            assert is_referenced(session, LOCAL_TENANT, digest(kind, 7))
        assert not is_referenced(session, LOCAL_TENANT, "f" * 64)
        assert not is_referenced(session, "tnt_other", digest("report", 7))
        assert not is_uploaded(session, LOCAL_TENANT, digest("report", 7))
        assert referenced(session, LOCAL_TENANT, [*many, "f" * 64]) == set(many)
        assert LibraryRepository(session, SourceModel).active_job(LOCAL_TENANT, filled.model_id(3)) is None
        assert LibraryRepository(session, Dataset).active_job(LOCAL_TENANT, "dst_1") is None
        jobs = JobRepository(session)
        for status, model in ((None, None), ("failed", None), ("running", None), (None, filled.model_id(3))):
            page = jobs.page(LOCAL_TENANT, limit=10, before=None, status=status, model_id=model)
            assert len(page) == (0 if status == "running" else 10)
        page = PageRepository(session).lines(LOCAL_TENANT, limit=10, model_id=filled.model_id(3))
        assert [line.behind for line in page] == [1] * 10
        assert Quotas(session, LOCAL_TENANT, LimitSettings()).jobs() == {}
        statistics = StatisticsRepository(session)
        assert statistics.job_counts() == ({"succeeded": 18_000, "failed": 2_000, "cancelled": 0}, {})
        assert statistics.tally(10) == 0
        assert take(session, [], tenants=5).waiting == {}
        forget_results(session, LOCAL_TENANT, digest("output", 7))
        assert not is_referenced(session, LOCAL_TENANT, digest("output", 7))
    assert len(seen) > 40
    asked = [statement for statement in seen if statement[0].startswith(("SELECT", "DELETE", "UPDATE"))]
    walks = [walk for statement in asked for walk in _walks(grown, statement)]
    assert not walks, "\n\n".join(walks)


def test_jobs_of_a_model_are_those_that_have_it_in_any_place(grown: Database) -> None:
    first = filled.JOBS_OF_A_MODEL
    own = [filled.job_id(n) for n in range(2 * first + 1, 3 * first + 1)]
    chained = [filled.job_id(n) for n in range(filled.CHAINED_EVERY, _ROWS + 1, filled.CHAINED_EVERY)]
    with grown.read() as session:

        def ids(model: int, tenant: str = LOCAL_TENANT, **asked: Any) -> list[str]:
            given = {"limit": 1000, "before": None, "status": None, **asked}
            return [job.id for job in JobRepository(session).page(tenant, model_id=filled.model_id(model), **given)]

        everything = sorted([*own, *chained], reverse=True)
        assert ids(3) == everything
        assert ids(3, limit=7, before=everything[6]) == everything[7:14], "the next page"
        assert ids(3, status="succeeded") == [i for i in own[::-1] if not i.endswith("0")], "every tenth job failed"
        assert ids(4) == [filled.job_id(n) for n in range(4 * first, 3 * first, -1)]
        assert ids(3, tenant="tnt_other") == []


def test_what_expires_is_found_without_reading_all(grown: Database, tmp_path: Path) -> None:
    never = RetentionSettings(jobs_days=36_500, engines_days=36_500, models_days=36_500, datasets_days=36_500)
    settings = Settings(home=tmp_path, retention=never)
    with grown.write() as uow:
        change_policy(uow.session, LOCAL_TENANT, {"results": 36_500, "events": 36_500}, ())
    with _watched(grown) as seen:
        assert sum(Retention(grown, settings).walk()) == 0
        with grown.write() as uow:
            first, last = filled.digest("report", 1), filled.digest("report", 100)
            assert len(references_between(uow.session, LOCAL_TENANT, first, last)) == 100
            number = filled.digest("engine", 7)[-32:]
            assert remove_engine(uow.session, LOCAL_TENANT, f"eng_{number}") is not None
            assert remove_jobs(uow.session, LOCAL_TENANT, [f"job_{number}"]).job_ids == [f"job_{number}"]
    asked = [statement for statement in seen if statement[0].startswith(("SELECT", "DELETE", "UPDATE"))]
    walks = [walk for statement in asked for walk in _walks(grown, statement)]
    assert len(asked) > 10
    assert not walks, "\n\n".join(walks)


# Results and their files


def _result(key: str, *digests: str) -> StageResult:
    files = [{"name": f"{i}", "sha256": sha256, "size_bytes": 1} for i, sha256 in enumerate(digests)]
    return StageResult(
        tenant_id=LOCAL_TENANT, key=key, stage="export", outputs={"model": files}, data={}, failure=None, seconds=1.0
    )


def test_the_files_of_a_result_are_those_of_its_last_version(database: Database) -> None:
    old, both, new = ("a" * 64, "b" * 64, "c" * 64)
    with database.write() as uow:
        keep_result(uow.session, _result("1" * 64, old, both, both))
        keep_result(uow.session, _result("2" * 64, both))
    with database.write() as uow:
        keep_result(uow.session, _result("1" * 64, both, new))
        assert referenced(uow.session, LOCAL_TENANT, [old, both, new]) == {both, new}
    with database.write() as uow:
        uow.session.delete(uow.session.get_one(StageResult, (LOCAL_TENANT, "1" * 64)))
    with database.write() as uow:
        assert referenced(uow.session, LOCAL_TENANT, [old, both, new]) == {both}
        forget_results(uow.session, LOCAL_TENANT, both)
        assert uow.session.scalar(select(func.count()).select_from(StageFile)) == 0
        assert uow.session.scalar(select(func.count()).select_from(StageResult)) == 0


def test_another_tenants_result_keeps_nothing(database: Database) -> None:
    with database.write() as uow:
        uow.session.add(Tenant(id="tnt_other", name="other"))
        uow.session.flush()
        keep_result(uow.session, _result("1" * 64, "a" * 64))
        forget_results(uow.session, "tnt_other", "a" * 64)
        assert is_referenced(uow.session, LOCAL_TENANT, "a" * 64)
        assert not is_referenced(uow.session, "tnt_other", "a" * 64)


def test_the_same_result_by_several_workers_at_once(database: Database) -> None:
    """With other files each, or none: those that stand there in the end are of the result that does."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            for turn in range(15):
                barrier.wait()
                with database.write() as uow:
                    own = [f"{number}{i:063d}" for i in range(number)]
                    keep_result(uow.session, _result(f"{turn:064d}", *own))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    _at_once(4, work)
    assert not errors
    with database.read() as session:
        for result in session.scalars(select(StageResult)):
            query = select(StageFile.sha256).where(StageFile.key == result.key)
            assert sorted(session.scalars(query)) == [file["sha256"] for file in result.outputs["model"]]


# Counts


def _counts(db: Database) -> tuple[dict[str, int], dict[str, int]]:
    with db.read() as session:
        return StatisticsRepository(session).job_counts()


def _counted_one_by_one(db: Database) -> dict[str, int]:
    with db.read() as session:
        return dict(Counter(session.scalars(select(Job.status))))


def _tally(db: Database, limit: int = 500) -> int:
    with db.write() as uow:
        return StatisticsRepository(uow.session).tally(limit)


def _ended(desk: Desk, how: str) -> str:
    job = desk.submit()
    if how == "cancelled":
        desk.service.cancel(LOCAL_TENANT, job.id)
        return job.id
    claim = desk.claim(job)
    assert isinstance(claim, Claim)
    desk.ledger.fail(claim, {"code": "x", "detail": "y"}, {})
    return job.id


def test_counts_are_exact_whatever_has_been_tallied(desk: Desk) -> None:
    for how in ("failed", "failed", "cancelled"):
        _ended(desk, how)
    both = desk.submit(), desk.submit()
    claim = desk.ledger.claim(Offer("w1", (both[0].queue,)))
    assert claim is not None
    (waiting,) = [job for job in both if job.id != claim.job_id]
    expected = {"queued": 1, "running": 1, "failed": 2, "cancelled": 1, "succeeded": 0}
    assert _counts(desk.db) == (expected, {waiting.queue: 1})
    assert _tally(desk.db, limit=2) == 2
    assert _counts(desk.db) == (expected, {waiting.queue: 1})

    with desk.db.write() as uow:
        assert StatisticsRepository(uow.session).tally(10) == 1
        uow.session.rollback()  # as where the worker is killed before the commit
    assert _counts(desk.db) == (expected, {waiting.queue: 1})
    assert [_tally(desk.db), _tally(desk.db)] == [1, 0]
    assert _counts(desk.db) == (expected, {waiting.queue: 1})
    version = desk.job(waiting.id).version
    desk.service.cancel(LOCAL_TENANT, waiting.id)
    assert _tally(desk.db) == 1
    assert desk.job(waiting.id).version == version + 1, "who polls sees nothing of it"
    assert _counts(desk.db) == ({"running": 1, "failed": 2, "cancelled": 2, "succeeded": 0}, {})


def test_counts_are_exact_while_several_tally(desk: Desk) -> None:
    done = threading.Event()
    errors: list[BaseException] = []
    tallied: list[int] = []

    def tally(_: int) -> None:
        try:
            while not done.is_set():
                tallied.append(_tally(desk.db, limit=3))
        except BaseException as error:
            errors.append(error)

    def end(_: int) -> None:
        try:
            for i in range(30):
                _ended(desk, ("failed", "cancelled")[i % 2])
                ended = sum(_counts(desk.db)[0].get(s, 0) for s in ("failed", "cancelled"))
                assert ended == i + 1, "each on one side of the tally, never on both or neither"
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    _at_once(4, lambda number: end(number) if number == 0 else tally(number))
    assert not errors
    while _tally(desk.db):
        tallied.append(0)
    assert {k: v for k, v in _counts(desk.db)[0].items() if v} == _counted_one_by_one(desk.db)


def _at_once(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
