"""Who builds for a job that waits, on SQLite and PostgreSQL: one at a time, no longer than it waits, and never as its
worker."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from app.capabilities.service import CapabilityService
from app.db.base import utcnow
from app.db.orm import LOCAL_TENANT, Job, Prebuild, StageResult
from app.domain.spec import OptimizationSpec
from app.jobs.ledger import LeaseLost
from app.prebuilds.service import MOST_ATTEMPTS, PrebuildHold, PrebuildService
from app.settings import Settings
from tests.integration.conftest import Desk

TARGETS = {"tensorrt-rtx": ["8.6", "8.9"]}
FORMATS = ["onnx"]


@pytest.fixture
def service(desk: Desk) -> PrebuildService:
    CapabilityService(desk.db, Settings(home=desk.scratch)).report(
        "cpu-1",
        hostname="here",
        hardware={"id": "cpu-x"},
        backends=[{"name": "onnxruntime", "versions": {}, "devices": ["cpu"], "precisions": ["fp32"]}],
        formats=FORMATS,
        queues=["anneal.cpu"],
        builds={"tensorrt-rtx": {"8.9": ["fp32", "fp16"]}},
    )
    return PrebuildService(desk.db)


def submitted(desk: Desk, capability: str = "8.9") -> Job:
    target = {"compute_capability": capability, "backends": ["tensorrt-rtx"]}
    spec = OptimizationSpec.model_validate({"model_id": desk.add_model().id, "target": target})
    return desk.service.submit(LOCAL_TENANT, spec, correlation_id="c", idempotency=None)[0]


def taken(service: PrebuildService, owner: str = "b1") -> PrebuildHold:
    hold = service.take(owner, TARGETS, FORMATS)
    assert hold is not None
    return hold


def result(key: str) -> StageResult:
    return StageResult(
        tenant_id=LOCAL_TENANT,
        key=key,
        stage="build",
        outputs={},
        data={},
        failure=None,
        seconds=1.0,
        created_at=utcnow(),
        used_at=utcnow(),
    )


def progress(desk: Desk, hold: PrebuildHold) -> None:
    changes: dict[str, Any] = {
        "stage": "build",
        "progress": 0.4,
        "expected_end": utcnow(),
        "stages": [{"name": "build", "candidate": "rtx-fp16", "status": "running", "cached": False}],
    }
    event = {"stage": "build", "candidate": "rtx-fp16", "status": "running", "progress": 0.4, "expected_end": "soon"}
    desk.ledger.progress(hold, changes, "stage", event)


def test_the_one_that_waits_longest_is_built_for_by_one_builder(desk: Desk, service: PrebuildService) -> None:
    first, second = submitted(desk), submitted(desk)
    holds = [taken(service, owner) for owner in ("b1", "b2")]
    assert [h.job_id for h in holds] == [first.id, second.id]
    assert holds[0].target == "8.9"
    assert service.take("b3", TARGETS, FORMATS) is None
    service.end(holds[0])
    assert service.take("b3", TARGETS, FORMATS) is None
    service.give_back(holds[1])
    assert service.take("b3", {"tensorrt-rtx": ["8.6"]}, FORMATS) is None, "it builds for another"
    assert service.take("b3", TARGETS, ["pt2"]) is None, "it does not read the model"
    assert service.take("b3", {}, FORMATS) is None
    assert taken(service, "b3").job_id == second.id
    assert not service.renew(holds[1])


def test_what_is_given_back_is_no_attempt_and_forgives_none(desk: Desk, service: PrebuildService) -> None:
    submitted(desk)
    for _ in range(2):
        service.retry_later(taken(service))
        service.give_back(taken(service))
    service.retry_later(taken(service))
    assert service.take("b1", TARGETS, FORMATS) is None, "three attempts came to nothing"


def test_the_job_waits_as_before_and_shows_what_is_built(desk: Desk, service: PrebuildService) -> None:
    job = submitted(desk)
    hold = taken(service)
    progress(desk, hold)
    desk.ledger.remember(hold, result("a" * 64))
    found = desk.job(job.id)
    assert (found.status, found.stage, found.progress, found.expected_end) == ("queued", None, 0.0, None)
    assert (found.attempts, found.lease_owner, found.started_at) == (0, None, None)
    assert [s["name"] for s in found.stages] == ["queue", "build"]
    assert "compute capability 8.9" in found.stages[0]["detail"]
    *_, event = desk.service.events_after(LOCAL_TENANT, job.id, 0)
    told = {"stage": "build", "candidate": "rtx-fp16", "status": "running", "progress": 0.0, "expected_end": None}
    assert event.data == told, "of the job's progress"
    service.give_back(hold)
    assert [s["name"] for s in taken(service, "b2").before] == ["queue"], "the next one tells of its own"


def test_it_ends_when_the_jobs_own_worker_has_it_and_what_was_made_stays(desk: Desk, service: PrebuildService) -> None:
    job = submitted(desk)
    hold = taken(service)
    desk.ledger.remember(hold, result("a" * 64))
    claim = desk.claim(job, "gpu-1")
    assert claim is not None
    assert not service.renew(hold)
    for write in (lambda: progress(desk, hold), lambda: desk.ledger.remember(hold, result("b" * 64))):
        with pytest.raises(LeaseLost):
            write()
    assert desk.ledger.recall(LOCAL_TENANT, "a" * 64) is not None
    assert desk.ledger.recall(LOCAL_TENANT, "b" * 64) is None
    assert service.take("b2", TARGETS, FORMATS) is None
    desk.ledger.release(claim, "the worker shuts down")
    _expire(desk, job)
    assert taken(service, "b2").job_id == job.id, "it waits again"


def test_a_cancelled_job_is_built_for_no_more(desk: Desk, service: PrebuildService) -> None:
    job = submitted(desk)
    hold = taken(service)
    desk.service.cancel(LOCAL_TENANT, job.id)
    assert not service.renew(hold)
    with pytest.raises(LeaseLost):
        progress(desk, hold)
    assert desk.job(job.id).status == "cancelled"


def test_after_some_lost_builders_nobody_tries_again_and_the_job_waits(desk: Desk, service: PrebuildService) -> None:
    job = submitted(desk)
    for attempt in range(MOST_ATTEMPTS):
        assert taken(service, f"b{attempt}").job_id == job.id
        assert service.take("other", TARGETS, FORMATS) is None, "until its lease has run out"
        _expire(desk, job)
    assert service.take("b9", TARGETS, FORMATS) is None
    assert desk.job(job.id).status == "queued"
    assert desk.claim(job, "gpu-1") is not None


def _expire(desk: Desk, job: Job) -> None:
    with desk.db.write() as uow:
        uow.session.get_one(Prebuild, (job.id, "tensorrt-rtx")).lease_expires_at = utcnow() - timedelta(seconds=1)
