"""The open-loop generator and what is judged by it: real time only where nothing depends on how fast the machine is."""

from __future__ import annotations

import asyncio
import math
import time

import numpy as np
import pytest

from app.domain.traffic import Traffic
from tests.factories.queueing import FEEDS, MIX
from workers.measure.load.arrivals import Arrivals, rate_of
from workers.measure.load.generator import Run, Schedule, closed_loop, drive
from workers.measure.load.judged import DISTURBED, EXCEEDS, KEEPS, LATE, OPEN, judged, least_over, most_over
from workers.measure.load.mix import Kind, Mix
from workers.measure.load.target import FAILED, OK, REJECTED, TIMED_OUT, Counters, Feeds, Instant, Outcome
from workers.measure.stats import p99_bound

SLO = {"p99_latency_ms": 20}


def traffic(**told: object) -> Traffic:
    return Traffic.model_validate({"slo": SLO, **told})


def schedule(rate: float, count: int, settling: int = 0) -> Schedule:
    return Schedule(rate, Arrivals(False).due(rate, count, 0), MIX.drawn(count, 0), settling)


class Serving:
    """Answers in the order that `answer` says."""

    def __init__(self) -> None:
        self.asked = 0
        self.left = 0

    async def submit(self, feeds: Feeds, deadline_s: float) -> Outcome:
        assert feeds is FEEDS
        number, self.asked = self.asked, self.asked + 1
        try:
            return await self.answer(number, deadline_s)
        except asyncio.CancelledError:
            self.left += 1
            raise

    async def answer(self, number: int, deadline_s: float) -> Outcome:
        raise NotImplementedError

    def counters(self) -> Counters:
        return Counters()


# Arrivals


def test_the_rate_of_poisson_arrivals_and_the_scatter_of_their_pauses() -> None:
    due = Arrivals.of(traffic(rate_per_second=50)).due(50, 20_000, seed=1)
    pauses = np.diff(due)
    assert len(due) == 20_000
    assert (pauses >= 0).all()
    assert pauses.mean() == pytest.approx(1 / 50, rel=0.03)
    assert pauses.std() / pauses.mean() == pytest.approx(1.0, abs=0.05)
    assert not np.array_equal(due, Arrivals.of(traffic(rate_per_second=50)).due(50, 20_000, seed=2))


def test_constant_arrivals() -> None:
    due = Arrivals.of(traffic(arrival="constant", rate_per_second=4)).due(4, 8, seed=0)
    assert np.allclose(due, np.arange(1, 9) / 4)


def test_a_trace_keeps_its_shape_at_every_rate() -> None:
    times = np.cumsum([0.1, 0.1, 0.1, 0.7] * 10)
    told = traffic(arrival="trace", trace=times.tolist())
    arrivals = Arrivals.of(told)
    assert rate_of(told) == pytest.approx((len(times) - 1) / (times[-1] - times[0]))
    for rate in (1.0, 100.0):
        pauses = np.diff(arrivals.due(rate, 4000, seed=3))
        assert pauses.mean() == pytest.approx(1 / rate, rel=0.01)
        assert np.median(pauses) / pauses.max() == pytest.approx(1 / 7, rel=0.01)


def test_a_closed_gap_is_as_long_as_the_others() -> None:
    trace = [0.1 * i for i in range(20)] + [500 + 0.1 * i for i in range(20)]
    told = traffic(arrival="trace", trace=trace, trace_gaps="close")
    assert rate_of(told) == pytest.approx(10.0, rel=0.01)
    kept = traffic(arrival="trace", trace=trace, trace_gaps="keep")
    assert rate_of(kept) == pytest.approx(39 / 501.9, rel=0.01)


def test_kinds_are_drawn_by_their_shares() -> None:
    mix = Mix([Kind("a", 1, {}, 0.8, [FEEDS]), Kind("b", 4, {}, 0.2, [FEEDS])], "")
    drawn = mix.drawn(20_000, seed=0)
    assert (drawn == 1).mean() == pytest.approx(0.2, abs=0.02)
    assert mix.samples == pytest.approx(1.6)


# The generator


