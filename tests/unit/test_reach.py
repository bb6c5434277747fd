"""What a short timing says of constraints that nothing will meet."""

from __future__ import annotations

from typing import Any

import pytest

from app.domain.spec import Constraints
from workers.search.reach import out_of_reach, over_size


def _figures(p50: float | None, fastest: float, mean: float = 10.0) -> dict[str, Any]:
    return {"batches": {"4": {"p50_ms": p50, "mean_ms": mean, "min_ms": fastest}}}


@pytest.mark.parametrize(
    ("figures", "gain", "missed"),
    [
        (_figures(10.0, 9.0), 1.0, True),
        (_figures(None, 9.0), 1.0, True),  # of slow engines there is no median
        (_figures(10.0, 4.0), 1.0, False),  # a busy machine: the fastest call is within the limit
        (_figures(6.0, 5.5), 1.25, False),  # other runtime options may bring it
        (_figures(4.0, 3.0), 1.0, False),
        ({"batches": {"1": {"p50_ms": 10.0, "min_ms": 9.0}}}, 1.0, False),  # of another batch size
        ({}, 1.0, False),
        (None, 1.0, False),
    ],
)
def test_a_p99_limit_below_the_median(figures: Any, gain: float, missed: bool) -> None:
    check = out_of_reach(Constraints(p99_latency_ms=5.0), figures, 4, gain)
    assert (check is not None) is missed
    assert out_of_reach(Constraints(), figures, 4, gain) is None
    if check is not None:
        assert (check.name, check.limit, check.at_least) == ("p99_latency_ms", 5.0, True)


def test_a_throughput_that_the_fastest_call_does_not_reach() -> None:
    check = out_of_reach(Constraints(min_throughput_qps=1000.0), _figures(10.0, 8.0), 4)
    assert check is not None
    assert check.value == pytest.approx(500.0)
    assert out_of_reach(Constraints(min_throughput_qps=450.0), _figures(10.0, 8.0), 4) is None


def test_size_is_known_once_it_is_built() -> None:
    assert over_size(Constraints(), 10_000_000) is None
    assert over_size(Constraints(max_size_mb=10.0), 10_000_000) is None
    check = over_size(Constraints(max_size_mb=9.0), 10_000_000)
    assert check is not None
    assert (check.value, check.miss) == (10.0, pytest.approx(1 / 9))
