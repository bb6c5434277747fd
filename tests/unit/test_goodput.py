"""The highest rate within the limit and the search for how to serve, on a server that is simulated: what they should
find is known."""

from __future__ import annotations

import asyncio
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from tests.factories.queueing import SimulatedBench
from workers.measure.load.bench import Setup
from workers.measure.load.goodput import Goodput, Plan, highest
from workers.measure.load.judged import EXCEEDS, KEEPS, LATE, OPEN, Point
from workers.measure.load.served import settings_of
from workers.measure.load.trial import Found, Trial
from workers.measure.load.tuning import Space, Tried, Tuned, Tuner
from workers.serving.batcher import Settings

SPACE = Space([(1, None), (2, 1)], (1, 2, 4, 8, 16))


def point(rate: float, verdict: str) -> Point:
    return Point(rate, verdict, True, 650, 0, {"p50_ms": 1.0, "p99_ms": 2.0, "p99_bound_ms": 2.5})


def search(answer: Any, plan: Plan, **more: Any) -> Goodput:
    async def measure(rate: float) -> Point:
        return point(rate, answer(rate))

    return asyncio.run(highest(measure, plan, **more))


# Bisection


@pytest.mark.parametrize("guess", [1.0, 90.0, 100.0, 5000.0])
def test_the_highest_rate_is_found_from_any_guess(guess: float) -> None:
    found = search(lambda rate: KEEPS if rate <= 100 else EXCEEDS, Plan(guess, 1.05))
    assert found.complete
    assert found.high is not None
    assert 95 <= found.rate <= 100 < found.high <= 106
    assert found.best is not None


def test_what_is_open_is_neither_end_of_the_interval() -> None:
    def answer(rate: float) -> str:
        return KEEPS if rate <= 80 else OPEN if rate <= 120 else EXCEEDS

    found = search(answer, Plan(200, 1.05))
    assert 75 <= found.rate <= 80
    assert found.high is None or found.high > 120


def test_a_rate_that_held_once_and_not_another_time_does_not_count() -> None:
    times: dict[float, int] = {}

    def answer(rate: float) -> str:
        times[rate] = times.get(rate, 0) + 1
        return KEEPS if rate <= 90 or (rate <= 110 and times[rate] == 1) else EXCEEDS

    found = search(answer, Plan(100, 1.05, confirm=True))
    assert found.rate <= 90
    assert found.confirmed is True


def test_an_overloaded_generator_is_told_and_never_taken_for_the_engine() -> None:
    found = search(lambda rate: KEEPS if rate < 500 else LATE, Plan(100, 1.05))
    assert found.rate < 500
    assert found.high is None
    assert "the generator itself sent requests too late" in (found.reason or "")


def test_what_is_not_known_is_not_taken_for_none() -> None:
    late = search(lambda rate: LATE, Plan(100, 1.05, least=10.0))
    assert late.to_json()["rate"] is None
    assert "the generator itself" in (late.reason or "")
    no_time = search(lambda rate: KEEPS, Plan(100, 1.05), fits=lambda _: False)
    assert no_time.to_json()["rate"] is None
    assert "the time ran out" in (no_time.reason or "")


def test_no_rate_at_all() -> None:
    found = search(lambda rate: EXCEEDS, Plan(100, 1.05, least=1.0))
    assert found.rate == 0
    assert found.reason == "no rate that was tried keeps the limit"
    assert found.to_json()["interval"][0] == 0


def test_time_that_runs_out_leaves_what_is_known() -> None:
    left = itertools.count()
    found = search(
        lambda rate: KEEPS if rate <= 100 else EXCEEDS, Plan(60, 1.01, confirm=True), fits=lambda _: next(left) < 3
    )
    assert not found.complete
    assert 0 < found.rate <= 100
    assert "time ran out" in (found.reason or "")


# The search for a setup


def linear(start_ms: float, each_ms: float, spare: float = 1.0) -> Any:
    """A batch costs something once and something for each; `spare`: how much slower half of the cores are."""

    def service(setup: Setup, batch: int) -> float:
        slower = spare if setup.threads is not None else 1.0
        return slower * (start_ms + each_ms * batch) / 1e3

    return service


def tune(bench: SimulatedBench, seconds: float = 1e6) -> Tuned:
    return asyncio.run(Tuner(bench, Setup(), SPACE, seconds).run())


