"""A job over several targets: real workers of two kinds on this machine (one of them confined to one core), killed and
cancelled; and, without workers, how its state follows those of its jobs, on both databases."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.capabilities.service import CapabilityService
from app.db.base import utcnow
from app.db.orm import LOCAL_TENANT, Job
from app.domain.spec import OptimizationSpec
from app.errors import AppError
from app.idempotency import Idempotency
from app.jobs.family import PARENTS
from app.webhooks.queue import DeliveryQueue, Passed
from tests.factories.deployment import Deployment, deployment, job_row, kill, submit_case, wait_for_stage
from tests.integration.conftest import Desk

pytestmark = pytest.mark.timeout(280)

TRAFFIC = {"slo": {"p99_latency_ms": 200}, "rate_per_second": 20}


# Without workers


@pytest.fixture
def machines(desk: Desk) -> Desk:
    """Three kinds of them are live."""
    service = CapabilityService(desk.db, desk.service.settings)
    backend = {"name": "onnxruntime", "versions": {}, "devices": ["cpu"], "precisions": ["fp32"]}
    for name in ("a", "b", "c"):
        service.report(
            f"w-{name}",
            hostname="h",
            hardware={"id": f"cpu-{name}", "kind": "cpu"},
            backends=[backend],
            formats=["onnx"],
            queues=[f"anneal.hw.cpu-{name}"],
        )
    return desk


def _submit(desk: Desk, *names: str, key: str | None = None, **spec: Any) -> tuple[Job, bool]:
    model_id = spec.pop("model_id", None) or desk.add_model().id
    told = {
        "model_id": model_id,
        "traffic": TRAFFIC,
        "targets": [{"hardware": f"cpu-{n}", "price_per_hour": i + 1} for i, n in enumerate(names)],
        **spec,
    }
    idempotency = Idempotency(key, "0" * 64) if key else None
    return desk.service.submit(
        LOCAL_TENANT, OptimizationSpec.model_validate(told), correlation_id="t", idempotency=idempotency
    )


def _children(desk: Desk, parent: Job) -> list[Job]:
    return [*desk.service.children(LOCAL_TENANT, parent.id)]


def test_each_target_waits_in_the_queue_of_its_machine(machines: Desk) -> None:
    parent, new = _submit(machines, "b", "a", webhook={"url": "http://127.0.0.1:9/hook"})
    children = _children(machines, parent)
    assert new
    assert [c.queue for c in children] == ["anneal.hw.cpu-b", "anneal.hw.cpu-a"]
    assert [c.spec["cost"]["price_per_hour"] for c in children] == [1, 2]
    assert machines.sent == [c.id for c in children], "nobody is sent the parent"
    assert (parent.status, parent.queue, parent.webhook_url is not None) == ("running", PARENTS, True)
    assert all(c.webhook_url is None for c in children)
    assert [s["job_id"] for s in parent.stages] == [c.id for c in children]
    # The sweeper, too, has nothing to do with it, however long it takes.
    time.sleep(0.3)
    machines.ledger.sweep()
    assert parent.id not in machines.sent
    assert machines.job(parent.id).status == "running"
    assert machines.claim(parent) is None


def test_the_same_key_is_the_same_job_with_the_same_children(machines: Desk) -> None:
    model_id = machines.add_model().id
    first, new = _submit(machines, "a", "b", key="k", model_id=model_id)
    again, newer = _submit(machines, "a", "b", key="k", model_id=model_id)
    assert (new, newer, again.id) == (True, False, first.id)
    assert len(_children(machines, first)) == 2
    assert len(machines.sent) == 2


def test_the_jobs_of_targets_count_and_what_compares_them_does_not(machines: Desk) -> None:
    machines.service.settings.limits.active_jobs_per_tenant = 3
    parent, _ = _submit(machines, "a", "b")
    with pytest.raises(AppError, match="2 more would exceed 3") as caught:
        _submit(machines, "a", "b")
    assert (caught.value.code, caught.value.retryable) == ("too_many_jobs", True)
    machines.submit()
    machines.service.cancel(LOCAL_TENANT, parent.id)
    _submit(machines, "a", "b")
    machines.service.settings.limits.active_jobs_per_tenant = 1
    with pytest.raises(AppError, match="2 more would exceed 1") as caught:
        _submit(machines, "a", "b")
    assert not caught.value.retryable


def test_a_target_that_is_not_live_leaves_nothing_behind(machines: Desk) -> None:
    with pytest.raises(AppError, match=r"hardware 'cpu-z' is live\. Live hardware: cpu-a, cpu-b, cpu-c"):
        _submit(machines, "a", "z")
    assert machines.sent == []
    assert machines.service.list(LOCAL_TENANT, limit=10, before=None, status=None, model_id=None) == []


def _end(desk: Desk, job: Job, how: str) -> None:
    claim = desk.claim(job)
    assert claim is not None
    if how == "failed":
        desk.ledger.fail(claim, {"code": "x", "detail": f"{job.id} failed"}, {})
    else:
        desk.ledger.cancelled(claim, {})


def _at_once(*works: Callable[[], object]) -> None:
    """All begin at one moment, each in a thread; none of them may fail."""
    together, errors = threading.Barrier(len(works)), list[BaseException]()

    def attempt(work: Callable[[], object]) -> None:
        together.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=attempt, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []


def test_targets_that_end_at_one_moment_are_all_seen(machines: Desk) -> None:
    """The last of them ends the job, whichever that is: none leaves it to another."""
    for _ in range(8):
        parent, _new = _submit(machines, "a", "b", "c")
        _at_once(*(partial(_end, machines, child, "failed") for child in _children(machines, parent)))
        job = machines.job(parent.id)
        assert (job.status, job.progress) == ("failed", 1.0)
        assert job.error is not None
        assert job.error["code"] == "no_target_succeeded"
        assert [s["status"] for s in job.stages] == ["failed"] * 3


def test_a_cancel_and_an_end_at_one_moment_wait_for_each_other(machines: Desk) -> None:
    for _ in range(8):
        parent, _new = _submit(machines, "a", "b", "c")
        claims = [machines.claim(child) for child in _children(machines, parent)[:2]]
        _at_once(
            partial(machines.service.cancel, LOCAL_TENANT, parent.id),
            *(partial(machines.ledger.fail, c, {"code": "x", "detail": "d"}, {}) for c in claims if c is not None),
        )
        assert machines.job(parent.id).status == "cancelled"
        assert [c.status for c in _children(machines, parent)] == ["failed", "failed", "cancelled"]


def test_cancel_reaches_all_and_the_webhook_hears_of_it_once(machines: Desk) -> None:
    parent, _ = _submit(machines, "a", "b", webhook={"url": "http://127.0.0.1:9/hook"})
    running, _queued = _children(machines, parent)
    claim = machines.claim(running)
    assert claim is not None
    with machines.db.read() as session:
        assert DeliveryQueue(session).next_of(LOCAL_TENANT, utcnow(), Passed()) is None
    asked = machines.service.cancel(LOCAL_TENANT, parent.id)
    assert (asked.status, asked.cancel_requested_at is not None) == ("running", True)
    assert [c.status for c in _children(machines, parent)] == ["running", "cancelled"]
    assert machines.ledger.renew(claim), "its worker hears of it"
    machines.ledger.cancelled(claim, {})
    assert machines.job(parent.id).status == "cancelled"
    with machines.db.read() as session:
        due = DeliveryQueue(session).next_of(LOCAL_TENANT, utcnow(), Passed())
        assert due is not None
        assert due.job_id == parent.id
        assert DeliveryQueue(session).waiting_tenants(utcnow(), Passed(deliveries=[due.id])) == []
    seen = [e.data["status"] for e in machines.service.events_after(LOCAL_TENANT, parent.id, 0) if e.type != "note"]
    assert seen == ["running", "running", "cancelled", "cancelled"]


def test_a_dead_worker_costs_its_target_only_time(machines: Desk) -> None:
    parent, _ = _submit(machines, "a", "b")
    lost, other = _children(machines, parent)
    assert machines.claim(lost, "dies") is not None
    _end(machines, other, "failed")
    time.sleep(0.4)
    machines.ledger.sweep()
    assert machines.job(lost.id).status == "queued"
    job = machines.job(parent.id)
    assert (job.status, [s["status"] for s in job.stages]) == ("running", ["queued", "failed"])
    _end(machines, lost, "cancelled")
    assert machines.job(parent.id).status == "failed"


# With two workers


def _start_on(deployed: Deployment, cores: set[int]) -> Any:
    """A worker that may use these cores only: another hardware id than one that may use another number of them."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        return deployed.start_worker()
    finally:
        os.sched_setaffinity(0, own)


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[Deployment]:
    with deployment(tmp_path / "home") as found:
        yield found


