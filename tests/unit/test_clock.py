"""The database's clock, as every process reads it: from answers that come late, on machines whose own clock is off."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from sqlalchemy import text

from app.db import clock
from app.db.base import make_engine
from app.db.clock import SharedClock
from app.settings import Settings

THEN = 1_800_000_000.0  # of the database's clock where this process's own has counted 1000 s


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Its two clocks: `elapsed`, which nobody sets, and `own`, which somebody may have set wrong."""
    found = {"elapsed": 1000.0, "own": THEN}
    monkeypatch.setattr(clock, "_elapsed", lambda: found["elapsed"])
    monkeypatch.setattr(clock, "_own", lambda: found["own"])
    return found


def _answered(shared: SharedClock, at: float, late_s: float, *, share: float = 0.5, ahead_s: float = 0.0) -> None:
    """An answer that took so long and was given after that share of it."""
    theirs = THEN - 1000.0 + at + share * late_s + ahead_s
    shared.learn(datetime.fromtimestamp(theirs, UTC), at, at + late_s)


def test_a_machine_goes_by_its_own_clock_until_it_knows_better(machine: dict[str, float]) -> None:
    machine["own"] = THEN + 300
    assert SharedClock().now() == THEN + 300
    assert SharedClock().off_by() == 0


@pytest.mark.parametrize("off_s", [-300.0, -2.0, 2.0, 300.0])
def test_a_clock_that_is_off_is_not_gone_by(machine: dict[str, float], off_s: float) -> None:
    shared = SharedClock()
    _answered(shared, 1000.0, 0.01)
    machine["own"] = THEN + off_s
    assert shared.now() == pytest.approx(THEN, abs=0.006)
    assert shared.off_by() == pytest.approx(off_s, abs=0.006)


def test_a_clock_that_is_right_is(machine: dict[str, float]) -> None:
    shared = SharedClock()
    _answered(shared, 1000.0, 0.01)
    machine["own"] = THEN + 0.3
    assert shared.now() == THEN + 0.3
    assert shared.off_by() == 0


def test_a_clock_that_is_set_in_between_is_seen_at_once(machine: dict[str, float]) -> None:
    shared = SharedClock()
    _answered(shared, 1000.0, 0.01)
    for seconds, step in ((1.0, 0.0), (2.0, 120.0), (3.0, -120.0)):
        machine["elapsed"], machine["own"] = 1000.0 + seconds, THEN + seconds + step
        assert shared.now() == pytest.approx(THEN + seconds, abs=0.006)


def test_answers_that_come_late_do_no_harm(machine: dict[str, float]) -> None:
    """Each tells less than those before; what they agree on is kept, whatever share of the time was the way there."""
    draw, shared = random.Random(1), SharedClock()
    _answered(shared, 1000.0, 0.02, share=0.1)
    for second in range(1, 200):
        _answered(shared, 1000.0 + second, draw.uniform(0.02, 8.0), share=draw.random())
    machine["elapsed"], machine["own"] = 1208.0, 0.0
    assert shared.now() == pytest.approx(THEN + 208, abs=0.06)


def test_a_database_whose_clock_is_set_is_followed(machine: dict[str, float]) -> None:
    shared = SharedClock()
    _answered(shared, 1000.0, 0.01)
    _answered(shared, 1015.0, 0.01, ahead_s=40.0)
    machine["elapsed"], machine["own"] = 1016.0, 0.0
    assert shared.now() == pytest.approx(THEN + 16 + 40, abs=0.006)


def test_it_is_learnt_from_postgresql_and_again_after_a_while(
    fresh_postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.db import postgres

    shared = SharedClock()
    monkeypatch.setattr(postgres, "CLOCK", shared)
    engine = make_engine(Settings(DATABASE_URL=fresh_postgres).database)
    try:
        assert shared.due()
        with engine.begin() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
        assert not shared.due()
        monkeypatch.setattr(clock, "_own", lambda: time.time() + 300)
        assert abs(shared.now() - time.time()) < 2
        monkeypatch.setattr(clock, "EVERY_S", 0.0)
        before = shared._known
        with engine.begin() as connection:  # the same connection, which is as it was
            assert connection.scalar(text("SELECT 2")) == 2
        assert shared._known != before
    finally:
        engine.dispose()


def test_ids_are_in_order_of_the_shared_time(machine: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    from app.db import ids

    shared = SharedClock()
    monkeypatch.setattr(ids, "CLOCK", shared)
    first = ids.new_id("job")
    machine["elapsed"] += 1
    _answered(shared, 1001.0, 0.01)
    machine["own"] -= timedelta(minutes=5).total_seconds()
    assert first < ids.new_id("job")


def test_ids_of_one_millisecond_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.db import ids

    monkeypatch.setattr(ids, "CLOCK", SimpleNamespace(now=lambda: 1_800_000_000.0))
    made = [ids.new_id("job") for _ in range(1000)]
    assert made == sorted(made)
    assert {len(each) for each in made} == {36}
