"""A rate that is proven, on real parts: the bundle's serve.py with an engine that sleeps, so that what it can serve at
most is known, asked over HTTP by the generator of a job's traffic."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.factories.serving import bundle
from workers.measure.load import bench as benches
from workers.measure.load.arrivals import Arrivals
from workers.measure.load.bench import Bench, Clock, Limit, Setup, opened
from workers.measure.load.goodput import Goodput, Plan
from workers.measure.load.judged import EXCEEDS, KEEPS
from workers.measure.load.mix import Kind, Mix
from workers.measure.load.over_http import counters_of, launch_server
from workers.measure.stats import P99_BOUND_SAMPLES
from workers.pipeline.load import gain, headline, served
from workers.serving.batcher import Settings

CALL_S = 0.002
MOST = 1 / CALL_S  # that one instance can serve one by one, on however quick a machine
SLEEPS = f"""
import time


def load(threads=None):
    def run(feeds):
        time.sleep({CALL_S})
        x = feeds["x"]
        return {{"y": 2 * x + 1, "width": x[:, 0]}}

    return ["x"], run
"""


class Nobody:
    """Company takes nothing from an engine that sleeps: its rates are judged also on a machine that is busy."""

    @classmethod
    def now(cls) -> Nobody:
        return cls()

    def until_now(self) -> None:
        return None


@pytest.fixture(scope="module")
def goodput(tmp_path_factory: pytest.TempPathFactory) -> Goodput:
    folder = bundle(tmp_path_factory.mktemp("sleeping"), SLEEPS)
    feeds = {"x": np.ones((1, 4), np.int64)}
    mix = Mix([Kind("typical × 1", 1, {"x": (1, 4)}, 1.0, [feeds])], "")
    launch = launch_server(folder, Settings(batch_axis={"x": 0}))
    bench = Bench(launch, mix, Arrivals(poisson=True), Limit(0.2, 2.0), Clock())
    bench.judged = replace(bench.judged, seconds=1.0, least=P99_BOUND_SAMPLES)

    async def run() -> Goodput:
        async with opened(bench):
            return await bench.goodput(Setup(), Plan(100.0, 5.0, 2.0, least=2.0), proven=True)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(benches, "Company", Nobody)
        return asyncio.run(run())


def test_a_rate_is_proven_and_so_is_the_one_that_is_too_much(goodput: Goodput) -> None:
    told = goodput.to_json()
    low, high = told["interval"]
    assert told["proven"], told
    assert 0 < low <= MOST
    assert high is not None, told
    assert high > low
    for rate, verdict in ((goodput.rate, KEEPS), (goodput.high, EXCEEDS)):
        assert any(p.rate == rate and p.verdict == verdict and p.proven for p in goodput.points)
    assert told["p99_bound_ms"] <= 200


def test_what_the_report_says_of_it(goodput: Goodput) -> None:
    told = goodput.to_json()
    low, high = told["interval"]
    assert [served(None, rate, told) for rate in (0.9 * low, 1.1 * high)] == [True, False]
    assert headline("l", told, told).startswith("at l: ")
    assert "about" not in headline("l", told, told)
    found = gain(told, told)
    assert found is not None
    assert found["ratio"] == 1.0


def test_queue_and_compute_stand_apart_over_http(goodput: Goodput) -> None:
    best = goodput.best
    assert best is not None
    figures: dict[str, Any] = best.figures
    assert figures["compute_mean_ms"] >= 1e3 * CALL_S
    assert figures["queue_mean_ms"] >= 0
    assert figures["batches"] == {"1": 1.0}
    assert figures["queue_mean_ms"] < figures["p99_bound_ms"]


def test_metrics_that_tell_nothing_count_nothing() -> None:
    assert counters_of("# HELP x\nanneal_serve_queue_seconds_sum 1.5\n").queue_s == 1.5
    assert counters_of("").mean_compute_s is None


def test_sizes_of_batches_over_http_are_bounds_of_the_histogram() -> None:
    at = zip(("1", "2", "4", "1024", "+Inf"), (3, 3, 8, 8, 9), strict=True)
    text = "\n".join(f'anneal_serve_batch_size_bucket{{le="{bound}"}} {count}' for bound, count in at)
    assert counters_of(text).batches == {1: 3, 4: 5, 2048: 1}
