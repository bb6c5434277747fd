"""Statistics against known values, coverage by simulation, and the sample counts that carry a percentile."""

from __future__ import annotations

import numpy as np
import pytest

from workers.measure import stats
from workers.measure.stats import Interval, paired_loss, percentiles, ratio_of_means, ratio_of_medians


@pytest.mark.parametrize(("name", "needed"), [("p50", 11), ("p90", 64), ("p95", 130), ("p99", 662), ("p999", 6636)])
def test_a_percentile_needs_its_samples(name: str, needed: int) -> None:
    few, reasons = percentiles(np.arange(needed - 1.0))
    assert few[name] is None
    assert str(needed) in reasons[name]
    enough, reasons = percentiles(np.arange(float(needed)))
    assert enough[name] is not None
    assert name not in reasons


def test_percentiles_are_nearest_rank() -> None:
    values, reasons = percentiles(np.random.default_rng(0).permutation(np.arange(1.0, 10_001.0)), unit=10.0)
    assert values == {"p50": 500.0, "p90": 900.0, "p95": 950.0, "p99": 990.0, "p999": 999.0}
    assert not reasons


def test_windows_settle_within_ten_percent() -> None:
    assert not stats.settled([1.0, 1.0])
    assert stats.settled([9.0, 1.0, 1.05, 1.1])
    assert not stats.settled([1.0, 1.05, 1.2])
    assert not stats.settled([0.0, 0.0, 0.0])


def test_a_machine_that_is_fast_and_slow_in_turns_keeps_no_engine_warming_up() -> None:
    assert stats.settled([9.0, 1.7, 1.0, 1.7, 1.0, 1.7]), "as fast as before, once in three windows"
    assert not stats.settled([9.0, 1.7, 1.0, 1.7, 1.0]), "too few before them"
    assert not stats.settled([9.0, 3.0, 2.0, 1.7, 1.5, 1.2]), "still on its way"
    assert stats.settled([9.0, 1.0, 1.0, 1.7, 1.5, 1.2]), "it was faster: the machine is slow now"


def rounds(rng: np.random.Generator, count: int, centre: float, drift: np.ndarray, n: int = 40) -> list[np.ndarray]:
    return [centre * drift[i] * (1 + 0.05 * rng.standard_normal(n)) for i in range(count)]


def test_a_ratio_is_found_in_spite_of_a_drift_that_both_sides_share() -> None:
    rng = np.random.default_rng(1)
    drift = np.linspace(1.0, 2.0, 10)
    a, b = rounds(rng, 10, 3.0, drift), rounds(rng, 10, 2.0, drift)
    for interval in (ratio_of_medians(a, b), ratio_of_means(a, b)):
        assert interval.low < 1.5 < interval.high
        assert interval.high - interval.low < 0.15
        assert interval.low <= interval.ratio <= interval.high
    assert ratio_of_medians(a, b) == ratio_of_medians(a, b)


@pytest.mark.parametrize("count", [5, 10])
def test_intervals_cover_the_truth_about_as_often_as_they_say(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 2000)
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        noise = [1 + 0.04 * rng.standard_normal(count) for _ in "ab"]
        interval = ratio_of_medians(*(rounds(rng, count, 1.0, n, 12) for n in noise), seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert hits >= 0.91 * 200


def test_pseudo_medians_of_draws_are_exact() -> None:
    values = np.array([0.3, -1.0, 2.0, 0.5])
    counts = np.array([[1, 1, 1, 1], [2, 0, 1, 1], [0, 4, 0, 0], [0, 3, 0, 1]], dtype=float)
    expected = []
    for row in counts:
        drawn = np.repeat(values, row.astype(int))
        expected.append(np.median([(drawn[i] + drawn[j]) / 2 for i in range(len(drawn)) for j in range(i, len(drawn))]))
    assert stats._pseudo_medians(values, counts) == pytest.approx(expected)


def test_a_machine_that_is_slow_in_turns_does_not_move_the_ratio() -> None:
    """Half of the rounds are slow, and a round's own side is now and then slow alone."""
    rng = np.random.default_rng(4)
    found = []
    for trial in range(50):
        drift = rng.choice([1.0, 1.8], size=10)
        alone = np.where(rng.random(10) < 0.1, 1.8, 1.0)
        a, b = rounds(rng, 10, 3.0, drift * alone), rounds(rng, 10, 2.0, drift)
        found.append(ratio_of_medians(a, b, seed=trial))
    assert np.quantile([f.ratio for f in found], 0.9) < 1.65
    assert np.mean([f.low <= 1.52 for f in found]) > 0.9


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="same rounds"):
        ratio_of_means([np.ones(3)] * 3, [np.ones(3)] * 2)
    with pytest.raises(ValueError, match="same rounds"):
        ratio_of_medians([np.ones(3), np.ones(0)], [np.ones(3)] * 2)


