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
from tests.factories.deployment import Deployment, deployment, submit_case
from tests.integration.conftest import Desk
from tests.servers import launched
from workers import service as service_module
from workers.service import WorkerService

ROOT = Path(__file__).parents[2]

# A worker with a thread that dies of what nobody thought of: as soon as it starts, before Celery listens to signals, or
# later.
DYING = """
import sys, time
from workers.__main__ import main
from workers.background import Background
name, after_s = sys.argv[1], float(sys.argv[2])
start = Background.start
def dies():
    time.sleep(after_s)
    raise KeyError("what nobody thought of")
Background.start = lambda self, thread, target: start(self, thread, dies if thread == name else target)
sys.exit(main())
"""

# One of the threads that keep a job's lease, as it begins.
DYING_AT_A_JOB = """
import sys
from workers.__main__ import main
from workers.pipeline.lease import LeaseKeeper
def dies(self):
    raise KeyError("what nobody thought of")
setattr(LeaseKeeper, sys.argv[1], dies)
sys.exit(main())
"""


def _start(deployed: Deployment, code: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [*launched(), sys.executable, "-c", code, *arguments]
    log = (deployed.home / "workers-dying.log").open("wb")
    with log:
        process = subprocess.Popen(command, cwd=ROOT, env=deployed.environment, stdout=log, stderr=log)
    deployed.processes.append(process)
    return process


def _assert_ends_in_order(process: subprocess.Popen[bytes], deployed: Deployment) -> None:
    status = process.wait(timeout=60)
    log = deployed.worker_log()
    assert status == 1, log
    assert "thread_died" in log
    assert "what nobody thought of" in log
    assert "worker_gives_up" in log
    with deployed.client() as client:
        assert client.capabilities()["workers"] == [], "it has said goodbye"


@pytest.mark.parametrize("after_s", [0, 3])
@pytest.mark.parametrize("name", ["housekeeping", "sweeper", "errands"])
def test_a_thread_that_dies_ends_the_worker_in_order(tmp_path: Path, name: str, after_s: int) -> None:
    with deployment(tmp_path / "home") as deployed:
        _assert_ends_in_order(_start(deployed, DYING, name, str(after_s)), deployed)


@pytest.mark.parametrize("method", ["_keep", "_watch"])
def test_a_thread_of_a_lease_that_dies_gives_the_job_back(tmp_path: Path, method: str) -> None:
    with deployment(tmp_path / "home", {"WORKER_LEASE_S": "90"}) as deployed, deployed.client() as client:
        process = _start(deployed, DYING_AT_A_JOB, method)
        deployed.wait_ready()
        job = submit_case(client, tmp_path, 1)
        _assert_ends_in_order(process, deployed)
        found = client.job(job["id"])
        assert found["status"] == "queued", "long before its lease would have run out"


def _jobs(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: list[Exception]
) -> tuple[list[str], list[str]]:
    """What becomes of jobs that end so on one worker, and why it gave up."""
    url = str(desk.db.engine.url.render_as_string(hide_password=False))
    worker = WorkerService(Settings(home=tmp_path, DATABASE_URL=url, worker=WorkerSettings(max_attempts=2)))
    reasons: list[str] = []
    coming = iter(ends)

    class Ends:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def run(self) -> None:
            raise next(coming)

    monkeypatch.setattr(worker, "give_up", reasons.append)
    monkeypatch.setattr(service_module, "Optimizer", Ends)
    try:
        jobs = []
        for _ in ends:
            jobs.append(desk.submit().id)
            worker.run_job()  # what was given back is in its pause
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
