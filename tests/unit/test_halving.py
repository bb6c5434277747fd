"""Who goes on after a short measurement, and who falls, with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from app.domain.spec import OptimizationSpec
from workers.search import halving, limits
from workers.search.halving import Speed

SPEC = OptimizationSpec.model_validate({"model_id": "mdl_x", "benchmark": {"batch_sizes": [8, 1]}})


def _ratio(value: float, width: float = 0.05) -> dict[str, float]:
    return {"ratio": value, "low": value - width, "high": value + width}


def _figures(**at: float) -> dict[str, Any]:
    return {
        "batches": {
            size.removeprefix("b"): {"speedup": _ratio(v), "throughput_ratio": _ratio(v)} for size, v in at.items()
        }
    }


def test_speed_is_read_at_the_batch_size_that_counts() -> None:
    assert halving.speed_of(SPEC, _figures(b1=2.0, b8=3.0)) == Speed(3.0, 2.95, 3.05)
    throughput = SPEC.model_copy(update={"objective": "throughput"})
    assert halving.speed_of(throughput, _figures(b1=2.0, b8=3.0)) == Speed(3.0, 2.95, 3.05)
    assert halving.speed_of(SPEC, None) is None
    assert halving.speed_of(SPEC, {"failed": {}, "batches": {}}) is None


def test_slower_at_another_batch_size_never_ships() -> None:
    assert halving.slower_elsewhere(SPEC, _figures(b8=2.0, b1=0.8)) == "slower at batch size 1: 0.80x"
    assert halving.slower_elsewhere(SPEC, _figures(b8=0.8, b1=1.0)) is None


@pytest.mark.parametrize(
    ("high", "gain", "can"), [(2.0, 1.0, True), (1.99, 1.0, False), (1.7, 1.25, True), (1.5, 1.25, False)]
)
def test_who_can_still_win(high: float, gain: float, can: bool) -> None:
    assert halving.can_win(Speed(high - 0.1, high - 0.2, high), 2.0, gain=gain) is can


@pytest.mark.parametrize(
    ("accuracy", "lost"),
    [
        ({"loss_percent": 0.5, "loss_ci": [0.1, 2.0]}, False),
        ({"loss_percent": 1.5, "loss_ci": [0.4, 3.0]}, False),  # few samples: it may still hold
        ({"loss_percent": 1.5, "loss_ci": [1.2, 3.0]}, True),
        ({"loss_percent": 1.5, "loss_ci": None}, True),
        ({"loss_percent": None}, True),
    ],
)
def test_few_samples_drop_only_what_surely_loses(accuracy: dict[str, Any], lost: bool) -> None:
    assert halving.loses_too_much(SPEC, accuracy) is lost


def test_finalists_are_those_that_can_win_and_the_fastest_safe_one() -> None:
    ranked = [
        ("a", Speed(3.0, 2.9, 3.1), False),
        ("b", Speed(2.95, 2.8, 3.0), False),
        ("c", Speed(2.0, 1.9, 2.1), False),
        ("d", Speed(1.5, 1.4, 1.6), True),
        ("e", Speed(1.4, 1.3, 1.5), True),
    ]
    chosen, reasons = halving.finalists(ranked)
    assert chosen == ["a", "b", "d"]
    assert set(reasons) == {"c", "e"}
    assert "cannot reach a" in reasons["c"]
    assert halving.finalists([]) == ([], {})


def test_where_nobody_is_safe_the_likeliest_to_be_goes_on() -> None:
    """Seen: int8 failed on the samples that confirm, one flip too many; bf16's interval reached over the limit, too, so
    that nobody stood behind, and the original shipped for an engine 1.6x as fast."""
    ranked = [("int8", Speed(2.5, 2.4, 2.6), False), ("bf16", Speed(1.6, 1.5, 1.7), False)]
    assert halving.finalists(ranked)[0] == ["int8"]
    chosen, reasons = halving.finalists(ranked, fallback="bf16")
    assert (chosen, reasons) == (["int8", "bf16"], {})
    sure = [*ranked, ("fp32", Speed(1.1, 1.0, 1.2), True)]
    assert halving.finalists(sure, fallback="bf16")[0] == ["int8", "fp32"]


def test_the_safe_one_has_a_seat_where_many_tie() -> None:
    ranked = [(f"t{i}", Speed(3.0, 2.0, 4.0), False) for i in range(6)] + [("safe", Speed(1.2, 1.1, 1.3), True)]
    chosen, _ = halving.finalists(ranked)
    assert len(chosen) == limits.MOST_FINALISTS + 1
    assert chosen[-1] == "safe"
    chosen, reasons = halving.finalists(ranked[:6])
    assert chosen == ["t0", "t1"]
    assert all("about as fast" in reason for reason in reasons.values())


def test_other_batch_sizes_break_a_tie_at_the_first() -> None:
    """Three tie there; the two that gain the most over all sizes are measured in full."""
    tied = [
        ("a", Speed(2.02, 1.9, 2.1), False),
        ("b", Speed(2.0, 1.9, 2.1), False),
        ("c", Speed(1.98, 1.9, 2.1), False),
    ]
    ranked = [*tied, ("slow", Speed(1.92, 1.91, 1.93), False), ("safe", Speed(1.0, 0.99, 1.1), True)]
    over_all = {"a": 0.1, "b": 0.5, "c": 0.6, "slow": 0.9, "safe": 0.0}
    assert halving.finalists(ranked, over_all={**over_all, "slow": 0.0})[0] == ["c", "b", "safe"]
    assert halving.finalists(ranked[:2] + ranked[4:], over_all=over_all)[0] == ["b", "a", "safe"]
    apart = [("x", Speed(3.0, 2.0, 4.0), False), ("y", Speed(2.5, 2.0, 3.0), False)]
    assert halving.finalists(apart, over_all={"x": 0.0, "y": 9.0})[0] == ["x", "y"], "within 5 % only"
