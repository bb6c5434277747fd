"""Who runs next: nobody is lost, taken twice, mixed with other shapes, or kept waiting for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.serving.fair_queue import FairQueue, Full, Request

KEYS, CALLERS = st.sampled_from("xyz"), st.sampled_from("abc")
ADD = st.tuples(st.just("add"), KEYS, st.integers(0, 9), CALLERS, st.booleans())
OTHER = st.tuples(st.sampled_from(["take", "leave", "again", "wait"]), st.integers(0, 50))


def ask(key: str = "x", rows: int = 1, caller: str = "a", at: float = 0.0) -> Request:
    return Request(key, rows, caller, at)


def test_nothing_is_due_when_what_was_to_run_again_has_left() -> None:
    queue = FairQueue(10, 4)
    queue.add(ask())
    (request,) = queue.take(0.0)
    queue.again(request)
    assert queue.due_at() == 0.0
    queue.remove(request)
    assert queue.due_at() is None
    assert queue.take(0.0) == []


@given(st.lists(st.one_of(ADD, OTHER), max_size=120), st.integers(1, 12), st.sampled_from([(), (2, 4), (3,)]))
def test_whatever_comes_in_comes_out_once(steps: list[tuple], most: int, preferred: tuple[int, ...]) -> None:
    queue, now = FairQueue(10, most, 1.0, preferred), 0.0
    waits: list[Request] = []
    taken: list[Request] = []
    for what, *how in steps:
        if what == "add":
            request = Request(how[0], how[1], how[2], now, alone=how[3])
            try:
                evicted = queue.add(request)
            except Full:
                assert len(waits) == 10
            else:
                waits.append(request)
                if evicted is not None:
                    waits.remove(evicted)
                    assert not evicted.queued
                    held = [r.caller for r in waits]
                    assert held.count(evicted.caller) >= held.count(request.caller)
        elif what == "leave" and waits:
            queue.remove(waits.pop(how[0] % len(waits)))
        elif what == "again" and taken:
            request = taken.pop()
            queue.again(request)
            waits.append(request)
        elif what == "wait":
            now += how[0] / 50
        elif what == "take":
            batch = queue.take(now)
            _is_a_batch(batch, most)
            for request in batch:
                waits.remove(request)  # raises for one that was taken before, or has left
            taken += batch
        assert len(queue) == len(waits)
        assert queue.rows == sum(r.cost for r in waits)
    while waits:
        batch = queue.take(now + 2.0)
        assert batch, "all are due by now"
        _is_a_batch(batch, most)
        for request in batch:
            waits.remove(request)
    assert queue.due_at() is None
    assert not queue._groups
    assert not queue._counts


def _is_a_batch(batch: list[Request], most: int) -> None:
    assert len({r.key for r in batch}) <= 1
    assert len(batch) <= 1 or (sum(r.cost for r in batch) <= most and not any(r.alone for r in batch))


def test_one_caller_is_served_in_order() -> None:
    queue = FairQueue(100, 4)
    requests = [ask() for _ in range(10)]
    for request in requests:
        queue.add(request)
    assert [r for _ in range(3) for r in queue.take(0.0)] == requests


def test_who_floods_the_queue_is_not_in_the_way_of_others() -> None:
    queue = FairQueue(100, 4)
    for _ in range(60):
        queue.add(ask(caller="flood"))
    queue.take(0.0)
    late = [ask(caller="late", at=1.0), ask("other shape", caller="third", at=1.0)]
    for request in late:
        queue.add(request)
    found = [r for _ in range(3) for r in queue.take(1.0)]
    assert set(late) <= set(found)


def test_no_shape_starves_another() -> None:
    """Full batches of one shape, for ever, and new callers all the time; one request of another shape."""
    queue = FairQueue(1000, 4)
    for i in range(20):
        queue.add(ask("busy", caller=f"caller {i}"))
    for _ in range(5):
        queue.add(ask("rare", caller="slow"))
    number, served = 20, 0
    for _ in range(60):
        for _ in range(4):
            queue.add(ask("busy", caller=f"caller {number}"))
            number += 1
        served += sum(r.caller == "slow" for r in queue.take(0.0))
    assert served == 5


def test_a_full_queue_makes_room_for_who_holds_less() -> None:
    queue = FairQueue(4, 8)
    mine = [ask(caller="flood") for _ in range(4)]
    for request in mine:
        assert queue.add(request) is None
    with pytest.raises(Full):
        queue.add(ask(caller="flood"))
    assert queue.add(ask(caller="other")) is mine[3], "the newest of whoever has most"
    assert queue.add(ask(caller="other")) is mine[2]
    with pytest.raises(Full):
        queue.add(ask(caller="other"))  # both hold two now


def test_a_batch_waits_as_long_as_it_may_and_no_longer() -> None:
    queue = FairQueue(100, 8, 0.5, (4,))
    queue.add(ask(at=10.0))
    assert (queue.take(10.4), queue.due_at()) == ([], 10.5)
    assert len(queue.take(10.5)) == 1
    for _ in range(5):
        queue.add(ask(at=11.0))
    assert len(queue.take(11.0)) == 4, "a preferred size does not wait"
    assert queue.take(11.0) == []
    for _ in range(8):
        queue.add(ask(at=11.1))
    assert len(queue.take(11.1)) == 8, "nor does a full one"
    queue.add(ask("x", 20, at=12.0))
    assert [r.rows for r in queue.take(12.0)] == [1], "a batch is not made larger than it may be"
    assert [r.rows for r in queue.take(12.0)] == [20], "but one that is larger by itself is run"