def test_hull_keeps_the_estimate_and_covers_both() -> None:
    hull = Interval(1.2, 1.1, 1.3).hull(Interval(1.0, 0.9, 1.25))
    assert hull == Interval(1.2, 0.9, 1.3)
    assert hull.to_json() == {"ratio": 1.2, "low": 0.9, "high": 1.3}
    assert hull.low <= 1.0 <= hull.high


def test_loss_of_right_and_wrong() -> None:
    differences = np.array([1.0] * 30 + [-1.0] * 10 + [0.0] * 960)
    loss = paired_loss(differences, zero_one=True)
    assert loss.estimate == pytest.approx(0.02)
    spread = differences.std() / np.sqrt(1000)  # of the normal interval
    assert loss.low == pytest.approx(0.02 - 1.96 * spread, abs=0.002)
    assert loss.high == pytest.approx(0.02 + 1.96 * spread, abs=0.002)
    assert loss.upper == pytest.approx(0.02 + 1.645 * spread, abs=0.002)


def test_no_difference_seen_is_not_no_difference() -> None:
    for least in (-1.0, 0.0):
        none = paired_loss(np.zeros(100), zero_one=True, least=least)
        assert (none.estimate, none.counts) == (0.0, (0, 0))
        assert none.upper == pytest.approx(0.0295, abs=1e-4)  # 1 − 0.05^(1/100), which the rule of three rounds to 0.03
        assert none.high == pytest.approx(0.0362, abs=1e-4)
    assert paired_loss(np.zeros(2), zero_one=True).upper > 0.75


def test_many_samples_stay_fast_and_right() -> None:
    values = np.random.default_rng(3).random(200_000) * 0.02
    loss = paired_loss(values, zero_one=False)
    assert loss.low < 0.01 < loss.high
    assert loss.high - loss.low < 0.0002
    assert loss.estimate == pytest.approx(values.mean())


def test_normalized_error_and_its_interval() -> None:
    rng = np.random.default_rng(4)
    norm = rng.random(500) + 0.5
    error = norm * 0.03**2 * (0.5 + rng.random(500))
    loss = stats.paired_normalized_error(error, norm)
    assert loss.estimate == pytest.approx(np.sqrt(error.sum() / norm.sum()))
    assert loss.low < loss.estimate < loss.upper < 1.1 * loss.high
    none = stats.paired_normalized_error(np.zeros(3), np.zeros(3))
    assert none.estimate == 0
    assert none.upper == np.inf, "three samples bound nothing"


def test_what_a_number_of_samples_can_carry() -> None:
    assert stats.carried_loss_percent(300, zero_one=True, upper_margin=0)[0] == 1.0
    assert stats.carried_loss_percent(1, zero_one=True, upper_margin=0)[0] == 100.0
    assert stats.carried_loss_percent(1, zero_one=False, upper_margin=0.0)[0] == 100.0
    assert stats.carried_loss_percent(50, zero_one=False, upper_margin=0.002)[0] == pytest.approx(0.2)
