"""What a queued job can expect, by the picture of the queue alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from app.jobs.outlook import NOBODY_KNOWS, Outlook, Picture, Queued, Taker
from app.jobs.schedule import Share, Waiting

NOW = datetime(2026, 11, 29, 12, 0, 3, tzinfo=UTC)
BEFORE = NOW - timedelta(minutes=5)
CPU, GPU, SPECIAL = "anneal.cpu", "anneal.cuda-8.9", "anneal.hw.cpu-x"


def queued(number: int, tenant: str = "a", queue: str = CPU, pause_s: float | None = None) -> Queued:
    until = None if pause_s is None else NOW + timedelta(seconds=pause_s)
    return Queued(Waiting(f"job_{number}", tenant, 0, begun=False), queue, BEFORE, until)


def picture(
    *jobs: Queued, takers: tuple[Taker, ...], seconds: float | None = 60.0, running: dict[str, int] | None = None
) -> Picture:
    shares = {tenant: Share(count) for tenant, count in (running or {}).items()}
    return Picture(NOW, {job.turn.job_id: job for job in jobs}, shares, takers, seconds)


def taker(*queues: str, busy_s: float | None = None) -> Taker:
    return Taker(frozenset(queues), None if busy_s is None else NOW + timedelta(seconds=busy_s))


def in_s(outlook: Outlook | None) -> float | None:
    assert outlook is not None
    return None if outlook.expected_start is None else (outlook.expected_start - NOW).total_seconds()


def test_a_free_worker_is_told_by_a_start_in_the_past_that_stays() -> None:
    found = picture(queued(1), takers=(taker(CPU),)).of("job_1")
    assert found == Outlook(1, BEFORE)


def test_each_waits_for_those_that_run_and_those_ahead() -> None:
    two = (taker(CPU, busy_s=30), taker(CPU, busy_s=45))
    seen = picture(*(queued(n) for n in range(1, 5)), takers=two)
    found = [seen.of(f"job_{n}") for n in range(1, 5)]
    assert [o.position for o in found if o is not None] == [1, 2, 3, 4]
    assert [in_s(o) for o in found] == [37, 47, 97, 107], "30, 45, 90 and 105 s, up to tens of seconds"
    far = picture(queued(1), takers=(taker(CPU, busy_s=1000),)).of("job_1")
    assert in_s(far) == 1017, "up to minutes"


def test_positions_follow_the_turns() -> None:
    jobs = [*(queued(n, "flood") for n in range(1, 6)), queued(9, "late")]
    seen = picture(*jobs, takers=(taker(CPU, busy_s=10),), running={"flood": 1})
    late = seen.of("job_9")
    assert late is not None
    assert late.position == 1


def test_only_those_count_that_the_same_workers_may_take() -> None:
    takers = (taker(CPU, SPECIAL, busy_s=10), taker(GPU, busy_s=10))
    seen = picture(queued(1, queue=GPU), queued(2, queue=GPU), queued(3), queued(4, queue=SPECIAL), takers=takers)
    positions = [found.position for n in range(1, 5) if (found := seen.of(f"job_{n}")) is not None]
    assert positions == [1, 2, 1, 2]


def test_what_nobody_here_takes_is_said_so() -> None:
    takers = (taker(CPU),)
    seen = picture(queued(1, queue=GPU), queued(2, queue=SPECIAL), queued(3, queue="anneal.cpu.pt2"), takers=takers)
    told = [found.waiting_for for n in range(1, 4) if (found := seen.of(f"job_{n}")) is not None]
    assert told == [
        "no live worker with cuda of compute capability 8.9",
        "no live worker with hardware cpu-x",
        "no live worker with cpu that reads .pt2",
    ]
    assert in_s(seen.of("job_1")) is None
    assert seen.of("job_9") is None


def test_a_pause_is_said_and_holds_up_nobody() -> None:
    seen = picture(queued(1, pause_s=25), queued(2), takers=(taker(CPU),))
    paused, other = seen.of("job_1"), seen.of("job_2")
    assert paused is not None
    assert (paused.position, in_s(paused)) == (None, 27)
    assert paused.waiting_for is not None
    assert other is not None
    assert other.position == 1


def test_what_is_not_known_is_not_guessed() -> None:
    unknown = Taker(frozenset([CPU]), NOBODY_KNOWS)
    assert in_s(picture(queued(1), takers=(unknown,), seconds=None).of("job_1")) is None
    first, second = queued(1), queued(2)
    seen = picture(first, second, takers=(unknown, taker(CPU, busy_s=20)), seconds=None)
    assert [in_s(seen.of(f"job_{n}")) for n in (1, 2)] == [27, None]
