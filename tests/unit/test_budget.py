"""The job's time is shared so that what ships can always be measured and packed."""

from __future__ import annotations

from workers.pipeline.budget import Budget


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_phases_leave_time_for_those_behind_them() -> None:
    clock = Clock()
    budget = Budget(100.0, clock)
    clock.now += 10
    budget.share(fixed=15.0, engine_bytes=0)
    assert 10 < budget.make_until < budget.search_until < budget.end < 100
    assert budget.end - budget.search_until >= 15 / 0.75 - 1e-9
    clock.now = 100 + budget.search_until
    assert budget.search_until < budget.final_until() < budget.end


def test_a_measurement_longer_than_the_budget_leaves_the_search_its_share() -> None:
    budget = Budget(50.0, Clock())
    budget.share(fixed=1000.0, engine_bytes=0)
    assert budget.search_until == 0.5 * 48.0


def test_the_search_ends_earlier_where_the_final_measurement_takes_longer() -> None:
    clock = Clock()
    budget = Budget(100.0, clock)
    budget.share(fixed=1.0, engine_bytes=0)
    before = budget.search_until
    budget.keep_for_final(3.0)
    assert budget.search_until <= before
    assert budget.end - budget.search_until >= 3.0 / 0.75 - 1e-9
    clock.now += 20
    budget.keep_for_final(60.0)
    assert 20 < budget.search_until <= budget.end - 54  # it takes more than there is: the search keeps its part
    clock.now += 70
    budget.keep_for_final(0.0)
    assert budget.search_until < 90, "what has ended does not begin again"


def test_the_search_gets_of_the_time_that_a_short_final_leaves() -> None:
    clock = Clock()
    budget = Budget(15.0, clock)
    budget.share(fixed=28.0, engine_bytes=0)  # as it was thought to take
    clock.now += 5.0
    assert budget.search_until == 6.5
    budget.keep_for_final(3.0)
    assert budget.search_until == 9.0
    assert budget.end - budget.search_until >= 3.0 / 0.75


def test_a_long_final_measurement_takes_the_time_of_what_explains() -> None:
    clock = Clock()
    budget = Budget(100.0, clock)
    clock.now += 38
    assert budget.final_until() == 38 + 0.75 * 60
    assert budget.judged_until() == budget.final_until(), "where nothing is known the accuracy may take it all"
    budget.keep_for_final(20.0)
    assert budget.judged_until() == budget.final_until() - 20
    budget.keep_for_final(90.0)
    assert budget.final_until() == budget.end == 98
    assert budget.judged_until() == 38 + 0.25 * 60


def test_large_engines_are_given_time_to_be_packed() -> None:
    budget = Budget(100.0, Clock())
    budget.share(fixed=1.0, engine_bytes=2_000_000_000)
    assert budget.end == 100 - 2 - 10


def test_a_call_may_be_late_by_a_twentieth_of_the_budget_and_no_more() -> None:
    clock = Clock()
    budget = Budget(100.0, clock)
    assert budget.limits(98.0) == (98.0, 103.0)
    assert budget.limits(30.0) == (30.0, 35.0 + 0.25 * 68.0)  # early: what comes behind it gives
    clock.now += 99
    assert budget.limits(98.0) == (1.0, 6.0)
    assert budget.over(30.0)
    assert budget.left(30.0) == 0.0
