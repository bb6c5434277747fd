"""One job on three workers: its candidates are made side by side, each once; a helper that is killed costs its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from app.db.orm import StageResult
from app.db.sharing import SharedCall
from app.db.uow import Database
from app.settings import WorkerSettings
from app.sharing.service import SharingService
from tests.factories.deployment import Deployment, deployment, job_row
from tests.factories.eight_toys_installed import COUNT, SPEC, installed
from tests.integration.test_plugin import sum_of_constants

SECONDS = 0.7

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[Deployment]:
    told = {"PYTHONPATH": str(installed(tmp_path / "site")), "TOY_SECONDS": str(SECONDS)}
    with deployment(tmp_path / "home", told) as found:
        for _ in range(3):
            found.start_worker()
        with found.client() as client:
            found.wait_for(lambda: len(client.capabilities()["workers"]) == 3)
            assert len({w["helps"] for w in client.capabilities()["workers"]}) == 1
        yield found


def killed(db: Database, job_id: str) -> str:
    """The first helper that is seen at a call, by SIGKILL: its name."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        begun = (SharedCall.job_id == job_id, SharedCall.begun_at.is_not(None), SharedCall.ended_at.is_(None))
        with db.read() as session:
            owner = session.scalar(select(SharedCall.lease_owner).where(*begun).limit(1))
        if owner is not None:
            os.kill(int(owner.rpartition("-")[2]), signal.SIGKILL)
            return owner
        time.sleep(0.01)
    raise TimeoutError


def built(db: Database) -> list[StageResult]:
    with db.read() as session:
        if session.scalar(select(func.count()).where(StageResult.stage == "build")) != COUNT:
            return []
        return [*session.scalars(select(StageResult).where(StageResult.stage == "toy_slow_fold"))]


def test_a_job_s_candidates_are_made_by_three_and_a_lost_helper_costs_its_own(
    deployed: Deployment, tmp_path: Path
) -> None:
    db = deployed.database()
    with deployed.client() as client:
        helps = client.capabilities()["workers"][0]["helps"]
        model = client.upload_model(sum_of_constants(tmp_path / "sum.onnx"), "sum")
        job_id = client.submit({"model_id": model["id"], **SPEC})["id"]
        lost = killed(db, job_id)
        deployed.wait_for(lambda: built(db))
        deployed.wait_for(lambda: _folds(client.job(job_id)) >= COUNT)
        client.cancel(job_id)
        job = client.wait(job_id, check=False)
    rows = built(db)
    assert len(rows) == COUNT, "each is made once"
    assert len({row.data["made"]["worker"] for row in rows} - {lost}) == 2, "by all who live"
    stages = [s for s in job["stages"] if s["name"] == "toy_slow_fold"]
    took = _at(stages[-1]["finished_at"]) - _at(stages[0]["started_at"])
    assert took < sum(row.seconds for row in rows), "side by side, the lease of the lost one included"
    helped = [s for s in stages if (s["detail"] or "").startswith("made by ")]
    assert helped, "clients see who made it"
    assert all(s["cached"] and s["seconds"] >= SECONDS for s in helped)
    assert job_row(db, job_id).fencing_token == 1, "the job itself was not begun again"
    assert SharingService(db, WorkerSettings()).take("another", [helps], "here") is None, "nothing stays out"
    db.close()


def _folds(job: Any) -> int:
    return sum(s["name"] == "toy_slow_fold" and s["status"] == "succeeded" for s in job["stages"])


def _at(time_told: str) -> float:
    return datetime.fromisoformat(time_told.replace("Z", "+00:00")).timestamp()