def test_latency_counts_from_when_a_request_was_due_so_that_a_stall_is_not_hidden() -> None:
    class Stalls(Serving):
        """One at a time; the tenth takes 0.3 s, all others nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.turn = asyncio.Lock()

        async def answer(self, number: int, deadline_s: float) -> Outcome:
            async with self.turn:
                if number == 10:
                    await asyncio.sleep(0.3)
            return Outcome(OK)

    async def run() -> Run:
        return await drive(Stalls(), MIX, schedule(200, 100), limit_s=0.05, timeout_s=5)

    found = asyncio.run(run())
    assert found.ended(OK) == 100
    # All that were due in the first 0.2 s of the stall waited for more than 0.09 s: a closed loop would have seen one.
    assert int((found.latency > 0.09).sum()) >= 35
    assert found.waiting.max() >= 35


def test_requests_are_sent_whatever_becomes_of_those_before() -> None:
    class Never(Serving):
        async def answer(self, number: int, deadline_s: float) -> Outcome:
            await asyncio.sleep(60)
            return Outcome(OK)

    target = Never()

    async def run() -> Run:
        return await drive(target, MIX, schedule(500, 50), limit_s=0.01, timeout_s=0.1)

    start = time.monotonic()
    found = asyncio.run(run())
    assert time.monotonic() - start < 30
    assert (target.asked, target.left) == (50, 50)
    assert found.ended(TIMED_OUT) == 50
    assert np.isinf(found.latency).all()


def test_every_way_to_end_is_counted_and_only_answers_have_a_latency() -> None:
    class Mixed(Serving):
        async def answer(self, number: int, deadline_s: float) -> Outcome:
            if number % 5 == 0:
                return Outcome(REJECTED, "queue_full", 1.0)
            if number % 5 == 1:
                raise ValueError("a fault of the target")
            return Outcome(OK)

    async def run() -> Run:
        return await drive(Mixed(), MIX, schedule(1000, 50), limit_s=10, timeout_s=1)

    found = asyncio.run(run())
    assert {s: found.ended(s) for s in (OK, REJECTED, FAILED)} == {OK: 30, REJECTED: 10, FAILED: 10}
    assert found.codes == {"queue_full": 10, "ValueError": 10}
    assert np.isinf(found.latency).sum() == 20


def test_a_run_that_is_decided_is_not_taken_to_its_end() -> None:
    class Slow(Serving):
        async def answer(self, number: int, deadline_s: float) -> Outcome:
            await asyncio.sleep(0.02)
            return Outcome(OK)

    async def run() -> Run:
        return await drive(Slow(), MIX, schedule(200, 10_000), limit_s=0.001, timeout_s=1, enough=20)

    found = asyncio.run(run())
    assert found.cut
    assert 20 <= found.count < 2_000
    assert judged(found, 0.001, 10_000, proven=False).verdict in (EXCEEDS, LATE)


def test_requests_that_settle_do_not_count() -> None:
    async def run() -> Run:
        return await drive(Instant(), MIX, schedule(1000, 60, settling=10))

    assert asyncio.run(run()).count == 50


def test_a_closed_loop_counts_its_answers() -> None:
    async def run() -> Run:
        return await closed_loop(Instant(), MIX, 2, 0.05)

    found = asyncio.run(run())
    assert found.count == found.ended(OK) > 10


# What is judged


def of(latencies: np.ndarray, late: float = 0.0) -> Run:
    n = len(latencies)
    status = np.where(np.isfinite(latencies), 0, 2).astype(np.int8)
    return Run(100.0, np.arange(n) / 100, np.full(n, late), latencies, status, np.zeros(n, dtype=np.int32), Counters())


@pytest.mark.parametrize("count", [50, 298, 299, 473, 650, 2000, 6000])
def test_so_few_may_be_late_as_the_bound_of_the_p99_allows(count: int) -> None:
    """Counting is the same as the bound by order statistics."""
    over = most_over(count)
    assert (over >= 0) == (count >= 299)
    for late in (over, over + 1):
        if late < 0:
            continue
        bound = p99_bound(np.array([0.03] * late + [0.01] * (count - late)))
        assert bound is None or (bound <= 0.02) == (late <= over)
    assert least_over(count) > count * 0.01


def test_verdicts_of_a_proof() -> None:
    n = 1000
    found = {k: judged(of(np.array([0.03] * k + [0.01] * (n - k))), 0.02, n, proven=True).verdict for k in (0, 10, 30)}
    assert found == {0: KEEPS, 10: OPEN, 30: EXCEEDS}


def test_what_was_not_answered_is_later_than_any_limit() -> None:
    lost = np.array([math.inf] * 30 + [0.001] * 970)
    point = judged(of(lost), 0.02, 1000, proven=True)
    assert (point.verdict, point.over) == (EXCEEDS, 30)
    assert point.figures["p99_ms"] is None
    assert point.figures["ended"] == {"ok": 970, "rejected": 0, "timed_out": 30, "failed": 0}


def test_a_late_generator_or_company_says_nothing_against_the_engine() -> None:
    slow, fast = np.full(1000, 0.03), np.full(1000, 0.01)
    assert judged(of(slow, late=0.008), 0.02, 1000, proven=True).verdict == LATE
    assert judged(of(slow), 0.02, 1000, proven=True, company="others").verdict == DISTURBED
    assert judged(of(slow), 0.02, 1000, proven=True).verdict == EXCEEDS
    # A limit that was kept all the same was kept.
    assert judged(of(fast, late=0.008), 0.02, 1000, proven=True, company="others").verdict == KEEPS


def test_a_queue_that_grows_is_seen() -> None:
    run = of(np.full(100, 0.01))
    run.waiting = np.arange(100, dtype=np.int32)
    assert judged(run, 0.02, 100, proven=False).figures["waiting"]["grows"] is True
    run.waiting = np.full(100, 3, dtype=np.int32)
    assert judged(run, 0.02, 100, proven=False).figures["waiting"]["grows"] is False
