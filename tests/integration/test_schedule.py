"""Who gets the next worker, on SQLite and PostgreSQL."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, update

from app.db.base import utcnow
from app.db.orm import LOCAL_TENANT, Job, JobEvent, Tenant
from app.domain.plan import Limits
from app.domain.spec import OptimizationSpec
from app.errors import AppError
from app.jobs.family import PARENTS
from app.jobs.ledger import Claim, LeaseLost
from app.jobs.operator import JobOperator
from app.jobs.schedule import Offer, Share, Waiting, in_line, in_order, may_take, turn_of
from app.jobs.sweep import end_overdue
from app.tenants.quotas import Quotas
from app.tenants.service import TenantService
from app.webhooks.repository import WebhookRepository
from tests.factories.filled import analyze, fill
from tests.factories.statements import statements
from tests.integration.conftest import Desk

CPU, GPU = "anneal.cpu", "anneal.cuda"
OFFER = Offer("w1", (CPU, "anneal.hw.cpu-x"))


class Line:
    """Jobs that wait, as rows: their ids are told by their numbers."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        first = desk.submit()
        self.columns = {c.name: getattr(first, c.name) for c in Job.__table__.columns}
        with desk.db.write() as uow:
            uow.session.execute(delete(JobEvent))
            uow.session.execute(delete(Job))
            uow.session.add_all(Tenant(id=f"tnt_{n}", name=n, created_at=utcnow()) for n in "abcd")
        self._count = 0

    def add(
        self, tenant: str = "a", count: int = 1, *, priority: int = 0, begun: bool = False, **columns: Any
    ) -> list[str]:
        columns |= {"priority": priority, "turn": turn_of(priority, begun=begun)}
        ids = [f"job_{self._count + n:06d}" for n in range(count)]
        self._count += count
        with self.desk.db.write() as uow:
            for job_id in ids:
                uow.session.add(Job(**{**self.columns, "id": job_id, "tenant_id": f"tnt_{tenant}", **columns}))
        return ids

    def pause(self, job_id: str, seconds: float) -> None:
        with self.desk.db.write() as uow:
            until = utcnow() + timedelta(seconds=seconds)
            uow.session.execute(update(Job).where(Job.id == job_id).values(not_before=until))

    def take(self, offer: Offer = OFFER) -> Claim | None:
        return self.desk.ledger.claim(offer)

    def taken(self, offer: Offer = OFFER) -> Iterable[str]:
        while (claim := self.take(offer)) is not None:
            yield claim.job_id


@pytest.fixture
def line(desk: Desk) -> Line:
    return Line(desk)


def test_a_tenant_with_one_job_does_not_wait_for_anothers_hundred(line: Line) -> None:
    line.add("a", 100)
    first = line.take()
    assert first is not None
    (late,) = line.add("b")
    second = line.take()
    assert second is not None
    assert second.job_id == late, "another worker comes while one of the hundred runs"
    # One worker alone: nothing runs whenever it is free.
    for claim in (first, second):
        line.desk.ledger.fail(claim, {"code": "x", "detail": "y"}, {})
    (later,) = line.add("b")
    found = []
    for _ in range(2):
        one = line.take()
        assert one is not None
        line.desk.ledger.fail(one, {"code": "x", "detail": "y"}, {})
        found.append(one.job_id)
    assert later in found


def test_priorities_order_ones_own_jobs_and_may_yield_to_others(line: Line) -> None:
    usual, urgent, idle = (line.add("a", priority=p)[0] for p in (0, 10, -10))
    (of_another,) = line.add("b", priority=-1)
    assert [*line.taken()] == [urgent, usual, of_another, idle]


def test_what_nobody_here_can_run_holds_up_nobody(line: Line) -> None:
    line.add("a", 50, queue=GPU)
    line.add("a", 50, queue=GPU, priority=10)
    (can,) = line.add("a")
    (special,) = line.add("a", queue="anneal.hw.cpu-x")
    assert [*line.taken()] == [can, special]
    assert line.take(Offer("w2", (GPU,))) is not None