def best_of_grid(service: Any) -> tuple[Setup, int]:
    """The best of all setups, each looked at for as long as it takes; and how many requests that took."""
    rates: dict[Setup, float] = {}
    requests = 0
    for (instances, threads), batch, delay in itertools.product(
        SPACE.layouts, SPACE.batches, (0.0, 1.25, 3.333, 6.667)
    ):
        if batch == 1 and delay:
            continue
        bench = SimulatedBench(service)
        setup = Setup(instances, threads, batch, delay)
        guess = instances * batch / service(setup, batch)
        rates[setup] = asyncio.run(bench.goodput(setup, Plan(0.6 * guess, 1.05), proven=False)).rate
        requests += bench.requests
    return max(rates, key=lambda setup: rates[setup]), requests


def truly(service: Any, setup: Setup) -> float:
    """Its rate by many requests."""
    bench = SimulatedBench(service)
    bench.looked = replace(bench.looked, least=20_000, most=20_000, cap_s=1e9)
    guess = setup.instances * setup.max_batch / service(setup, setup.max_batch)
    return asyncio.run(bench.goodput(setup, Plan(0.6 * guess, 1.02), proven=False)).rate


@pytest.mark.parametrize(
    "service",
    [linear(4, 1), linear(0.2, 5, spare=1.9), linear(3, 3, spare=1.3), linear(8, 0.2, spare=1.95)],
    ids=["batching pays", "nothing pays", "instances pay", "batching pays much"],
)
def test_the_tuned_setup_is_near_the_best_of_the_whole_grid_in_a_part_of_its_time(service: Any) -> None:
    bench = SimulatedBench(service)
    tuned = tune(bench)
    best, requests = best_of_grid(service)
    assert truly(service, tuned.best) >= 0.95 * truly(service, best), (tuned.best, best)
    assert bench.requests <= 0.3 * requests


def test_where_nothing_serves_more_the_search_ends_where_it_began() -> None:
    tuned = tune(SimulatedBench(linear(0.0, 5, spare=2.2)))
    assert tuned.best == Setup()
    assert all(t.decision for t in tuned.tried)


def test_a_setup_that_cannot_win_by_what_it_yields_is_not_driven() -> None:
    bench = SimulatedBench(linear(0.0, 5, spare=4.0), limit_ms=100)
    tuned = tune(bench)
    assert {setup.instances for setup in bench.points} == {1}
    assert all("yield" in t.decision or "by itself" in t.decision for t in tuned.tried if t.setup.instances == 2)


def test_a_batch_that_takes_longer_than_the_limit_is_not_raced() -> None:
    tuned = tune(SimulatedBench(linear(1, 3)))
    told = {t.setup.max_batch: t.decision for t in tuned.tried if t.setup.instances == 1}
    assert "by itself" in told[8]
    assert 16 not in told


def unlike(padded: float) -> Any:
    """Requests that share no batch as they are; filled up they do, and compute `padded` times as much."""

    def service(setup: Setup, batch: int) -> float:
        return (4.0 + 0.5 * padded * batch if setup.padded else 4.5 * batch) / 1e3

    return service


@pytest.mark.parametrize(("padded", "wanted"), [(1.3, True), (12.0, False)])
def test_requests_are_filled_up_where_that_serves_more(padded: float, wanted: bool) -> None:
    space = replace(SPACE, padded=True)
    tuned = asyncio.run(Tuner(SimulatedBench(unlike(padded)), Setup(), space, 1e6).run())
    assert tuned.best.padded == wanted
    assert not wanted or tuned.best.max_batch > 1
    assert [t.decision for t in tuned.tried if t.setup.padded]


def tiles(size: int, cost_ms: float, start_ms: float) -> Any:
    """A batch costs as much as its whole tiles."""

    def service(setup: Setup, batch: int) -> float:
        slower = 1.9 if setup.threads is not None else 1.0
        return slower * (start_ms + cost_ms * math.ceil(batch / size)) / 1e3

    return service


@pytest.mark.parametrize(
    ("service", "sizes"), [(tiles(4, 8.0, 0.0), (3,)), (tiles(2, 2.0, 1.0), ())], ids=["serves more", "none stands out"]
)
def test_a_size_that_formed_is_waited_for_no_longer_where_that_serves_more(service: Any, sizes: Any) -> None:
    tuned = tune(SimulatedBench(service))
    assert tuned.best.max_delay_ms > 0
    assert tuned.best.preferred == sizes
    assert [t.setup.preferred for t in tuned.tried if t.setup.preferred] == ([sizes] if sizes else [])
    assert settings_of(Settings(), tuned.best).preferred_batches == sizes