def _hardware(deployed: Deployment) -> list[str]:
    found: list[str] = httpx.get(f"{deployed.url}/v1/capabilities").json()["hardware"]
    return sorted(found)


def test_two_machines_are_compared_though_a_worker_is_killed_meanwhile(deployed: Deployment, tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    first = _start_on(deployed, {cores[0]})
    _start_on(deployed, set(cores[:2]))
    deployed.wait_for(lambda: len(_hardware(deployed)) == 2)
    one, two = _hardware(deployed)
    prices = {one: 0.05, two: 0.10}
    targets = [{"hardware": name, "price_per_hour": price} for name, price in prices.items()]
    db = deployed.database()
    with deployed.client() as client:
        job = submit_case(client, tmp_path, 40, targets=targets, traffic=TRAFFIC, budget_seconds=25)
        assert [c["hardware"] for c in job["children"]] == [one, two]
        assert "report" not in job["links"]
        assert httpx.get(f"{deployed.url}/v1/jobs/{job['id']}/report").status_code == 409
        lost = next(c["id"] for c in job["children"] if c["hardware"].endswith("-1c"))
        assert wait_for_stage(db, lost, {"export", "simplify", "quantize", "build", "validate", "benchmark"})
        kill(first)
        _start_on(deployed, {cores[0]})
        job = client.wait(job["id"])
    db_row = job_row(db, lost)
    db.close()
    assert job["status"] == "succeeded", (job, deployed.logs())
    assert db_row.fencing_token >= 2, "another worker took it up again"
    assert [s["status"] for s in job["stages"]] == ["succeeded", "succeeded"]
    assert len(job["engine_ids"]) == 2
    report = httpx.get(f"{deployed.url}{job['links']['report']}").json()
    assert {t["hardware"]: t["price_per_hour"] for t in report["targets"]} == prices
    assert report["limit"] == "p99 ≤ 200 ms"
    for target in report["targets"]:
        own = httpx.get(f"{deployed.url}/v1/jobs/{target['job_id']}/report").json()
        cost, cold = own["traffic"]["cost"], own["traffic"]["cold_start"]
        assert target["cold_start"] == cold
        assert (cold is None) == ("cold_start" in own["traffic"]["reasons"])
        assert cold is None or 0 < cold["alive_seconds"] <= cold["first_answer_seconds"]
        assert target["per_million_requests"] == cost["per_million_requests"]
        if cost["per_million_requests"] is None:
            assert target["reason"], own["traffic"]
            continue
        assert cost["per_million_requests"] == pytest.approx(
            prices[target["hardware"]] / (cost["goodput"] * 3600) * 1e6, rel=1e-3
        )
        assert target["hardware"] in report["headline"]
    page = httpx.get(f"{deployed.url}{job['links']['report']}", headers={"Accept": "text/html"})
    assert all(name in page.text for name in prices)


def test_cancelling_the_comparison_ends_the_work_on_every_machine(deployed: Deployment, tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    _start_on(deployed, {cores[0]})
    _start_on(deployed, set(cores[:2]))
    deployed.wait_for(lambda: len(_hardware(deployed)) == 2)
    targets = [{"hardware": name, "price_per_hour": 1} for name in _hardware(deployed)]
    with deployed.client() as client:
        job = submit_case(client, tmp_path, 41, targets=targets, traffic=TRAFFIC, budget_seconds=120)
        children = [c["id"] for c in job["children"]]
        deployed.wait_for(lambda: all(client.job(c)["status"] == "running" for c in children))
        client.cancel(job["id"])
        job = client.wait(job["id"], check=False)
        assert job["status"] == "cancelled"
        assert [client.job(c)["status"] for c in children] == ["cancelled", "cancelled"]
    targets[1] = {"hardware": "cpu-nobody", "price_per_hour": 1}
    spec = {"model_id": job["model_id"], "targets": targets, "traffic": TRAFFIC}
    refused = httpx.post(f"{deployed.url}/v1/jobs", json=spec)
    assert (refused.status_code, refused.json()["code"]) == (422, "unavailable_target")
    assert refused.json()["errors"][0]["pointer"] == "/targets/1/hardware"
    assert targets[0]["hardware"] in refused.json()["detail"]
