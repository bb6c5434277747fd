"""What expires, on SQLite and PostgreSQL: by the tenant's own policy or the settings', and nothing that a job needs."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update

from app.artifacts.service import EngineService
from app.blobs import retention
from app.blobs.collector import Collector
from app.blobs.retention import Policies, Policy, change_policy, policy_of
from app.db.base import utcnow
from app.db.chains import ChainMember
from app.db.ids import new_id
from app.db.orm import LOCAL_TENANT, Dataset, Engine, Examination, Job, JobEvent, SourceModel, StageResult, Tenant
from app.domain.job_state import JobStatus
from app.errors import AppError
from app.jobs.removal import remove_jobs
from app.settings import CollectorSettings, RetentionSettings, Settings
from tests.integration.conftest import Desk
from tests.integration.test_ledger import _claim, _complete
from tests.integration.test_targets import _at_once, _children, _end, _submit, machines  # noqa: F401 (a fixture)

_OTHER = "tnt_other"


def _ago(days: float) -> datetime:
    return utcnow() - timedelta(days=days)


def _collect(desk: Desk, **days: int) -> int:
    """Rounds until nothing is left to expire: how many rows did."""
    settings = Settings(home=desk.scratch, collector=CollectorSettings(grace_s=0), retention=RetentionSettings(**days))
    collector, expired = Collector(desk.db, desk.content, settings), 0
    for _ in range(2):
        while True:
            expired += collector.collect()["expired"]
            if collector.round_over:
                break
    return expired


def _own(desk: Desk, tenant_id: str = LOCAL_TENANT, **days: int | None) -> None:
    with desk.db.write() as uow:
        change_policy(uow.session, tenant_id, days, ())


def _age(desk: Desk, row: Any, days: float, column: str = "created_at") -> None:
    table = type(row)
    with desk.db.write() as uow:
        uow.session.execute(update(table).where(table.id == row.id).values({column: _ago(days)}))


def _count(desk: Desk, table: Any, *where: Any) -> int:
    with desk.db.read() as session:
        return session.scalar(select(func.count()).select_from(table).where(*where)) or 0


def _ended(desk: Desk, days: float) -> Job:
    """A job that was delivered so long ago."""
    job = desk.submit()
    claim = _claim(desk, job)
    _complete(desk, claim, job)
    _age(desk, job, days, "finished_at")
    return job


def _live(desk: Desk) -> set[str]:
    with desk.db.read() as session:
        tables = (SourceModel, Dataset)
        return {i for table in tables for i in session.scalars(select(table.id).where(table.deleted_at.is_(None)))}


def test_nothing_expires_unless_that_is_said(desk: Desk) -> None:
    job = _ended(desk, 4000)
    for table in (SourceModel, Engine):
        with desk.db.write() as uow:
            uow.session.execute(update(table).values(created_at=_ago(4000)))
    assert _collect(desk) == 0
    assert desk.job(job.id).report_sha256 is not None
    assert _count(desk, Engine) == 1


def test_jobs_go_with_their_bytes_and_their_engines_stay(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_STEP", 2)
    old, young, queued = _ended(desk, 31), _ended(desk, 29), desk.submit()
    _age(desk, queued, 400)
    more = [_submit_cancelled(desk, 40) for _ in range(5)]
    assert _collect(desk, jobs_days=30) == 6
    with desk.db.read() as session:
        assert {*session.scalars(select(Job.id))} == {young.id, queued.id}
        assert {*session.scalars(select(Engine.job_id))} == {old.id, young.id}
    assert _count(desk, JobEvent, JobEvent.job_id.in_([old.id, *(job.id for job in more)])) == 0
    assert desk.content.exists(LOCAL_TENANT, "4" * 64), "the report of both"
    _age(desk, young, 31, "finished_at")
    assert _collect(desk, jobs_days=30) == 1
    assert not desk.content.exists(LOCAL_TENANT, "4" * 64)
    assert desk.content.exists(LOCAL_TENANT, "2" * 64), "the engine's"


def _submit_cancelled(desk: Desk, days: float) -> Job:
    job = desk.submit()
    desk.service.cancel(LOCAL_TENANT, job.id)
    _age(desk, job, days, "finished_at")
    return job


def test_engines_go_and_their_jobs_name_them_no_more(desk: Desk) -> None:
    job = _ended(desk, 1)
    (engine_id,) = desk.job(job.id).engine_ids
    with desk.db.write() as uow:
        uow.session.get_one(Engine, engine_id).created_at = _ago(8)
    assert _collect(desk, engines_days=9) == 0
    assert _collect(desk, engines_days=7) == 1
    assert desk.job(job.id).engine_ids == []
    assert not desk.content.exists(LOCAL_TENANT, "2" * 64)
    assert desk.content.exists(LOCAL_TENANT, "4" * 64)


def test_events_go_but_for_changes_of_state(desk: Desk) -> None:
    old, young = desk.submit(), desk.submit()
    for job in (old, young):
        claim = _claim(desk, job)
        for n in range(5):
            desk.ledger.progress(claim, {"progress": n / 10}, "progress", {"progress": n / 10})
        desk.ledger.fail(claim, {"code": "x"}, {})
    _age(desk, old, 8, "finished_at")
    assert _collect(desk, events_days=7) == 5
    assert [e.type for e in desk.service.events_after(LOCAL_TENANT, old.id, 0)] == ["state"] * 3
    assert len(desk.service.events_after(LOCAL_TENANT, young.id, 0)) == 8


def test_what_a_job_needs_stays_until_it_has_ended(desk: Desk) -> None:
    datasets = [desk.add_dataset() for _ in range(4)]
    models = [desk.add_model() for _ in range(3)]
    for row in (*models, *datasets):
        _age(desk, row, 100)
    young = desk.add_model()
    with desk.db.write() as uow:  # submitted by a service that checked them
        spec: dict[str, Any] = {
            "calibration": {"dataset_id": datasets[0].id},
            "validation": {"dataset_id": datasets[1].id},
            "quantization": {"training": {"dataset_id": datasets[2].id}},
        }
        for status, model in ((JobStatus.QUEUED, models[0]), (JobStatus.RUNNING, models[1])):
            row = _job(model.id, status.value, spec)
            uow.session.add(row)
    assert _collect(desk, models_days=30, datasets_days=30) == 2
    assert _live(desk) == {models[0].id, models[1].id, *(d.id for d in datasets[:3]), young.id}
    with desk.db.write() as uow:
        uow.session.execute(update(Job).values(status="cancelled", finished_at=utcnow()))
    assert _collect(desk, models_days=30, datasets_days=30) == 5
    assert _live(desk) == {young.id}


def _job(model_id: str, status: str, spec: dict[str, Any]) -> Job:
    return Job(
        id=new_id("job"),
        tenant_id=LOCAL_TENANT,
        model_id=model_id,
        status=status,
        spec=spec,
        queue="anneal.cpu",
        correlation_id="t",
        lease_expires_at=utcnow() + timedelta(hours=1),
    )


def test_a_job_that_compares_goes_with_those_that_it_compares(machines: Desk) -> None:  # noqa: F811
    desk = machines
    parent, _ = _submit(desk, "a", "b")
    children = _children(desk, parent)
    for child in children:
        _end(desk, child, "cancelled")
    _age(desk, children[0], 31, "finished_at")
    assert _collect(desk, jobs_days=30) == 0, "one of them alone"
    with desk.db.write() as uow:
        assert remove_jobs(uow.session, LOCAL_TENANT, [children[0].id]).job_ids == []
    _age(desk, parent, 31, "finished_at")
    assert _collect(desk, jobs_days=30) == 3
    assert _count(desk, Job) == 0


def test_each_tenant_by_its_own_policy(desk: Desk) -> None:
    with desk.db.write() as uow:
        uow.session.add(Tenant(id=_OTHER, name="other"))
    mine, theirs = desk.add_model(), desk.add_model(_OTHER)
    for row in (mine, theirs):
        _age(desk, row, 50)
    _own(desk, models=None)
    assert _collect(desk, models_days=60) == 0
    assert _collect(desk, models_days=40) == 1
    assert _live(desk) == {mine.id}
    _own(desk, models=49)
    assert _collect(desk) == 1
    assert _live(desk) == set()


def test_stage_results_by_tenant(desk: Desk) -> None:
    with desk.db.write() as uow:
        uow.session.add(Tenant(id=_OTHER, name="other"))
        for tenant_id in (LOCAL_TENANT, _OTHER):
            for days in (5, 20, 40):
                uow.session.add(
                    StageResult(
                        tenant_id=tenant_id,
                        key=f"{days:064d}",
                        stage="export",
                        outputs={},
                        data={},
                        seconds=1.0,
                        used_at=_ago(days),
                    )
                )
    _own(desk, results=10)
    assert _collect(desk) == 2
    with desk.db.read() as session:
        left = session.execute(select(StageResult.tenant_id, StageResult.key)).all()
    assert {(t, int(key)) for t, key in left} == {(LOCAL_TENANT, 5), (_OTHER, 5), (_OTHER, 20)}


def test_a_policy_says_when(desk: Desk) -> None:
    settings = Settings(home=desk.scratch, retention=RetentionSettings(jobs_days=30, models_days=90))
    now = utcnow()
    assert policy_of(settings, None) == Policy(jobs=30, models=90, results=30)
    assert policy_of(settings, {"jobs": None, "engines": 7, "of a later version": 1, "models": "x"}) == Policy(
        models=90, engines=7, results=30
    )
    assert policy_of(settings, None).until("jobs", now) == now + timedelta(days=30)
    assert policy_of(settings, None).until("jobs", None) is policy_of(settings, None).until("engines", now) is None
    _own(desk, jobs=3)
    assert Policies(desk.db, settings).of(LOCAL_TENANT).jobs == 3
    for bad in ({"jobs": 0}, {"jobs": 40_000}, {"cats": 3}):
        with pytest.raises(ValueError, match="1 to 36500 days or never"):
            _own(desk, **bad)
    with desk.db.write() as uow:
        change_policy(uow.session, LOCAL_TENANT, {"models": 5}, ["jobs", "models"])
    assert Policies(desk.db, settings).of(LOCAL_TENANT).jobs == 30
    assert _count(desk, Tenant, Tenant.retention.is_not(None)) == 0


def test_an_engine_deleted_twice_at_once_goes_once(desk: Desk) -> None:
    job = _ended(desk, 1)
    (engine_id,) = desk.job(job.id).engine_ids
    service, version = EngineService(desk.db, desk.content), desk.job(job.id).version
    found: list[bool] = []

    def delete() -> None:
        try:
            service.delete(LOCAL_TENANT, engine_id)
            found.append(True)
        except AppError as error:
            found.append(error.status != 404)

    _at_once(delete, delete, delete)
    assert sorted(found) == [False, False, True]
    assert desk.job(job.id).version == version + 1


def test_rows_of_what_was_deleted_go_once_nothing_points_to_them(desk: Desk) -> None:
    job, asked, young, data = _ended(desk, 1), desk.add_model(), desk.add_model(), desk.add_dataset()
    behind = desk.add_model()
    with desk.db.write() as uow:
        uow.session.add(ChainMember(model_id=behind.id, job_id=job.id))
        used = uow.session.get_one(SourceModel, job.model_id)
        uow.session.add(
            Examination(model_id=asked.id, backend="onnxruntime", tenant_id=LOCAL_TENANT, version="1", status="asked")
        )
    for row, days in ((used, 2.0), (behind, 2.0), (asked, 2.0), (data, 2.0), (young, 0.5)):
        _age(desk, row, days, "deleted_at")
    assert _collect(desk) == 2
    with desk.db.read() as session:
        assert {*session.scalars(select(SourceModel.id))} == {used.id, behind.id, young.id}
    assert (_count(desk, Dataset), _count(desk, Examination)) == (0, 0)
    with desk.db.write() as uow:
        remove_jobs(uow.session, LOCAL_TENANT, [job.id])
    assert _collect(desk) == 1, "the one behind it in the chain; of the first one an engine is there"
    with desk.db.write() as uow:
        uow.session.execute(delete(Engine))
    assert _collect(desk) == 1
    with desk.db.read() as session:
        assert [*session.scalars(select(SourceModel.id))] == [young.id]
