"""A worker that is idle though there is a job for it wakes itself; on SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from app.capabilities.service import CapabilityService
from app.db.base import utcnow
from app.db.orm import Job
from app.jobs.schedule import Offer
from tests.factories.webhooks import eventually
from tests.integration.conftest import Desk
from workers.lookout import Lookout


@pytest.fixture
def keep(desk: Desk) -> Iterator[Callable[..., Lookout]]:
    """Makes one and runs it, until the test is over."""
    shutdown, made = threading.Event(), list[tuple[Lookout, threading.Thread]]()

    def make(*queues: str) -> Lookout:
        lookout = Lookout(desk.ledger, Offer("w1", queues), 0.1, shutdown)
        made.append((lookout, threading.Thread(target=lookout.run)))
        made[-1][1].start()
        return lookout

    yield make
    shutdown.set()
    for lookout, thread in made:
        lookout.stop()
        thread.join(5)
        assert not thread.is_alive()


@contextmanager
def _nothing_sent(desk: Desk) -> Iterator[None]:
    desk.sent.clear()
    yield
    assert not eventually(lambda: bool(desk.sent), 0.5)


def test_a_message_that_was_lost_is_missed_by_whoever_is_idle(desk: Desk, keep: Callable[..., Lookout]) -> None:
    with _nothing_sent(desk):
        lookout = keep("anneal.cpu")
    with lookout.at_work():
        job = desk.submit()
        with _nothing_sent(desk):  # its message is lost, and this worker has something better to do
            pass
    assert eventually(lambda: job.id in desk.sent, 10)


def test_many_that_wait_are_no_reason_for_many_messages(desk: Desk, keep: Callable[..., Lookout]) -> None:
    for _ in range(30):
        desk.submit()
    desk.sent.clear()
    keep("anneal.cpu")
    assert eventually(lambda: len(desk.sent) > 1, 10)
    assert len(set(desk.sent)) == 1, "one wakes it, and it is the one that it would take"


def test_nobody_is_woken_for_what_nobody_can_run(desk: Desk, keep: Callable[..., Lookout]) -> None:
    desk.submit()
    with _nothing_sent(desk):
        keep("anneal.cuda", "anneal.hw.gpu-x")


def test_without_a_broker_an_idle_worker_takes_jobs_all_the_same(desk: Desk, keep: Callable[..., Lookout]) -> None:
    taken = threading.Event()
    desk.submit()
    dispatch, desk.ledger.dispatch = desk.ledger.dispatch, lambda _job: False
    keep("anneal.cpu").take = taken.set
    assert taken.wait(10)
    desk.ledger.dispatch = dispatch


def test_nor_where_what_it_sends_itself_is_not_heard(desk: Desk, keep: Callable[..., Lookout]) -> None:
    taken = threading.Event()
    desk.submit()
    desk.sent.clear()
    lookout = keep("anneal.cpu")
    lookout.take = taken.set
    assert taken.wait(10)
    assert len(desk.sent) >= 3, "it was sent a message first"


def test_a_dead_workers_job_wakes_an_idle_one(desk: Desk, keep: Callable[..., Lookout]) -> None:
    job = desk.submit()
    claim = desk.claim(job, "dies")
    assert claim is not None
    desk.sent.clear()
    keep("anneal.cpu")
    assert eventually(lambda: job.id in desk.sent, 10), "its lease is short, and nobody renews it"
    assert desk.job(job.id).status == "queued"


def test_a_pause_that_is_over_wakes_an_idle_worker(desk: Desk, keep: Callable[..., Lookout]) -> None:
    job = desk.submit()
    with desk.db.write() as uow:
        uow.session.execute(update(Job).values(not_before=utcnow() + timedelta(seconds=1.5)))
    with _nothing_sent(desk):
        keep("anneal.cpu")
    assert eventually(lambda: job.id in desk.sent, 10)


def test_a_worker_that_drains_takes_nothing_until_it_is_told(desk: Desk, keep: Callable[..., Lookout]) -> None:
    workers = CapabilityService(desk.db, desk.service.settings)
    backend = {"name": "onnxruntime", "versions": {}, "devices": ["cpu"], "precisions": ["fp32"]}
    one: dict[str, Any] = {"hardware": {"id": "cpu-x"}, "backends": [backend], "formats": ["onnx"]}
    one |= {"hostname": "h", "queues": ["anneal.cpu"]}
    workers.report("w1", **one)
    told: list[bool] = []
    lookout = keep("anneal.cpu")
    lookout.told = told.append

    def beat() -> None:
        found = workers.heartbeat("w1")
        assert found is not None
        lookout.drain(found.draining)

    beat()
    assert workers.drain("w1", draining=True)
    beat()
    job = desk.submit()
    with _nothing_sent(desk):
        assert not lookout.takes_jobs()
    assert workers.live() == []
    assert workers.drain("w1", draining=False)
    beat()
    beat()
    assert eventually(lambda: job.id in desk.sent, 10)
    assert lookout.takes_jobs()
    assert told == [True, False]
    # One that starts anew takes jobs again.
    workers.drain("w1", draining=True)
    workers.report("w1", **one)
    assert [worker.id for worker in workers.live()] == ["w1"]
    assert not workers.drain("w2", draining=True)
