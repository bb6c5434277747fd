"""Whose turn is next, by the rules alone: nobody is left out, flooded or starved."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from app.jobs.schedule import Share, Waiting, in_order, turn

TENANTS = st.sampled_from("abcd")
JOBS = st.lists(st.tuples(TENANTS, st.integers(-10, 10), st.booleans()), max_size=60)
SHARES = st.dictionaries(TENANTS, st.builds(Share, st.integers(0, 4), st.integers(0, 9).map(float)))


def job(number: int, tenant: str = "a", priority: int = 0, begun: bool = False) -> Waiting:
    return Waiting(f"job_{number:04d}", tenant, priority, begun)


@given(JOBS, SHARES)
def test_the_order_is_that_of_taking_one_after_the_other(jobs: list[tuple], shares: dict[str, Share]) -> None:
    waiting = [job(i, *fields) for i, fields in enumerate(jobs)]
    found = in_order(waiting, shares)
    assert Counter(found) == Counter(waiting), "each once"
    left, moment = [*waiting], max((share.served for share in shares.values()), default=0.0)
    for taken in found:
        assert taken == min(left, key=lambda w: turn(w, shares.get(w.tenant_id, Share())))
        left.remove(taken)
        moment += 1
        shares = {**shares, taken.tenant_id: Share(shares.get(taken.tenant_id, Share()).running + 1, moment)}


@given(JOBS, SHARES)
def test_within_a_tenant_by_priority_then_what_was_begun_then_age(jobs: list[tuple], shares: dict[str, Share]) -> None:
    found = in_order([job(i, *fields) for i, fields in enumerate(jobs)], shares)
    for tenant in "abcd":
        own = [(-w.priority, not w.begun, w.job_id) for w in found if w.tenant_id == tenant]
        assert own == sorted(own)


@given(JOBS, SHARES)
def test_who_yields_comes_after_everybody_who_does_not(jobs: list[tuple], shares: dict[str, Share]) -> None:
    found = [min(w.priority, 0) for w in in_order([job(i, *fields) for i, fields in enumerate(jobs)], shares)]
    assert found == sorted(found, reverse=True)


def test_a_flood_is_in_nobodys_way_whatever_it_calls_itself() -> None:
    flood = [job(i, "a", 10) for i in range(100)]
    late = job(999, "b")
    assert in_order([*flood, late], {"a": Share(1, 5.0)})[0] == late, "one worker, and it is at one of the flood's"
    # That worker is free again, and nothing runs: who was served last waits.
    assert in_order([*flood, late], {"a": Share(0, 5.0)})[0] == late
    assert in_order([*flood, late], {"a": Share(0, 5.0), "b": Share(0, 6.0)})[1] == late
