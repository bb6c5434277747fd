"""The service's state for its metrics: queues, tenants, overdue leases, webhooks, and counts that outlive workers."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import update

from app.capabilities.service import CapabilityService
from app.db import counts
from app.db.accounts import LOCAL_TENANT, Tenant
from app.db.base import utcnow
from app.db.orm import Job
from app.db.uow import Database
from app.db.webhooks import WebhookDelivery
from app.domain.spec import OptimizationSpec
from app.http.metrics import Metrics
from app.operations.statistics import OTHER, Snapshot, take
from app.settings import Settings
from tests.integration.conftest import Desk


def snapshot(desk: Desk, tenants: int = 0) -> Snapshot:
    live = CapabilityService(desk.db, Settings(home=desk.scratch)).live()
    with desk.db.read() as session:
        return take(session, live, tenants=tenants)


def change(desk: Desk, job_id: str, **values: object) -> None:
    with desk.db.write() as uow:
        uow.session.execute(update(Job).where(Job.id == job_id).values(**values))


def add_tenant(desk: Desk, name: str, jobs: int) -> str:
    tenant_id = f"tnt_{name}"
    with desk.db.write() as uow:
        uow.session.add(Tenant(id=tenant_id, name=name))
    for _ in range(jobs):
        spec = OptimizationSpec(model_id=desk.add_model(tenant_id).id)
        desk.service.submit(tenant_id, spec, correlation_id="test", idempotency=None)
    return tenant_id


def report(desk: Desk, queues: list[str]) -> None:
    service = CapabilityService(desk.db, Settings(home=desk.scratch))
    service.report("w1", hostname="h", hardware={"id": "cpu"}, backends=[], formats=["onnx"], queues=queues)


def test_queues_are_told_with_their_oldest_job_and_their_workers(desk: Desk) -> None:
    empty = snapshot(desk)
    assert (empty.waiting, empty.running, empty.live_workers, empty.overdue_since) == ({}, {}, 0, None)
    first, second = desk.submit(), desk.submit()
    queue = first.queue
    change(desk, first.id, created_at=utcnow() - timedelta(seconds=500))
    report(desk, [queue, "anneal.other"])
    found = snapshot(desk)
    assert (found.waiting[queue].depth, found.workers[queue], found.running[queue]) == (2, 1, 0)
    assert 500 <= found.waiting[queue].seconds(found.at) < 600
    assert (found.waiting["anneal.other"].depth, found.workers["anneal.other"]) == (0, 1)
    assert desk.claim(first) is not None
    found = snapshot(desk)
    assert (found.waiting[queue].depth, found.running[queue]) == (1, 1)
    assert found.waiting[queue].seconds(found.at) < 60
    assert second.id


def test_a_lease_that_nobody_sees_to_is_told(desk: Desk) -> None:
    claim = desk.claim(desk.submit())
    assert claim is not None
    assert snapshot(desk).overdue_since is None
    change(desk, claim.job_id, lease_expires_at=utcnow() - timedelta(seconds=90))
    found = snapshot(desk)
    assert found.overdue_since is not None
    assert 90 <= (found.at - found.overdue_since).total_seconds() < 120
    desk.ledger.sweep()
    found = snapshot(desk)
    assert found.overdue_since is None
    assert found.requeued == {"lease_expired": 1}


def test_the_tenants_with_the_most_are_named_where_that_is_asked_for(desk: Desk) -> None:
    desk.submit()
    one, three = add_tenant(desk, "one", 1), add_tenant(desk, "three", 3)
    assert snapshot(desk).tenants == {}
    named = snapshot(desk, tenants=1).tenants
    assert {tenant: waiting.depth for (_, tenant), waiting in named.items()} == {three: 3, OTHER: 2}
    named = snapshot(desk, tenants=10).tenants
    assert {tenant: waiting.depth for (_, tenant), waiting in named.items()} == {three: 3, one: 1, LOCAL_TENANT: 1}


def test_webhooks_that_wait_are_told(desk: Desk) -> None:
    job = desk.submit()
    change(desk, job.id, webhook_url="https://example.org/")
    assert snapshot(desk).webhooks.depth == 0
    desk.service.cancel(LOCAL_TENANT, job.id)
    for due_at, status, overdue in (
        (utcnow() - timedelta(seconds=30), "pending", range(30, 60)),
        (utcnow() + timedelta(hours=1), "pending", range(1)),  # refused, and due again later
        (None, "delivered", None),
    ):
        with desk.db.write() as uow:
            uow.session.execute(update(WebhookDelivery).values(due_at=due_at, status=status))
        found = snapshot(desk)
        assert found.webhooks.depth == (0 if overdue is None else 1)
        assert int(found.webhooks.seconds(found.at)) in (overdue or range(1))


def test_what_failed_and_what_was_queued_again_is_counted_once_for_all(desk: Desk) -> None:
    """With the change itself: what was not committed did not happen."""
    for code in ("bad_model", "bad_model", "internal"):
        claim = desk.claim(desk.submit())
        assert claim is not None
        desk.ledger.fail(claim, {"code": code, "detail": "x"}, {})
    job = desk.submit()
    for reason in ("shutdown", "storage"):  # after the latter it pauses
        claim = desk.claim(job)
        assert claim is not None
        (desk.ledger.retry_later if reason == "storage" else desk.ledger.release)(claim, reason)

    def fail() -> None:
        with desk.db.write() as uow:
            counts.note(uow.session, counts.FAILED, "never")
            raise KeyError("a fault before the commit")

    with pytest.raises(KeyError):
        fail()
    found = snapshot(desk)
    assert found.failed == {"bad_model": 2, "internal": 1}
    assert found.requeued == {"release": 2}


def test_many_count_at_once(desk: Desk) -> None:
    def one(_: int) -> None:
        with desk.db.write() as uow:
            counts.note(uow.session, counts.FAILED, "b")
            counts.note(uow.session, counts.FAILED, "a" * 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(40)))
    with desk.db.read() as session:
        assert counts.counted(session) == {counts.FAILED: {"b": 40, "a" * 64: 40}}


def test_a_database_that_is_away_is_told_and_the_requests_are_told_all_the_same(fresh_postgres: str) -> None:
    metrics = Metrics()
    assert isinstance(metrics.registry, CollectorRegistry)
    metrics.observe("GET", "/v1/jobs", 200, 0.01)
    from app.db.base import make_engine

    nowhere = Database(make_engine(fresh_postgres.replace("postgresql://", "postgresql+psycopg://") + "-gone"))

    def read() -> Snapshot:
        with nowhere.read() as session:
            return take(session, [], tenants=0)

    metrics.watch(read)
    started = time.monotonic()
    told = metrics.render().decode()
    nowhere.close()
    assert time.monotonic() - started < 30
    assert "anneal_database_up 0.0" in told
    assert "anneal_queue_depth" not in told
    assert 'anneal_http_requests_total{method="GET",route="/v1/jobs",status="200"} 1.0' in told
