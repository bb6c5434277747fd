"""Proven or unproven: the bounds and how often they hold, the gate's rules, and whole decisions on drawn engines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import lgamma
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from app.domain.spec import OptimizationSpec
from workers.measure import chance, upper_bounds
from workers.measure.losses import bound_figures, samples_needed
from workers.measure.stats import Level, bootstrap_statistic, p99_bound, paired_loss
from workers.pipeline.checks import accuracy_checks, confidence_of_a_look, looks, p99_check
from workers.pipeline.protocol import Limits
from workers.pipeline.runner import StageRunner

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RNG = np.random.default_rng(11)
CONFIRMED = {"source": "dataset", "part": "confirm", "loss_percent": 0.2, "bound_percent": 0.9, "samples": 900}


def _spec(**validation: Any) -> OptimizationSpec:
    return OptimizationSpec.model_validate({"model_id": "m", "validation": validation})


def _loss_check(accuracy: dict[str, Any], *, lossless: bool = False, **validation: Any) -> Any:
    return accuracy_checks(_spec(**validation), accuracy, lossless=lossless)[-1]


# Bounds


@pytest.mark.parametrize(("count", "samples"), [(0, 300), (1, 300), (3, 7), (7, 7), (120, 5000), (2000, 100_000)])
@pytest.mark.parametrize("confidence", [0.6, 0.95, 0.9833])
def test_bounds_of_proportions_are_clopper_and_pearsons(count: int, samples: int, confidence: float) -> None:
    high = scipy.stats.beta.ppf(confidence, count + 1, samples - count) if count < samples else 1.0
    low = scipy.stats.beta.ppf(1 - confidence, count, samples - count + 1) if count else 0.0
    assert upper_bounds.proportion(count, samples, confidence) == pytest.approx(high, rel=1e-8)
    assert upper_bounds.proportion_from_below(count, samples, confidence) == pytest.approx(low, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("freedom", [1, 4, 30, 400])
def test_quantiles_of_student(freedom: int) -> None:
    for confidence in (0.6, 0.95, 0.975, 0.998):
        expected = scipy.stats.t.ppf(confidence, freedom)
        assert upper_bounds.student(confidence, freedom) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("confidence", [0.95, 0.9833])
def test_the_bound_of_a_difference_misses_no_oftener_than_said(confidence: float) -> None:
    """Not a simulation: all outcomes of 24 pairs, with their probabilities, over a grid of what is true."""
    n = 24
    losses, gains = (np.array(x) for x in zip(*((i, j) for i in range(n + 1) for j in range(n + 1 - i)), strict=True))
    uppers = np.array(
        [upper_bounds.difference(int(i), int(j), n, confidence) for i, j in zip(losses, gains, strict=True)]
    )
    coefficients = np.array([lgamma(n + 1) - lgamma(i + 1) - lgamma(j + 1) - lgamma(n - i - j + 1)
                             for i, j in zip(losses, gains, strict=True)])  # fmt: skip
    worst = 0.0
    for differing in np.linspace(0.01, 0.99, 50):
        for true in np.linspace(-differing, differing, 41):
            p = [max(v, 1e-300) for v in ((differing + true) / 2, (differing - true) / 2, 1 - differing)]
            logs = coefficients + losses * np.log(p[0]) + gains * np.log(p[1]) + (n - losses - gains) * np.log(p[2])
            worst = max(worst, float(np.exp(logs)[uppers < true - 1e-9].sum()))
    assert 0.5 * (1 - confidence) < worst <= 1 - confidence


@pytest.mark.parametrize("true", [0.005, 0.02])
def test_the_bound_of_a_bounded_mean_holds_for_what_is_seldom_and_far_off(true: float) -> None:
    missed = 0
    for seed in range(400):
        values = (np.random.default_rng(seed).random(400) < true) * 1.0
        missed += upper_bounds.bounded_mean(values, 0.0, 2.0, 0.95) < true
    assert missed <= 0.05 * 400


def test_one_flip_is_no_bootstrap() -> None:
    one = paired_loss(np.r_[1.0, np.zeros(299)], zero_one=True, least=0.0)
    assert one.upper == pytest.approx(scipy.stats.beta.ppf(0.95, 2, 299))
    assert [one.low, one.high] == pytest.approx(
        [scipy.stats.beta.ppf(0.025, 1, 300), scipy.stats.beta.ppf(0.975, 2, 299)]
    )
    assert paired_loss(np.r_[1.0, np.zeros(299)], zero_one=True).upper > one.upper, "gains might have been lost as well"


def test_unbounded_losses_bound_nothing_on_few_samples_and_leave_room_for_the_unseen() -> None:
    def mean(sums: Any) -> Any:
        return sums[:, 0] / sums[:, 1]

    few, many = (np.stack([RNG.exponential(0.01, n), np.ones(n)], axis=1) for n in (59, 200))
    assert bootstrap_statistic(few, mean, Level()).upper == np.inf
    loss = bootstrap_statistic(many, mean, Level())
    normal = loss.estimate + 1.645 * many[:, 0].std() / np.sqrt(200)
    assert normal < loss.upper < 1.3 * normal


def test_equal_samples_are_no_further_evidence() -> None:
    loss = paired_loss(np.zeros(3000), zero_one=True, least=0.0)
    figures = bound_figures([loss], Level(repeats=10.0), 1.0)
    assert figures["bound_percent"] == pytest.approx(10 * 100 * loss.upper, rel=1e-4)
    assert bound_figures([loss], Level(), 1.0)["bound_percent"] == pytest.approx(100 * loss.upper, rel=1e-4)


@pytest.mark.parametrize(("flips", "samples"), [(0, 50), (1, 200), (4, 600)])
def test_how_many_samples_would_do(flips: int, samples: int) -> None:
    values = np.r_[np.ones(flips), np.zeros(samples - flips)]
    loss = paired_loss(values, zero_one=True, least=0.0)
    needed = samples_needed(loss, 0.01, 0.95)
    assert needed is not None
    assert upper_bounds.proportion(int(np.ceil(flips / samples * needed)), needed, 0.95) <= 0.01
    assert needed == 299 or needed > 1.2 * samples
    assert samples_needed(paired_loss(np.ones(50), zero_one=True, least=0.0), 0.01, 0.95) is None


# The gate


@pytest.mark.parametrize(
    ("change", "passed", "proven", "why"),
    [
        ({}, True, True, "proven: at most 0.9 % at 95 %, on 900 samples"),
        ({"bound_percent": 1.2, "samples_needed": 1400}, True, False, "about 2100 validation samples would show"),
        ({"bound_percent": 1.2, "samples_needed": 1400, "shared": True}, True, False, "about 4200 validation samples"),
        ({"bound_percent": 1.2, "samples_needed": 4000}, True, False, "`validation.max_samples` of 4000"),
        ({"bound_percent": None, "samples": 2, "samples_needed": 60}, True, False, "no loss at all can be excluded"),
        ({"complete": False}, True, False, "the time ran out after 900 samples"),
        ({"complete": False, "samples": 20}, False, False, "too few to show"),
        ({"part": "select"}, True, False, "did not hold a look"),
        ({"part": "all"}, True, False, "too few to keep some apart"),
        ({"loss_percent": 1.1}, False, False, "over the limit"),
        ({"loss_percent": None}, False, False, "unknown"),
    ],
)
def test_what_is_proven(change: dict[str, Any], passed: bool, proven: bool, why: str) -> None:
    check = _loss_check(CONFIRMED | change)
    assert (check.passed, check.proven) == (passed, proven)
    assert why in check.reason
    strict = _loss_check(CONFIRMED | change, strict=True)
    assert (strict.passed, strict.proven) == (passed and proven, proven)
    assert why in strict.reason
    assert strict.passed or strict.miss > 0
    assert {"proven", "bound", "confidence", "samples", "samples_needed"} <= set(check.to_json())


def test_the_same_arithmetic_is_a_proof_as_long_as_nothing_differs() -> None:
    alone = {"source": "synthetic", "part": "all", "loss_percent": 1e-4, "samples": 32}
    check = _loss_check(alone, lossless=True, strict=True)
    assert (check.passed, check.proven) == (True, True)
    assert "arithmetic" in check.reason
    assert not _loss_check(alone).passed
    off = _loss_check(alone | {"loss_percent": 0.5}, lossless=True)
    assert (off.passed, off.proven) == (True, False)
    few = {**CONFIRMED, "loss_percent": 0.0, "bound_percent": 90.0, "samples": 2}
    assert _loss_check(few, lossless=True).proven
    assert not _loss_check(few).proven, "two samples prove nothing"


def test_the_error_is_shared_among_the_looks() -> None:
    sure, lossy = {"loss_percent": 0.0}, {"loss_percent": 0.3}
    assert looks([(False, lossy), (False, sure), (True, sure)]) == 2
    assert looks([(True, lossy)]) == looks([]) == looks([(True, sure)]) == 1, "a difference is looked at like any other"
    assert confidence_of_a_look(_spec(), 2) == pytest.approx(0.975)
    assert confidence_of_a_look(_spec(confidence=0.9), 4) == pytest.approx(0.975)


# p99


@pytest.mark.parametrize("samples", [299, 473, 662, 5000])
def test_the_p99_is_bounded_by_an_order_statistic(samples: int) -> None:
    bound = p99_bound(np.random.default_rng(0).permutation(np.arange(1.0, samples + 1)))
    assert bound is not None
    below = scipy.stats.binom.cdf(bound - 1, samples, 0.99)  # so often fewer than `bound` samples lie below the p99
    assert below >= 0.95 > scipy.stats.binom.cdf(bound - 2, samples, 0.99)
    assert p99_bound(np.arange(298.0)) is None


def test_a_p99_limit_is_held_against_the_bound() -> None:
    at = {"samples": 700, "p99_ms": 9.9, "p99_bound_ms": 10.4, "reasons": {}}
    check = p99_check(at, 10.0)
    assert not check.passed
    assert (check.value, check.bound, check.judged) == (9.9, 10.4, 10.4)
    assert check.miss == pytest.approx(0.04)
    assert p99_check(at, 10.5).passed
    assert p99_check(at, None).passed
    assert "299 are needed" in str(
        p99_check({"p99_ms": None, "reasons": {"p99_bound_ms": "299 are needed"}}, 10).reason
    )


# Labels that nobody knows


@pytest.mark.parametrize(
    ("answers", "unknown"),
    [
        ("right in 90 %", False),
        ("right in 20 %", False),
        ("shuffled", True),
        ("shifted", True),
        ("always the same", True),
    ],
)
def test_labels_that_the_original_does_not_know(answers: str, unknown: bool) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 10
    said = {
        "right in 90 %": np.where(rng.random(300) < 0.9, labels, 0),
        "right in 20 %": np.where(rng.random(300) < 0.2, labels, rng.permutation(labels)),
        "shuffled": rng.permutation(labels),
        "shifted": (labels + 1) % 10,
        "always the same": np.zeros(300, int),
    }[answers]
    counts = [np.bincount(x, minlength=10) for x in (labels, said)]
    assert chance.no_better_than_guessing(*counts, float((labels == said).sum())) is unknown
    few = [np.bincount(x[:3], minlength=10) for x in (labels, said)]
    assert not chance.no_better_than_guessing(*few, 0.0), "of three nobody can tell"


def test_rare_classes_that_are_found_are_no_guess() -> None:
    assert not chance.no_better_than_guessing(np.array([297, 3]), np.array([297, 3]), 298.0)
    assert chance.no_better_than_guessing(np.array([270, 30]), np.array([300, 0]), 270.0), "always the same answer"


# Checks that were cut short


class _Ledger:
    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}

    def recall(self, _tenant: str, key: str) -> Any:
        return self.rows.get(key)

    def remember(self, _claim: Any, row: Any) -> None:
        self.rows[row.key] = row

    def progress(self, *_: Any) -> None:
        pass


def test_a_check_that_was_cut_short_is_made_again_where_more_time_is_there(tmp_path: Path) -> None:
    ledger, ran = _Ledger(), []

    def run(request: Any, **_: Any) -> Any:
        ran.append(request.limits.soft_seconds)
        whole = request.limits.soft_seconds > 5
        return SimpleNamespace(data={"complete": whole}, notes=[], outputs=[], seconds=1.0, reusable=whole)

    call: dict[str, Any] = {
        "claim": SimpleNamespace(job_id="j", tenant_id="t", owner="w"),
        "ledger": ledger,
        "isolated": SimpleNamespace(run=run),
        "workspace": SimpleNamespace(new_call=lambda stage: tmp_path / stage),
        "hardware": {},
        "fingerprint": "machine",
        "limits": Limits(100, 1, 1),
        "lock_dir": tmp_path,
        "should_stop": lambda: False,
    }
    runner = StageRunner(**call)

    def check(soft: float, attempt: StageRunner = runner) -> tuple[bool, bool]:
        found = attempt.run("validate", {}, {"backend": "onnxruntime"}, seconds=50, soft_seconds=soft)
        return found.data["complete"], found.cached

    assert check(2.0) == (False, False)
    assert check(2.0) == (False, True)
    assert check(1.0, StageRunner(**call)) == (False, True), "taken up again after a crash, with less time"
    assert check(3.0) == (False, False), "there is more time"
    assert check(9.0) == (True, False)
    assert check(1.0) == (True, True)
    assert ran == [2.0, 3.0, 9.0]


# Whole decisions


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gate

    yield gate
    for name in ("gate", "_common"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("metric", ["agreement", "cosine, seldom wrong", "normalized_error"])
def test_whole_decisions(decisions: Any, metric: str) -> None:
    kind = next(m for m in decisions.METRICS if m.name == metric)
    bad = [decisions.decision(kind, 0.015, n, seed)[1] for n in (300, 2000) for seed in range(60)]
    assert sum(bad) <= 0.05 * len(bad)
    good = [decisions.decision(kind, 0.005, 2000, seed)[0] for seed in range(40)]
    assert sum(good) >= 0.9 * len(good)
    none = [decisions.decision(kind, 0.0, 2000, seed) for seed in range(3)]
    assert none == [(True, True)] * 3


def test_an_engine_over_its_p99_limit_seldom_passes(decisions: Any) -> None:
    true = float(
        np.quantile(
            np.concatenate([decisions.latencies(np.random.default_rng(10**6 + i), 5000) for i in range(60)]), 0.99
        )
    )
    passed = sum(decisions.passes_p99(true / 1.015, 662, seed) for seed in range(400))
    assert passed <= 0.05 * 400
    assert sum(decisions.passes_p99(true / 0.8, 662, seed) for seed in range(100)) > 90
