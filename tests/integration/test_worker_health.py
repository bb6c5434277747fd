"""A worker that is not well takes itself out, and says why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.db.orm import LOCAL_TENANT
from app.domain.failures import StageFailure, infrastructure_failure, model_failure
from app.settings import Settings, WorkerSettings
from tests.factories.deployment import Deployment, deployment, submit_case
from tests.integration.conftest import Desk
from tests.servers import launched
from workers import attempts
from workers.service import WorkerService

ROOT = Path(__file__).parents[2]

# A worker with a thread that dies of what nobody thought of: as soon as it starts, before Celery listens to signals, or
# once it does.
DYING = """
import sys, threading, time
from celery.signals import worker_ready
from workers.__main__ import main
from workers.background import Background
name, late = sys.argv[1], sys.argv[2] == "late"
ready = threading.Event()
worker_ready.connect(lambda **_: ready.set(), weak=False)
start = Background.start
def dies():
    if late:
        ready.wait(60)
        time.sleep(0.5)
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


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("dying") / "home") as found:
        yield found


def _start(deployed: Deployment, code: str, *arguments: str, **told: str) -> subprocess.Popen[bytes]:
    command = [*launched(), sys.executable, "-c", code, *arguments]
    log = (deployed.home / "workers-dying.log").open("wb")
    with log:
        process = subprocess.Popen(command, cwd=ROOT, env={**deployed.environment, **told}, stdout=log, stderr=log)
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


@pytest.mark.parametrize("when", ["at once", "late"])
@pytest.mark.parametrize("name", ["housekeeping", "sweeper", "errands"])
def test_a_thread_that_dies_ends_the_worker_in_order(deployed: Deployment, name: str, when: str) -> None:
    _assert_ends_in_order(_start(deployed, DYING, name, when), deployed)


@pytest.mark.parametrize("method", ["_keep", "_watch"])
def test_a_thread_of_a_lease_that_dies_gives_the_job_back(deployed: Deployment, tmp_path: Path, method: str) -> None:
    process = _start(deployed, DYING_AT_A_JOB, method, WORKER_LEASE_S="90")
    deployed.wait_ready()
    with deployed.client() as client:
        job = submit_case(client, tmp_path, 1)
        _assert_ends_in_order(process, deployed)
        found = client.job(job["id"])
        assert found["status"] == "queued", "long before its lease would have run out"
        client.cancel(job["id"])


class Ending:
    """A worker in this process whose jobs end as they are told; `reasons`: why it gave up."""

    def __init__(self, desk: Desk, home: Path, patch: pytest.MonkeyPatch, ends: list[Exception]) -> None:
        url = str(desk.db.engine.url.render_as_string(hide_password=False))
        self.worker = WorkerService(Settings(home=home, DATABASE_URL=url, worker=WorkerSettings(max_attempts=2)))
        self.reasons: list[str] = []
        coming = iter(ends)

        class Ends:
            def __init__(self, *_: Any, **__: Any) -> None: ...

            def run(self) -> None:
                raise next(coming)

        patch.setattr(self.worker.attempts, "give_up", self.reasons.append)
        patch.setattr(attempts, "Optimizer", Ends)


def _jobs(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: list[Exception]
) -> tuple[list[str], list[str]]:
    """What becomes of jobs that end so on one worker, and why it gave up."""
    ending = Ending(desk, tmp_path, monkeypatch, ends)
    try:
        jobs = []
        for _ in ends:
            jobs.append(desk.submit().id)
            ending.worker.run_jobs(1)  # what was given back is in its pause
        return [desk.service.get(LOCAL_TENANT, j).status for j in jobs], ending.reasons
    finally:
        ending.worker.close()


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


def test_a_worker_takes_the_next_job_without_a_message_as_long_as_all_is_well(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = Ending(desk, tmp_path, monkeypatch, [MODEL, MODEL, LOST, MODEL])
    jobs = [desk.submit().id for _ in range(5)]
    try:
        ending.worker.run_jobs()
        found = [desk.job(job).status for job in jobs]
        assert found == ["failed", "failed", "queued", "queued", "queued"], "of its own fault: it does not go on so"
        ending.worker.lookout.drain(True)
        ending.worker.run_jobs()
        assert [desk.job(job).status for job in jobs] == found
    finally:
        ending.worker.close()
