"""A worker is killed in each of the stages that there are, with all that it started: its job goes on elsewhere and ends
once, and of what was finished nothing is done again."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import func, select

from anneal_client import Client
from app.capabilities.service import CapabilityService
from app.db.orm import Engine, Examination, Job, JobEvent
from app.db.uow import Database
from app.settings import Settings
from tests.cluster.cluster import Managed
from tests.cluster.conftest import Front, live_workers, wait_for
from tests.cluster.topology import COUNTS
from tests.factories.deployment import Deployment, job_row, wait_for_stage
from tests.factories.every_stage import OF_QUESTIONS, ROUTE_OF, Route
from workers import kernel

_TRIES = 3  # a stage may be over before it is seen
_STAGE_S = 200.0
_SEEN_S = 2.5  # heartbeats, at which a worker sees that it is drained
_numbers = itertools.count(1000)

pytestmark = [pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def db(front: Front) -> Iterator[Database]:
    found = Deployment(front.cluster.folder, front.cluster.environment, 0).database()
    yield found
    found.close()


def submitted(client: Client, route: Route, folder: Path) -> str:
    number = next(_numbers)
    models, data = [], folder / f"data{number}.npz"
    for name, raw in route.models(number):
        (folder / name).write_bytes(raw)
        models.append(client.upload_model(folder / name)["id"])
    data.write_bytes(route.data(number))
    return str(client.submit(route.body(models, client.upload_dataset(data)["id"]))["id"])


@contextmanager
def nobody_helps(front: Front, db: Database) -> Iterator[None]:
    """Inside, one worker takes jobs and does all of each: who helps with a job would have the stage otherwise."""
    capabilities, others = CapabilityService(db, Settings()), [w.name for w in front.cluster.workers[1:]]
    for name in others:
        assert capabilities.drain(name, draining=True)
    time.sleep(_SEEN_S)
    try:
        yield
    finally:
        for name in others:
            capabilities.drain(name, draining=False)


def killed_in(front: Front, db: Database, job_id: str, stage: str) -> Job | None:
    """The job as its dead worker left it. None where the stage was over by then."""
    # Known before: some stages take no longer than it takes to find a process's children.
    families = {worker.name: worker.family() for worker in front.cluster.workers}
    if wait_for_stage(db, job_id, {stage}, _STAGE_S) is None:
        return None
    owner = job_row(db, job_id).lease_owner
    for process in families.get(owner or "", ()):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    left = job_row(db, job_id)  # nobody writes to it now, for a moment
    now = left.stages[-1]
    mine = left.status == "running" and left.lease_owner == owner
    return left if mine and (now["name"], now["status"]) == (stage, "running") else None


def test_every_stage_has_a_job_that_goes_through_it() -> None:
    assert {*ROUTE_OF, *OF_QUESTIONS} == {*kernel.stages()}


@pytest.mark.parametrize("stage", sorted(ROUTE_OF))
def test_a_worker_killed_in_a_stage(front: Front, db: Database, tmp_path: Path, stage: str) -> None:
    wait_for(lambda: live_workers(front.cluster) == COUNTS["worker"], 180)
    with front.client() as client:
        for _ in range(_TRIES):
            with nobody_helps(front, db):
                job_id = submitted(client, ROUTE_OF[stage], tmp_path)
                left = killed_in(front, db, job_id, stage)
            again = None if left is None else seconds_until_taken_up(db, left)
            ended: dict[str, Any] = dict(client.wait(job_id, check=False))
            assert ended["status"] == "succeeded", ended["error"]
            if left is not None:
                print(f"{stage}: another worker had the job after {again:.1f} s")
                ended_once(db, left, ended)
                return
    pytest.fail(f"no worker was seen in {stage}")


def seconds_until_taken_up(db: Database, left: Job) -> float:
    killed = time.monotonic()
    wait_for(lambda: job_row(db, left.id).fencing_token > left.fencing_token)
    return time.monotonic() - killed


def ended_once(db: Database, left: Job, ended: dict[str, Any]) -> None:
    """`left`: the job when its worker was killed."""
    with db.read() as session:
        states = select(JobEvent).where(JobEvent.job_id == left.id, JobEvent.type == "state").order_by(JobEvent.seq)
        told = [event.data["status"] for event in session.scalars(states)]
        engines = session.scalar(select(func.count()).select_from(Engine).where(Engine.job_id == left.id))
    assert told == ["queued", "running", "queued", "running", "succeeded"]
    assert engines == 1
    finished = Counter(s["key"] for s in left.stages if s["status"] == "succeeded")
    over_again = [s["name"] for s in ended["stages"] if s["key"] in finished and not s["cached"]]
    assert over_again == [], "what was finished is there"


def test_a_worker_killed_while_it_answers_a_question(front: Front, db: Database, tmp_path: Path) -> None:
    """The stage that belongs to no job."""
    wait_for(lambda: live_workers(front.cluster) == COUNTS["worker"], 180)
    with front.client() as client, front.http() as http:
        for _ in range(_TRIES):
            name, raw = ROUTE_OF["export"].model(next(_numbers))
            (tmp_path / name).write_bytes(raw)
            model_id = client.upload_model(tmp_path / name)["id"]
            asked(http, model_id)
            worker = examining(front, db, model_id)
            if worker is not None:
                worker.kill(whole=True)
                assert set(answered(http, model_id)) == {"answered"}
                return
    pytest.fail("no worker was seen at a question")


def asked(http: httpx.Client, model_id: str) -> Any:
    return http.get(f"/v1/models/{model_id}/compatibility").json()


def answered(http: httpx.Client, model_id: str) -> list[str]:
    """How each of the questions on this model ended."""
    wait_for(lambda: asked(http, model_id)["status"] == "complete", 120)
    return [backend["status"] for backend in asked(http, model_id)["backends"]]


def examining(front: Front, db: Database, model_id: str) -> Managed | None:
    """Who asks a backend at this moment: one of its questions has its answer, another has not."""
    mine, deadline = Examination.model_id == model_id, time.monotonic() + 60
    while time.monotonic() < deadline:
        with db.read() as session:
            rows = [*session.scalars(select(Examination).where(mine))]
        left = [row for row in rows if row.status == "asked"]
        if rows and not left:
            return None
        if len(left) < len(rows) and left[0].lease_owner is not None:
            return next(w for w in front.cluster.workers if w.name == left[0].lease_owner)
        time.sleep(0.002)
    raise TimeoutError(model_id)
