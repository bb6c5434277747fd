"""What is tried first to win accuracy back: what is expected to gain most for its time."""

from __future__ import annotations

from typing import Any

import pytest

from app.domain.spec import OptimizationSpec
from tests.factories.search_world import Truth, World
from workers.search import limits, ways
from workers.search.draft import Draft
from workers.search.halving import Speed
from workers.search.state import Built, Phase, SearchState, Way


def draft(
    *,
    loss: float | None = 1.2,
    seconds: float = 6.0,
    sample_ms: float = 2.0,
    reached: float = 1.5,
    reuses: bool = True,
    method: str = "auto",
) -> Draft:
    """Of a search that holds one int8 engine, three times as fast as the original."""
    calibration = {"dataset_id": "d", "method": method}
    spec = OptimizationSpec.model_validate({"model_id": "m", "calibration": calibration})
    world = World({"int8": Truth()}, spec)
    state = SearchState({}, world.deadlines(), Phase.MENDING, few=96, sample_ms=sample_ms, reached=reached)
    d = Draft(world.facts(), state, 0.0, lambda _: ())
    (plan,) = world.candidates()
    built = Built("e", 1000, "g", {}, (0.1, seconds, 0.5), reuses)
    accuracy = {"loss_percent": loss, "loss_ci": [0.1, 3.0], "samples": 170}
    d.add(plan, built=built, speed=Speed(3.0, 2.9, 3.1), accuracy=accuracy, all_seconds=1.0)
    return d


def names(found: tuple[Way, ...]) -> list[str]:
    return ["keep" if way.candidate is None else way.candidate.id.removeprefix("int8.") for way in found]


def test_a_way_s_chance_falls_with_how_far_the_loss_is_over_the_limit() -> None:
    for factor in (limits.EQUALIZED, limits.RECALIBRATED, limits.KEPT):
        chances = [ways.chance(factor, over) for over in (1.0, 1.1, 1.5, 3.0, 10.0, 100.0)]
        assert chances == sorted(chances, reverse=True)
        assert 1 > chances[0] > 0.3
    assert ways.chance(limits.RECALIBRATED, 1.05) > 0.25 > 0.05 > ways.chance(limits.RECALIBRATED, 2.0)
    assert ways.chance(limits.KEPT, 2.5) > 0.5, "as measured: three nodes of BERT, at 2.3 % of loss"


def test_near_the_limit_nodes_are_kept_before_ranges_are_made_anew() -> None:
    order = names(ways.in_order(draft(), "int8", samples=16))
    assert order.index("keep") < min(order.index(m) for m in ("percentile", "entropy", "mse"))


def test_where_the_sensitivity_is_dear_and_calibrating_is_not_that_comes_first() -> None:
    order = names(ways.in_order(draft(loss=1.01, seconds=0.1, sample_ms=100.0), "int8", samples=16))
    assert order[-1] == "keep"


def test_an_engine_that_kept_nodes_would_make_as_slow_as_the_best_is_first_quantized_otherwise() -> None:
    """Other ranges cost no speed."""
    near = names(ways.in_order(draft(reached=2.9), "int8", samples=16))
    far = names(ways.in_order(draft(reached=1.2), "int8", samples=16))
    assert near.index("keep") > far.index("keep") == 0


@pytest.mark.parametrize(("loss", "worth"), [(1.05, True), (9.0, False), (60.0, False), (None, False)])
def test_other_ranges_are_worth_trying_near_the_limit_only(loss: float | None, worth: bool) -> None:
    found = ways.in_order(draft(loss=loss), "int8", samples=16)
    tried = names(tuple(filter(ways.worth_it, found)))
    assert ("percentile" in tried) is worth
    assert "keep" in tried, "one node may be all that hurts"


@pytest.mark.parametrize("changes", [{"sample_ms": 0.0}, {"seconds": 0.0}, {"reached": 0.0}, {"reuses": False}])
def test_what_is_not_known_divides_by_nothing(changes: dict[str, Any]) -> None:
    assert all(way.seconds > 0 and way.gain > 0 for way in ways.in_order(draft(**changes), "int8", samples=16))


def test_no_ranges_but_the_job_s_are_tried_where_it_names_a_method() -> None:
    assert "percentile" not in names(ways.in_order(draft(method="minmax"), "int8", samples=16))
