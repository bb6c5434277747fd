"""A worker whose storage fails around a job: the job is tried again, and ends typed, never lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.db.migrate import upgrade
from app.db.orm import LOCAL_TENANT, Job
from app.domain.failures import FailureKind, StageFailure
from app.errors import AppError, storage_full, storage_unavailable
from app.settings import Settings, WorkerSettings
from app.storage.base import BlobNotFound
from app.storage.local import LocalStore
from tests.integration.conftest import Desk
from workers.pipeline.faults import infrastructure_faults
from workers.room import Room
from workers.service import WorkerService


class Failing(LocalStore):
    """A real folder that answers as a storage that is away, or full."""

    error: AppError

    def size(self, key: str) -> int | None:
        raise self.error

    def fetch(self, key: str, path: Path) -> None:
        raise self.error


@pytest.fixture
def worker(desk: Desk, tmp_path: Path, database_url: str) -> WorkerService:
    settings = Settings(home=tmp_path, DATABASE_URL=database_url, worker=WorkerSettings(max_attempts=2))
    found = WorkerService(settings)
    failing = Failing(tmp_path / "blobs")
    found.content.store = failing
    found.isolated.start()
    return found


def _run(worker: WorkerService, desk: Desk, error: AppError) -> Job:
    assert isinstance(worker.content.store, Failing)
    worker.content.store.error = error
    desk.put_blob("0" * 64)
    job = desk.submit()
    try:
        worker.run_jobs(1)
        return desk.service.get(LOCAL_TENANT, job.id)
    finally:
        worker.close()


def test_a_storage_that_is_away_costs_an_attempt_not_the_job(worker: WorkerService, desk: Desk) -> None:
    job = _run(worker, desk, storage_unavailable("the storage does not answer"))
    assert (job.status, job.error) == ("queued", None)


def test_a_full_storage_is_waited_for(worker: WorkerService, desk: Desk) -> None:
    """Whoever runs it makes room."""
    job = _run(worker, desk, storage_full())
    assert (job.status, job.error, job.attempts) == ("queued", None, 1)
    assert job.not_before is not None


def test_a_storage_that_stays_full_is_said_so(
    worker: WorkerService, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.ledger, "exhausted", lambda _: True)
    job = _run(worker, desk, storage_full())
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "storage_full"
    assert job.error["remedy"]


def test_a_disk_of_this_worker_that_is_full_leaves_the_job_to_others(
    worker: WorkerService, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.room, "short_lately", lambda: True)  # and there is room by now
    job = _run(worker, desk, storage_full())
    assert (job.status, job.error, job.attempts) == ("queued", None, 1)


def test_a_worker_without_room_takes_no_job(worker: WorkerService, desk: Desk) -> None:
    worker.room = Room(desk.scratch, 1 << 60)
    job = _run(worker, desk, storage_full())
    assert (job.status, job.attempts) == ("queued", 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (storage_unavailable("away"), "storage_unavailable"),
        (BlobNotFound("x"), "blob_missing"),
        (OSError(errno.ENOSPC, "No space left on device"), "storage_full"),
        (OSError(errno.EIO, "Input/output error"), "io_error"),
    ],
)
def test_every_fault_has_a_code(error: Exception, code: str) -> None:
    with pytest.raises(StageFailure) as caught, infrastructure_faults("build"):
        raise error
    assert (caught.value.code, caught.value.kind, caught.value.stage) == (code, FailureKind.INFRASTRUCTURE, "build")
    assert not caught.value.cacheable


def test_a_gpu_that_the_machine_has_not_ends_the_start_with_words(tmp_path: Path, database_url: str) -> None:
    upgrade(database_url)
    environment = {**os.environ, "ANNEAL_HOME": str(tmp_path), "DATABASE_URL": database_url, "WORKER_GPU": "77"}
    command = [sys.executable, "-m", "workers"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "WORKER_GPU=77 names no GPU" in done.stderr
    assert "Traceback" not in done.stderr
