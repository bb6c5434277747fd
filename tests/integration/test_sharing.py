"""Who answers the calls of a job that another worker has, on SQLite and PostgreSQL: one helper at a time, of the same
kind, no longer than the job runs under the token that they were handed out with."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from app.db.base import utcnow
from app.db.orm import LOCAL_TENANT, StageResult
from app.db.sharing import SharedCall
from app.jobs.ledger import Claim, LeaseLost
from app.settings import WorkerSettings
from app.sharing.service import MOST_TAKES, CallBoard, CallState, HelpHold, Offer, SharingService, idle_of
from tests.integration.conftest import Desk

LONG = WorkerSettings(lease_s=60)
A, B, C = ("a" * 64, "b" * 64, "c" * 64)


class Shared:
    """A job that runs, and what its worker hands out."""

    def __init__(self, desk: Desk, owner: str = "owner", lease: WorkerSettings = LONG) -> None:
        self.desk, self.job = desk, desk.submit()
        desk.ledger.settings = lease
        claim = desk.claim(self.job, owner)
        assert claim is not None
        self.claim: Claim = claim
        self.board = CallBoard(desk.db, claim, lease)

    def offer(self, *ids: str, kind: str = "k", apart: str | None = None) -> None:
        offers = [Offer(i, {"asks": i}, -n, kind, apart) for n, i in enumerate(ids)]
        self.board.offer(offers)


@pytest.fixture
def helpers(desk: Desk) -> SharingService:
    return SharingService(desk.db, LONG)


def taken(helpers: SharingService, owner: str = "h1", machine: str = "m") -> HelpHold:
    hold = helpers.take(owner, ["k"], machine)
    assert hold is not None
    return hold


def lapse(desk: Desk, call_id: str) -> None:
    """As if the helper had not been heard of for a lease."""
    with desk.db.write() as uow:
        past = utcnow() - timedelta(seconds=1)
        uow.session.execute(update(SharedCall).where(SharedCall.id == call_id).values(lease_expires_at=past))


def result(key: str) -> StageResult:
    now = utcnow()
    return StageResult(
        tenant_id=LOCAL_TENANT, key=key, stage="build", outputs={}, data={}, failure=None, seconds=1.0, created_at=now,
        used_at=now,
    )  # fmt: skip


def _helpers_begin_at_the_end_and_each_call_has_one(shared: Shared, helpers: SharingService) -> None:
    shared.offer(A, B, C)
    holds = [taken(helpers, name) for name in ("h1", "h2")]
    assert [h.call_id for h in holds] == [C, B]
    assert (holds[0].body, holds[0].tenant_id) == ({"asks": C}, LOCAL_TENANT)
    assert shared.board.states() == dict.fromkeys((A, B, C), CallState.FREE), "none has begun"
    helpers.doing(holds[0], "key")
    helpers.end(holds[0])
    helpers.doing(holds[1], "key")
    assert shared.board.states() == {A: CallState.FREE, B: CallState.HELD, C: CallState.ENDED}
    assert not shared.board.take_back(B)
    assert not shared.board.take_back(C)
    assert shared.board.take_back(A)
    assert helpers.take("h3", ["k"], "m") is None


def _who_cannot_make_the_same_takes_none(shared: Shared, helpers: SharingService) -> None:
    shared.offer(A)
    assert helpers.take("h1", ["another", "kind"], "m") is None
    assert helpers.take("owner", ["k"], "m") is None, "it has the job itself"
    shared.board.withdraw()
    shared.offer(B, apart="m")
    assert helpers.take("h1", ["k"], "m") is None, "it would disturb the job's own worker"
    assert taken(helpers, machine="n").call_id == B


def _what_nobody_has_begun_is_taken_back_and_its_helper_stops(shared: Shared, helpers: SharingService) -> None:
    shared.offer(A, B)
    hold = taken(helpers)
    assert shared.board.take_back(hold.call_id)
    for late in (helpers.renew, helpers.end, helpers.give_back, lambda h: helpers.doing(h, "key")):
        with pytest.raises(LeaseLost):
            late(hold)
    with pytest.raises(LeaseLost):
        shared.desk.ledger.remember(hold, result("1" * 64))
    waits = taken(helpers)
    helpers.doing(waits, "key")
    helpers.waits(waits)
    assert shared.board.take_back(waits.call_id), "its machine is not free"


def _a_helper_that_is_lost_is_fenced_off(shared: Shared, helpers: SharingService) -> None:
    desk = shared.desk
    shared.offer(A)
    stopped = taken(helpers)
    helpers.doing(stopped, "key")
    desk.ledger.remember(stopped, result("1" * 64))
    lapse(desk, A)
    assert shared.board.states() == {A: CallState.FREE}
    other = taken(helpers, "h2")
    assert other.take == stopped.take + 1
    with pytest.raises(LeaseLost):
        helpers.renew(stopped)
    with pytest.raises(LeaseLost):
        desk.ledger.remember(stopped, result("2" * 64))
    again = replace(stopped, owner="h2")  # its name does not make it the one who holds it
    with pytest.raises(LeaseLost):
        helpers.end(again)
    assert not helpers.renew(other)
    assert desk.ledger.recall(LOCAL_TENANT, "1" * 64) is not None, "what it finished stays"
    assert desk.ledger.recall(LOCAL_TENANT, "2" * 64) is None


def _what_comes_back_again_and_again_is_left_to_the_jobs_worker(shared: Shared, helpers: SharingService) -> None:
    shared.offer(A)
    for _ in range(MOST_TAKES):
        helpers.give_back(taken(helpers))
    assert helpers.take("h1", ["k"], "m") is None
    assert shared.board.take_back(A)


def test_it_ends_with_the_job(desk: Desk, helpers: SharingService) -> None:
    for end in ("cancel", "expire"):
        shared = Shared(desk, lease=WorkerSettings(lease_s=0.2))
        shared.offer(A, B)
        hold = taken(helpers)
        if end == "expire":
            time.sleep(0.25)
            assert helpers.take("h2", ["k"], "m") is None, "its worker is lost: nothing more is begun for it"
            assert not helpers.renew(hold), "what was begun goes on until somebody sees to the job"
            desk.ledger.sweep()
            with pytest.raises(LeaseLost):
                helpers.renew(hold)
        desk.service.cancel(LOCAL_TENANT, shared.job.id)
        with pytest.raises(LeaseLost):
            helpers.renew(hold)
        assert helpers.take("h2", ["k"], "m") is None


def test_the_next_attempt_begins_with_none(desk: Desk, helpers: SharingService) -> None:
    shared = Shared(desk)
    shared.offer(A)
    hold = taken(helpers)
    desk.ledger.release(shared.claim, "the worker shuts down")
    assert helpers.take("h2", ["k"], "m") is None
    helpers.remove_stale()
    with desk.db.read() as session:
        assert not session.scalars(select(SharedCall)).all()
    claim = desk.claim(shared.job, "owner-2")
    assert claim is not None
    board = CallBoard(desk.db, claim, LONG)
    assert board.states() == {}
    board.offer([Offer(A, {}, 0, "k")])
    with pytest.raises(LeaseLost):
        helpers.renew(hold)
    assert not shared.board.take_back(A), "whose attempt is over takes nothing from the next"
    shared.board.withdraw()
    assert taken(helpers, "h2").token == claim.token


def _the_same_stage_is_computed_by_one(shared: Shared, helpers: SharingService) -> None:
    desk = shared.desk
    shared.offer(A, B)
    first, second = sorted([taken(helpers, name) for name in ("h1", "h2")], key=lambda h: h.call_id)
    for hold in (first, second):
        helpers.doing(hold, "key")
    assert [helpers.elsewhere(h, "key") for h in (first, second)] == [False, True], "one of two goes on"
    assert shared.board.doing("key")
    assert not shared.board.doing("other")
    stages = [{"name": "simplify", "key": "own", "status": "running"}]
    desk.ledger.progress(shared.claim, {"stages": stages}, "stage", {})
    assert helpers.elsewhere(first, "own")
    lapse(desk, first.call_id)
    helpers.end(second)
    assert not shared.board.doing("key"), "one is lost, the other has ended"


def _clients_see_what_the_jobs_own_worker_does(shared: Shared, helpers: SharingService) -> None:
    desk = shared.desk
    shared.offer(A)
    before = desk.job(shared.job.id)
    hold = taken(helpers)
    desk.ledger.progress(hold, {"stages": [], "progress": 0.9}, "stage", {})
    desk.ledger.remember(hold, result("1" * 64))
    after = desk.job(shared.job.id)
    assert (after.version, after.progress, after.attempts) == (before.version, before.progress, before.attempts)


def test_the_job_with_the_fewest_helpers_is_helped_first(desk: Desk, helpers: SharingService) -> None:
    """And idle is who has no job."""
    first, second = Shared(desk, "o1"), Shared(desk, "o2")
    first.offer(A, B)
    second.offer(C)
    assert [taken(helpers, f"h{n}").job_id for n in range(3)] == [first.job.id, second.job.id, first.job.id]
    assert idle_of(desk.db, ["o1", "o2", "h1", "h2"]) == 2


def test_one_helper_of_the_same_kind_answers_a_call(desk: Desk, helpers: SharingService) -> None:
    """Each on a job of its own, one after the other: a migrated database takes longer than all of them."""
    for check in (
        _helpers_begin_at_the_end_and_each_call_has_one,
        _who_cannot_make_the_same_takes_none,
        _what_nobody_has_begun_is_taken_back_and_its_helper_stops,
        _a_helper_that_is_lost_is_fenced_off,
        _what_comes_back_again_and_again_is_left_to_the_jobs_worker,
        _the_same_stage_is_computed_by_one,
        _clients_see_what_the_jobs_own_worker_does,
    ):
        shared = Shared(desk)
        check(shared, helpers)
        shared.board.withdraw()
