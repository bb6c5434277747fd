"""A storage that damages what stages make: the job begins anew a few times, and then ends with words."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from app.db.orm import LOCAL_TENANT, Job, JobEvent, SourceModel, StageResult
from app.jobs import sweep as sweep_module
from app.settings import Settings, WorkerSettings
from app.storage.local import LocalStore
from tests.factories import onnx_models
from tests.integration.conftest import Desk
from workers.service import WorkerService

MOST = 3  # attempts without a finished stage


class Damaging(LocalStore):
    """A real folder in which one bit of every file but `sound` turns over."""

    sound = ""

    def put_file(self, key: str, path: Path, **how: bool) -> None:
        super().put_file(key, path, **how)
        if not key.endswith(self.sound):
            stored = self.local_path(key)
            assert stored is not None
            content = bytearray(stored.read_bytes())
            content[len(content) // 2] ^= 0x40
            stored.unlink()
            stored.write_bytes(content)


@pytest.fixture
def worker(desk: Desk, tmp_path: Path, database_url: str) -> WorkerService:
    settings = Settings(
        home=tmp_path, DATABASE_URL=database_url, worker=WorkerSettings(max_attempts=MOST, redispatch_s=1e-6)
    )
    found = WorkerService(settings)
    found.isolated.start()
    return found


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_job_whose_results_are_damaged_each_time_ends(
    desk: Desk, worker: WorkerService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "_ROUNDS", 2)
    model = onnx_models.save(onnx_models.mlp(), tmp_path / "net.onnx")
    store = Damaging(tmp_path / "damaging")
    store.sound = hashlib.sha256(model.read_bytes()).hexdigest()
    worker.content.store = store
    worker.content.put(LOCAL_TENANT, model, store.sound)
    job = desk.submit()
    with desk.db.write() as uow:
        uow.session.get_one(SourceModel, job.model_id).sha256 = store.sound
    attempts = 0
    try:
        while desk.job(job.id).status == "queued":
            worker.run_jobs(1)
            attempts += 1
            assert attempts <= 2 * MOST
    finally:
        worker.close()
    ended = desk.job(job.id)
    assert attempts == 2 * MOST, "a stage was finished in each of them"
    assert (ended.status, ended.attempts_in_all) == ("failed", attempts)
    assert ended.error is not None
    assert ended.error["code"] == "blob_missing"


def test_stages_that_are_finished_in_vain_do_not_make_it_begin_anew_for_ever(desk: Desk) -> None:
    """Workers are lost, and so is what they finished."""
    job = desk.submit()
    claims = 0
    while (claim := desk.claim(job)) is not None:
        claims += 1
        assert claims <= 100
        row = StageResult(tenant_id=LOCAL_TENANT, key="7" * 64, stage="export", outputs={}, data={}, seconds=0.1)
        desk.ledger.remember(claim, row)
        with desk.db.write() as uow:
            uow.session.get_one(Job, job.id).lease_expires_at = claim.claimed_at
        desk.ledger.sweep()
    ended = desk.job(job.id)
    assert claims == sweep_module._ROUNDS * desk.ledger.settings.max_attempts
    assert ended.status == "failed"
    assert ended.error is not None
    assert ended.error["code"] == "worker_lost"


def test_what_a_worker_gives_back_at_its_end_is_no_attempt(desk: Desk) -> None:
    job = desk.submit()
    for _ in range(30):
        claim = desk.claim(job)
        assert claim is not None
        desk.ledger.release(claim, "the worker shuts down")
    assert desk.job(job.id).attempts_in_all == 0
    with desk.db.read() as session:
        assert session.query(JobEvent).filter_by(job_id=job.id).count() == 61