def test_the_smallest_batch_that_yields_as_much_is_worth_no_longer_wait_where_there_is_one() -> None:
    """As a tile of 8 would: half of what fits there yields as much as all of it."""
    tuner = Tuner(SimulatedBench(tiles(8, 8.0, 0.0)), Setup(), SPACE, 1e6)
    for batch, yields in ((1, 125.0), (2, 250.0), (4, 500.0), (8, 980.0), (16, 1000.0)):
        tuner.tried[Setup(max_batch=batch)] = Tried(Setup(max_batch=batch), yields)
        other = Setup(2, 1, batch)
        tuner.tried[other] = Tried(other, 1000.0)
    best = Setup(max_batch=16, max_delay_ms=3.333)
    assert tuner.not_worth_waiting(best) == [8]
    assert tuner.not_worth_waiting(best.but(max_batch=8)) == [], "half of it is not enough"
    assert tuner.not_worth_waiting(best.but(max_delay_ms=0.0)) == [], "nothing is waited for"
    assert tuner.not_worth_waiting(best.but(padded=True)) == [], "what it yields in other batches is not known"


def test_little_time_is_told() -> None:
    tuned = tune(SimulatedBench(linear(4, 1)), seconds=4.0)
    assert not tuned.complete
    assert any("time ran out" in t.decision for t in tuned.tried)


# The whole of it


def trial(service: Any, original: Any, rate: float | None = None, seconds: float = 600.0, **more: Any) -> Found:
    ours, theirs = SimulatedBench(service, seconds=seconds, **more), SimulatedBench(original, seconds=seconds, **more)
    theirs.clock = ours.clock

    async def point(setup: Setup, rate: float, **kwargs: Any) -> Point:
        found = await SimulatedBench.point(theirs, setup, rate, **kwargs)
        ours.now += found.count / rate
        return found

    theirs.point = point  # type: ignore[method-assign]
    return asyncio.run(Trial(ours, theirs, SPACE, rate, lambda *_: None).run())


def test_the_engine_and_the_original_under_the_same_traffic() -> None:
    found = trial(linear(2, 0.5), linear(5, 5), rate=300, limit_ms=40)
    engine, original = found.engine.goodput, found.original.goodput if found.original else None
    assert engine is not None
    assert original is not None
    assert engine.rate > 2 * original.rate > 0
    assert found.engine.setup.max_batch > 1
    assert found.engine.at_rate is not None
    assert found.engine.beyond is not None
    assert found.engine.beyond.rate > engine.rate
    assert {b["setting"] for b in found.brought} >= {"max_batch"}
    assert all(b["ratio"] is None or b["ratio"] > 1 for b in found.brought if b["setting"] == "max_batch")
    assert found.static is not None
    assert found.generator["cpu_us_per_request"] > 0
    assert not found.reasons


def test_what_so_few_requests_cannot_prove_is_told_as_seen() -> None:
    found = trial(linear(2, 0.5), linear(5, 5), seconds=250)
    assert found.original is not None
    original = found.original.goodput
    assert original is not None
    assert original.rate > 0
    told = original.to_json()
    assert told["proven"] or "not proven" in told["reason"]


def test_a_rate_that_nobody_can_serve() -> None:
    found = trial(linear(2, 0.5), linear(5, 5), rate=1e5)
    assert found.engine.at_rate is None
    assert found.engine.goodput is not None
    assert 100 < found.engine.goodput.rate < 1e5


def test_a_limit_that_one_caller_alone_misses_names_the_nearest() -> None:
    found = trial(linear(30, 1), linear(40, 1))
    assert found.engine.goodput is not None
    assert found.engine.goodput.rate == 0
    assert "the nearest limit that can be kept is about 31 ms" in (found.engine.goodput.reason or "")


def test_little_time_leaves_reasons_and_no_failure() -> None:
    found = trial(linear(2, 0.5), linear(5, 5), rate=100, seconds=12.0)
    assert found.reasons
    assert all(found.reasons.values())


def test_a_setup_says_itself() -> None:
    assert str(Setup()) == "1 instance(s) × its own thread(s), one by one"
    assert "batches of up to 8, 2 ms of delay" in str(replace(Setup(), max_batch=8, max_delay_ms=2.0))
