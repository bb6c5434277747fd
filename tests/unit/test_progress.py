"""Progress never runs backwards, comes to no end before the end, and tells when that will be."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest

from app.db.base import utcnow
from workers.pipeline.budget import Budget
from workers.pipeline.progress import PHASES, JobProgress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("seed", range(20))
def test_it_never_runs_backwards_whatever_a_job_does(seed: int) -> None:
    draw = random.Random(seed)
    progress = JobProgress()
    seen = [progress.at()]
    for phase, _ in PHASES:
        progress.enter(phase, draw.choice([0.0, 1.0, 5.0, 50.0]))
        for _ in range(draw.randrange(12)):  # more or fewer calls than planned
            weight = draw.choice([0.0, 0.5, 2.0, 9.0])
            seen += [progress.at(fraction, weight) for fraction in (0.3, 0.1, 1.0, 0.0)]
            progress.done(weight)
            seen.append(progress.at())
    assert seen == sorted(seen)
    assert seen[0] >= 0.0
    assert seen[-1] <= 0.99


def test_the_export_is_a_small_part() -> None:
    progress = JobProgress()
    progress.done(2.0)
    assert progress.at() < 0.06
    progress.enter("search", 10.0)
    assert progress.at() < 0.06
    progress.done(5.0)
    assert progress.at() == pytest.approx(0.3)


def test_an_attempt_goes_on_where_the_one_before_it_was() -> None:
    progress = JobProgress(floor=0.62)
    assert progress.at() == 0.62
    progress.enter("search", 1.0)
    progress.done(1.0)
    assert progress.at() == 0.62
    progress.enter("explain", 1.0)
    assert progress.at() > 0.62


def test_the_expected_end_follows_the_pace_and_is_bounded_by_the_budget() -> None:
    clock = Clock()
    progress = JobProgress(Budget(100.0, clock))
    first = progress.expected_end()
    assert first is not None
    assert first - utcnow() == pytest.approx(timedelta(seconds=100), abs=timedelta(seconds=1))
    clock.now = 20.0
    progress.enter("search", 10.0)
    progress.done(7.0)  # 40 % in 20 s
    assert progress.at() == pytest.approx(0.4)
    end = progress.expected_end()
    assert end is not None
    assert end - utcnow() == pytest.approx(timedelta(seconds=30), abs=timedelta(seconds=1))
    clock.now = 90.0  # at this pace much longer, but the budget ends
    end = progress.expected_end()
    assert end is not None
    assert end - utcnow() == pytest.approx(timedelta(seconds=10), abs=timedelta(seconds=1))
    assert JobProgress().expected_end() is None


def test_a_budget_goes_on_from_what_was_spent() -> None:
    clock = Clock()
    budget = Budget(100.0, clock, spent=70.0)
    assert budget.elapsed() == 70.0
    assert budget.left(budget.seconds) == 30.0
    clock.now = 10.0
    assert budget.elapsed() == 80.0