def test_what_was_given_back_goes_first_and_a_pause_is_kept(line: Line) -> None:
    line.add("a", 3)
    claim = line.take()
    assert claim is not None
    line.desk.ledger.release(claim, "the worker shuts down")
    again = line.take()
    assert again is not None
    assert again.job_id == claim.job_id
    line.desk.ledger.retry_later(again, "the storage was away")
    with line.desk.db.read() as session:
        paused = session.get_one(Job, again.job_id).not_before
    assert paused is not None
    line.pause(again.job_id, 3600)
    other = line.take()
    assert other is not None
    assert other.job_id != again.job_id, "in its pause it is nobody's turn"
    line.pause(again.job_id, 0)
    third = line.take()
    assert third is not None
    assert third.job_id == again.job_id


def test_a_job_that_compares_others_runs_but_takes_nobodys_share(line: Line) -> None:
    line.add("a", 5, status="running", queue=PARENTS, lease_expires_at=None)
    line.add("b", 1, status="running", lease_expires_at=utcnow() + timedelta(hours=1))
    (of_b,) = line.add("b")
    (of_a,) = line.add("a")
    assert [*line.taken()] == [of_a, of_b]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 2), st.booleans()), max_size=12),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)),
)
def test_the_database_takes_them_in_the_order_of_the_rules(
    line: Line, jobs: list[tuple[str, int, bool]], running: dict[str, int]
) -> None:
    with line.desk.db.write() as uow:
        uow.session.execute(delete(JobEvent))
        uow.session.execute(delete(Job))
        uow.session.execute(update(Tenant).values(served_at=None))
    now = utcnow()
    waiting = []
    for tenant, priority, begun in jobs:
        (job_id,) = line.add(tenant, priority=priority, begun=begun)
        waiting.append(Waiting(job_id, f"tnt_{tenant}", priority, begun))
    for tenant, count in running.items():
        line.add(tenant, count, status="running", lease_expires_at=now + timedelta(hours=1))
    shares = {f"tnt_{tenant}": Share(count) for tenant, count in running.items()}
    assert [*line.taken()] == [job.job_id for job in in_order(waiting, shares)]


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_workers_at_one_moment_get_each_another_job(line: Line) -> None:
    line.add("a", 40)
    line.add("b", 3)
    found: list[str] = []
    barrier = threading.Barrier(6)

    def work(owner: str) -> None:
        barrier.wait()
        found.extend(line.taken(Offer(owner, (CPU,))))

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(set(found)) == 43, "none twice, none left"


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_tenant_that_submits_all_the_time_takes_no_turn_of_others(line: Line) -> None:
    limits = line.desk.service.settings.limits
    line.add("a", 4)
    line.add("b", 4)
    turns = []
    with line.desk.db.write() as uow:
        Quotas(uow.session, "tnt_a", limits)  # a submission of tenant a is under way all the while
        WebhookRepository(uow.session).count("tnt_a")
        for _ in range(4):  # one worker: nothing runs whenever it is free
            claim = line.take()
            assert claim is not None
            turns.append(claim.tenant_id)
            line.desk.ledger.fail(claim, {"code": "x", "detail": "y"}, {})
    assert sorted(turns) == ["tnt_a"] * 2 + ["tnt_b"] * 2


def _limited(line: Line, *tenants: str, running_jobs: int) -> None:
    service = TenantService(line.desk.db, line.desk.service.settings.limits)
    for tenant in tenants:
        service.put_on(tenant, None, Limits(running_jobs=running_jobs), actor="test")


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_tenant_at_which_another_worker_is_holds_up_nobody(line: Line) -> None:
    _limited(line, "a", running_jobs=1)
    line.add("a", 2)
    (of_b,) = line.add("b")
    with line.desk.db.write() as uow:
        heads = [head for head in in_line(uow.session, OFFER.queues, utcnow()) if head.job.tenant_id == "tnt_a"]
        assert [may_take(uow.session, head) for head in heads] == [True], "another worker is about to take one"
        claim = line.take()
        assert claim is not None
        assert claim.job_id == of_b
        assert line.take() is None, "nor does it wait for the end of what may take long"
    assert line.take() is not None, "nothing of it is lost"
    assert line.take() is None, "one of them may run"


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_submissions_do_not_keep_a_limited_tenants_jobs_from_workers(line: Line) -> None:
    _limited(line, "a", running_jobs=1)
    line.add("a")
    with line.desk.db.write() as uow:
        Quotas(uow.session, "tnt_a", line.desk.service.settings.limits)
        assert line.take() is not None


