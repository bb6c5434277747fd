"""Nothing is lost whatever dies: real workers, killed for real, on the embedded default and on Redis and PostgreSQL."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from app.db.orm import Engine
from app.db.uow import Database
from tests.factories.deployment import (
    Deployment,
    deployment,
    descendants,
    gone,
    job_row,
    kill,
    submit_case,
    wait_for_stage,
)

STAGES = {"export", "simplify", "quantize", "build", "validate", "benchmark", "package"}

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(params=["embedded", "servers"])
def deployed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Deployment]:
    extra = {}
    if request.param == "servers":
        extra = {
            "DATABASE_URL": request.getfixturevalue("fresh_postgres"),
            "BROKER_URL": request.getfixturevalue("fresh_redis"),
        }
    with deployment(tmp_path / "home", extra) as found:
        yield found


@pytest.fixture
def db(deployed: Deployment) -> Iterator[Database]:
    found = deployed.database()
    yield found
    found.close()


def _engines(db: Database, job_id: str) -> int:
    with db.read() as session:
        return session.scalar(select(func.count()).select_from(Engine).where(Engine.job_id == job_id)) or 0


def test_a_worker_killed_in_every_stage_and_an_emptied_broker(
    deployed: Deployment, db: Database, tmp_path: Path
) -> None:
    remaining = set(STAGES)
    for seed in range(3):  # a stage may be over before it is seen: then the next job shows it
        kills = 0
        with deployed.client() as client:
            job_id = submit_case(client, tmp_path, seed)["id"]
            worker = deployed.start_hurried_worker()
            while (stage := wait_for_stage(db, job_id, remaining)) is not None:
                children = descendants(worker)
                kill(worker)
                kills += 1
                remaining.discard(stage)
                assert gone(children), "a killed worker left processes behind"
                deployed.empty_broker()
                worker = deployed.start_hurried_worker()
            job = client.wait(job_id)
        kill(worker)
        assert job["status"] == "succeeded", deployed.logs()
        assert _engines(db, job_id) == 1
        claims = [e for e in _states(db, job_id) if e == "running"]
        assert len(claims) == kills + 1
        if kills:
            # What was finished before the last kill was not done again.
            assert any(s["cached"] for s in job["stages"])
        if not remaining:
            break
    assert not remaining


def _states(db: Database, job_id: str) -> list[str]:
    from app.db.orm import JobEvent

    with db.read() as session:
        query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == "state").order_by(JobEvent.seq)
        return [e.data["status"] for e in session.scalars(query)]


def test_a_killed_child_costs_one_stage_call(deployed: Deployment, db: Database, tmp_path: Path) -> None:
    with deployed.client() as client:
        worker = deployed.start_hurried_worker()
        job_id = submit_case(client, tmp_path, 10, benchmark={"batch_sizes": [1], "min_seconds": 1})["id"]
        assert wait_for_stage(db, job_id, {"benchmark"}) == "benchmark"
        deadline = time.monotonic() + 10
        while not (family := [p for p in descendants(worker) if p.name() == "anneal-stage"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(family[0].pid, signal.SIGKILL)
        job = client.wait(job_id)
    assert job["status"] == "succeeded"
    assert _states(db, job_id).count("running") == 1
    assert worker.poll() is None


def test_a_worker_asked_to_stop_gives_its_job_back(deployed: Deployment, db: Database, tmp_path: Path) -> None:
    with deployed.client() as client:
        worker = deployed.start_hurried_worker()
        job_id = submit_case(client, tmp_path, 20, benchmark={"batch_sizes": [1], "min_seconds": 1})["id"]
        assert wait_for_stage(db, job_id, {"benchmark"}) == "benchmark"
        later = [submit_case(client, tmp_path, seed)["id"] for seed in (21, 22)]
        children = descendants(worker)
        started = time.monotonic()
        worker.terminate()
        worker.wait(timeout=10)
        assert time.monotonic() - started < 10
        assert gone(children)
        assert job_row(db, job_id).status == "queued"
        deployed.start_hurried_worker()
        assert client.wait(job_id)["status"] == "succeeded"
        # It went on first, though others had been waiting for longer.
        begun = job_row(db, job_id).claimed_at
        assert begun is not None
        for other in later:
            claimed = job_row(db, other).claimed_at
            assert claimed is None or claimed > begun
            client.cancel(other)


@pytest.mark.parametrize("deployed", ["servers"], indirect=True)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_idle_worker_goes_on_with_what_another_left(
    deployed: Deployment, db: Database, tmp_path: Path, how: signal.Signals
) -> None:
    with deployed.client() as client:
        workers = {}
        for _ in range(2):  # both are there before the job is: a start can take longer than a job
            process = deployed.start_worker()
            deployed.wait_for(lambda: len(client.capabilities()["workers"]) == len(workers) + 1, 120)
            (new,) = {found["id"] for found in client.capabilities()["workers"]} - {*workers}
            workers[new] = process
        job_id = submit_case(client, tmp_path, 40, benchmark={"batch_sizes": [1], "min_seconds": 2})["id"]
        assert wait_for_stage(db, job_id, {"benchmark"}) == "benchmark"
        first = job_row(db, job_id).lease_owner
        assert first is not None
        workers[first].send_signal(how)
        deployed.wait_for(lambda: job_row(db, job_id).lease_owner not in (None, first), 120)
        assert client.wait(job_id)["status"] == "succeeded"
    assert _states(db, job_id) == ["queued", "running", "queued", "running", "succeeded"]


@pytest.mark.parametrize("deployed", ["embedded"], indirect=True)
def test_a_drained_worker_ends_its_job_and_takes_no_other(deployed: Deployment, db: Database, tmp_path: Path) -> None:
    with deployed.client() as client:
        deployed.start_worker()
        first = submit_case(client, tmp_path, 50, benchmark={"batch_sizes": [1], "min_seconds": 2})["id"]
        assert wait_for_stage(db, first, {"benchmark"}) == "benchmark"
        (worker_id,) = [worker["id"] for worker in client.capabilities()["workers"]]
        second = submit_case(client, tmp_path, 51)["id"]
        deployed.run("app.admin", "workers", "drain", worker_id)
        assert client.wait(first)["status"] == "succeeded"
        time.sleep(2)
        assert job_row(db, second).status == "queued"
        deployed.run("app.admin", "workers", "drain", "--undo", worker_id)
        assert client.wait(second)["status"] == "succeeded"


def test_cancel_ends_the_work_within_ten_seconds(deployed: Deployment, db: Database, tmp_path: Path) -> None:
    with deployed.client() as client:
        worker = deployed.start_hurried_worker()
        long = {"benchmark": {"batch_sizes": [1], "min_seconds": 30}, "budget_seconds": 60}
        job_id = submit_case(client, tmp_path, 30, **long)["id"]
        assert wait_for_stage(db, job_id, {"benchmark"}) == "benchmark"
        time.sleep(1)
        family = [p for p in descendants(worker) if p.name() == "anneal-stage"]
        assert family
        started = time.monotonic()
        client.cancel(job_id)
        job = client.wait(job_id, check=False)
        assert job["status"] == "cancelled"
        assert gone(family, timeout_s=5)
        assert time.monotonic() - started < 10
        # The worker lives and takes the next job.
        assert client.wait(submit_case(client, tmp_path, 31)["id"])["status"] == "succeeded"
    assert worker.poll() is None
