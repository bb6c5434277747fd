"""A worker that is not well takes itself out, and says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.db.orm import LOCAL_TENANT
from app.domain.failures import StageFailure, infrastructure_failure, model_failure
from app.settings import Settings, WorkerSettings
from tests.factories.deployment import deployment
from tests.integration.conftest import Desk
from workers import service as service_module
from workers.service import WorkerService

ROOT = Path(__file__).parents[2]

# A worker whose housekeeping dies of what nobody thought of.
DYING = """
import sys, time
from workers.__main__ import main
from workers.service import WorkerService
def housekeep(self):
    time.sleep(3)
    raise KeyError("what nobody thought of")
WorkerService._housekeep = housekeep
sys.exit(main())
"""


def test_a_thread_that_dies_ends_the_worker_in_order(tmp_path: Path) -> None:
    with deployment(tmp_path / "home") as deployed:
        command = [sys.executable, "-c", DYING]
        done = subprocess.run(
            command, cwd=ROOT, env=deployed.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1
        assert "thread_died" in done.stderr
        assert "what nobody thought of" in done.stderr
        assert "worker_gives_up" in done.stderr
        with deployed.client() as client:
            assert client.capabilities()["workers"] == [], "it has said goodbye"


def _jobs(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: list[Exception]
) -> tuple[list[str], list[str]]:
    """What becomes of jobs that end so on one worker, and why it gave up."""
    url = str(desk.db.engine.url.render_as_string(hide_password=False))
    worker = WorkerService(Settings(home=tmp_path, DATABASE_URL=url, worker=WorkerSettings(max_attempts=2)))
    reasons: list[str] = []
    coming = iter(ends)

    class Ends:
        def __init__(self, *_: Any) -> None: ...

        def run(self) -> None:
            raise next(coming)

    monkeypatch.setattr(worker, "give_up", reasons.append)
    monkeypatch.setattr(service_module, "Optimizer", Ends)
    try:
        jobs = [desk.submit().id for _ in ends]
        for job_id in jobs:
            worker.run_job(job_id)
        return [desk.service.get(LOCAL_TENANT, j).status for j in jobs], reasons
    finally:
        worker.close()


LOST = infrastructure_failure("child_lost", "The process was lost.", stage="build")
MODEL: StageFailure = model_failure("runtime_crashed", "It crashed.")


def test_a_worker_that_fails_everything_leaves_it_to_others(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses, reasons = _jobs(desk, tmp_path, monkeypatch, [LOST, RuntimeError("a fault of ours"), LOST])
    assert len(reasons) == 1
    assert "child_lost" in reasons[0]
    assert statuses == ["queued", "failed", "queued"], "a lost process is no fault of the job's"


def test_failures_of_models_are_no_sign_of_that(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, reasons = _jobs(desk, tmp_path, monkeypatch, [LOST, LOST, MODEL, LOST, LOST, MODEL])
    assert reasons == []