def test_workers_that_look_at_limited_tenants_at_once_find_all_that_may_run(line: Line) -> None:
    """In whichever order each of them sees the tenants: with locks that wait they would do so for each other."""
    _limited(line, *(f"tnt_{tenant}" for tenant in "abcd"), running_jobs=3)
    for tenant in "abcd":
        line.add(tenant, 5)
    found: list[str] = []
    barrier = threading.Barrier(6)

    def work(owner: str) -> None:
        barrier.wait(10)
        for _ in range(12):
            found.extend(line.taken(Offer(owner, (CPU,))))

    with ThreadPoolExecutor(6) as workers:
        for done in [workers.submit(work, f"w{i}") for i in range(6)]:
            done.result()
    assert len(found) == len(set(found)) == 12, "three of each, none twice"


def test_a_long_queue_and_many_ended_jobs_cost_a_claim_no_table_scan(line: Line) -> None:
    fill(line.desk.db.engine, 2000)
    for tenant in "abcd":
        line.add(tenant, 250)
        line.add(tenant, 250, queue=GPU, priority=5)
    analyze(line.desk.db.engine)
    explain = "EXPLAIN" if line.desk.db.engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
    with statements(line.desk.db.engine) as claim:
        assert line.take() is not None
    looks = [(sql, values) for sql, values in claim if "jobs" in sql and "INSERT" not in sql]
    assert len(looks) == 2, "one finds whose turn it is, one takes the job"
    for sql, values in looks:
        with line.desk.db.write() as uow:
            plan = uow.session.connection().exec_driver_sql(f"{explain} {sql}", values).all()
            uow.session.rollback()
        told = "\n".join(str(row) for row in plan)
        assert "ix_jobs_waiting" in told, told
        assert "Seq Scan on jobs" not in told, told
        assert not re.search(r"SCAN jobs(?! USING INDEX ix_jobs_active)", told), told
        assert not re.search("Sort Key: .*turn", told), told
        assert "TEMP B-TREE FOR ORDER BY" not in told, told


def test_a_claim_and_an_end_are_few_trips_to_the_database(desk: Desk) -> None:
    jobs = [desk.submit() for _ in range(2)]
    with statements(desk.db.engine) as looked:
        assert desk.ledger.waiting(OFFER) is not None
    with statements(desk.db.engine) as begun:
        claim = desk.ledger.claim(OFFER)
    assert claim is not None
    assert claim.job_id in {job.id for job in jobs}
    with statements(desk.db.engine) as renewed:
        desk.ledger.renew(claim)
    with statements(desk.db.engine) as ended:
        desk.ledger.fail(claim, {"code": "x", "detail": "y"}, {})
    assert [len(sent) for sent in (looked, begun, renewed, ended)] == [2, 4, 1, 4], (looked, begun, renewed, ended)


# A latest start


def test_a_job_that_waits_too_long_ends_with_a_remedy(desk: Desk) -> None:
    body = {"model_id": desk.add_model().id, "max_queue_seconds": 60, "webhook": {"url": "http://127.0.0.1:9/hook"}}
    spec = OptimizationSpec.model_validate(body)
    job, _ = desk.service.submit(LOCAL_TENANT, spec, correlation_id="t", idempotency=None)
    begun, _ = desk.service.submit(LOCAL_TENANT, spec, correlation_id="t", idempotency=None)
    assert end_overdue(desk.db) == 0
    with desk.db.write() as uow:
        past = utcnow() - timedelta(seconds=1)
        uow.session.execute(update(Job).values(start_by=past, created_at=past - timedelta(seconds=60)))
        uow.session.execute(update(Job).where(Job.id == begun.id).values(started_at=past))
    assert desk.ledger.sweep()["overdue"] == 1
    ended = desk.job(job.id)
    assert ended.status == "failed"
    assert ended.error is not None
    assert (ended.error["code"], "60 s" in ended.error["detail"]) == ("queued_too_long", True)
    assert ended.error["remedy"]
    assert ended.finished_at is not None, "which is when its webhook is due"
    last = [*desk.service.events_after(LOCAL_TENANT, job.id, 0)][-1]
    assert (last.data["status"], last.data["error"]["code"]) == ("failed", "queued_too_long")
    assert desk.job(begun.id).status == "queued", "a worker had it; what it waits for now is not its first start"


# What an operator does


def _operator(desk: Desk) -> JobOperator:
    return JobOperator(desk.db, desk.ledger.dispatch, desk.ledger.settings)


def test_a_requeued_job_goes_on_elsewhere_and_the_worker_that_had_it_cannot_write(desk: Desk) -> None:
    job = desk.submit()
    claim = desk.claim(job, "hangs")
    assert claim is not None
    desk.sent.clear()
    _operator(desk).requeue(job.id)
    assert desk.sent == [job.id]
    with pytest.raises(LeaseLost):
        desk.ledger.renew(claim)
    again = desk.claim(job, "w2")
    assert again is not None
    assert again.token > claim.token
    desk.ledger.fail(again, {"code": "x", "detail": "y"}, {})
    with pytest.raises(AppError) as caught:
        _operator(desk).requeue(job.id)
    assert caught.value.code == "job_ended"
    with pytest.raises(AppError, match="no job"):
        _operator(desk).requeue("job_0")


def test_requeueing_ends_a_pause(line: Line) -> None:
    (job_id,) = line.add()
    line.pause(job_id, 3600)
    assert line.take() is None
    _operator(line.desk).requeue(job_id)
    assert line.take() is not None


def test_what_was_to_be_cancelled_is_freed_from_a_worker_that_hangs(desk: Desk) -> None:
    jobs = [desk.submit() for _ in range(3)]
    claims = {claim.job_id: claim for _ in jobs if (claim := desk.ledger.claim(Offer("hangs", (CPU,)))) is not None}
    for job in jobs[:2]:
        assert desk.service.cancel(LOCAL_TENANT, job.id).status == "running"
    _operator(desk).requeue(jobs[0].id)
    assert desk.job(jobs[0].id).status == "cancelled"
    assert {*_operator(desk).requeue_all("hangs")} == {jobs[1].id, jobs[2].id}
    assert [desk.job(job.id).status for job in jobs] == ["cancelled", "cancelled", "queued"]
    with pytest.raises(LeaseLost):
        desk.ledger.renew(claims[jobs[1].id])
    (last,) = [*desk.service.events_after(LOCAL_TENANT, jobs[1].id, 0)][-1:]
    assert (last.data["status"], last.data["worker"]) == ("cancelled", "hangs")


def test_asking_to_cancel_leaves_a_row_where_it_did_something(desk: Desk) -> None:
    job = desk.submit()
    assert desk.claim(job) is not None
    audit = TenantService(desk.db, desk.service.settings.limits).audit
    for _ in range(2):
        desk.service.cancel(LOCAL_TENANT, job.id)
    assert len(audit(LOCAL_TENANT, limit=9, action="job.cancel")) == 1, "asked once more, nothing is done"
    _operator(desk).requeue(job.id)
    desk.service.cancel(LOCAL_TENANT, job.id)
    assert len(audit(LOCAL_TENANT, limit=9, action="job.cancel")) == 1, "nor after its end"


def test_all_jobs_of_a_dead_worker_go_on(line: Line) -> None:
    line.add("a", 3)
    held = [*line.taken(Offer("dead", (CPU,)))][:2]
    line.add("b")
    other = line.take(Offer("lives", (CPU,)))
    assert other is not None
    found = _operator(line.desk).requeue_all("dead")
    assert {*held} < {*found}
    assert len(found) == 3
    assert {*line.taken()} == {*found}
