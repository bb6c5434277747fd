"""The promise under seeded regressions: never slower, never less accurate than agreed, within every constraint."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from app.domain.spec import OptimizationSpec
from workers.pipeline.checks import Check
from workers.pipeline.select import BASELINE, Tried, judge, pareto, undecided

QUIET = {"1": {"ratio": 1.0, "low": 0.98, "high": 1.02}, "8": {"ratio": 1.0, "low": 0.98, "high": 1.02}}
MEASURED = {"source": "dataset", "loss_percent": 0.1, "metric": "top1", "samples": 600}


def _spec(**changes: Any) -> OptimizationSpec:
    return OptimizationSpec.model_validate({"model_id": "mdl_x", **changes})


def _figures(
    ratio: float, *, width: float = 0.05, at8: float | None = None, not_finite: Sequence[str] = (), **extra: Any
) -> dict[str, Any]:
    def batch(r: float, size: int) -> dict[str, Any]:
        around = {"ratio": r, "low": r - width, "high": r + width}
        latency = 10.0 * size / r
        return {
            "mean_ms": latency,
            "p50_ms": latency,
            "p99_ms": latency * 1.2,
            "throughput_qps": size * 1000 / latency,
            "speedup": around,
            "throughput_ratio": around,
            "not_finite": not_finite,
        }

    return {
        "batches": {"1": batch(ratio, 1), "8": batch(at8 or ratio, 8)},
        "size_bytes": 4_000_000,
        "peak_memory_mb": 100.0,
        **extra,
    }


def _candidate(ratio: float, accuracy: dict[str, Any] | None = MEASURED, **figures: Any) -> Tried:
    return Tried("int8", "int8", False, accuracy, _figures(ratio, **figures))


def _baseline() -> Tried:
    return Tried(BASELINE, "fp32", True, None, _figures(1.0, width=0.02))


def _pick(candidate: Tried, noise: dict[str, Any] = QUIET, **spec: Any) -> str | None:
    return judge(_spec(**spec), _baseline(), [candidate], noise).picked


@pytest.mark.parametrize(
    ("candidate", "worth_more"),
    [
        (_candidate(1.04), True),
        (_candidate(0.98), False),  # slower by its estimate
        (_candidate(2.0), False),  # it ships
        (_candidate(1.04, at8=0.8), False),  # slower elsewhere, with confidence
        (_candidate(1.04, {**MEASURED, "loss_percent": 3.0}), False),
    ],
)
def test_who_is_measured_again(candidate: Tried, worth_more: bool) -> None:
    _pick(candidate)
    assert undecided(_spec(), candidate, "1") is worth_more


def test_a_faster_and_accurate_engine_ships() -> None:
    assert _pick(_candidate(2.0)) == "int8"


def test_the_fastest_of_several_ships() -> None:
    slow, fast = _candidate(1.5), _candidate(2.5)
    slow.id, fast.id = "slow", "fast"
    assert judge(_spec(), _baseline(), [slow, fast], QUIET).picked == "fast"


@pytest.mark.parametrize(
    ("candidate", "why"),
    [
        (_candidate(0.7), "not faster with confidence"),
        (_candidate(1.03), "not faster with confidence"),
        (_candidate(2.0, at8=0.8), "slower at batch size 8"),
        (_candidate(2.0, {**MEASURED, "loss_percent": 1.5}), "over the limit"),
        (_candidate(2.0, {**MEASURED, "loss_percent": None}), "accuracy loss unknown"),
        (_candidate(2.0, None), "accuracy was not measured"),
        (_candidate(2.0, {"broken": {"code": "not_finite", "detail": "NaN in y"}}), "output broken"),
        (_candidate(2.0, {**MEASURED, "source": "synthetic"}), "no validation data"),
        (_candidate(2.0, not_finite=["y"]), "NaN or Inf in y"),
    ],
)
def test_a_regression_never_ships(candidate: Tried, why: str) -> None:
    assert _pick(candidate) == BASELINE
    assert any(why in reason for reason in candidate.reasons), candidate.reasons


def test_the_next_one_ships_where_the_confirming_samples_refute_the_first() -> None:
    first = Tried("int8", "int8", False, {**MEASURED, "loss_percent": 3.0}, _figures(3.0))
    second = Tried("bf16", "bf16", False, MEASURED, _figures(1.5))
    verdict = judge(_spec(), _baseline(), [first, second], QUIET)
    assert verdict.picked == "bf16"
    assert any("3" in reason for reason in first.reasons)


def test_an_original_that_is_not_finite_itself_does_not_stop_its_engines() -> None:
    base = Tried(BASELINE, "fp32", True, None, _figures(1.0, width=0.02, not_finite=["mask"]))
    assert judge(_spec(), base, [_candidate(2.0, not_finite=["mask"])], QUIET).picked == "int8"


def test_fifty_seeded_regressions_are_all_stopped() -> None:
    rng = random.Random(7)
    for _ in range(50):
        kind = rng.choice(["slow", "lossy", "broken", "noisy"])
        noise = QUIET
        if kind == "slow":
            candidate = _candidate(rng.uniform(0.3, 1.04))
        elif kind == "lossy":
            candidate = _candidate(rng.uniform(1.2, 4), {**MEASURED, "loss_percent": rng.uniform(1.01, 60)})
        elif kind == "broken":
            candidate = _candidate(3.0, {"broken": {"code": "not_finite", "detail": "NaN"}})
        else:
            shift = rng.uniform(1.2, 1.5)
            noise = {b: {"ratio": shift, "low": shift - 0.1, "high": shift + 0.1} for b in ("1", "8")}
            candidate = _candidate(rng.uniform(0.9, shift + 0.1))
        assert _pick(candidate, noise) == BASELINE, kind


def test_a_lossless_engine_needs_no_data() -> None:
    candidate = _candidate(1.5, {"source": "synthetic", "loss_percent": 1e-5})
    candidate.lossless = True
    assert _pick(candidate) == "int8"


def test_what_computes_in_narrower_types_needs_data() -> None:
    candidate = _candidate(1.5, {"source": "synthetic", "loss_percent": 0.0})
    candidate.narrows = "it computes float64 (tensor 'seconds') in float32"
    assert _pick(candidate) == BASELINE
    assert any("float64 (tensor 'seconds') in float32" in reason for reason in candidate.reasons)


def test_throughput_is_judged_at_the_largest_batch() -> None:
    candidate = _candidate(1.0, at8=2.0)
    assert _pick(candidate) == BASELINE
    assert _pick(_candidate(1.0, at8=2.0), objective="throughput") == "int8"


@pytest.mark.parametrize(
    "constraints",
    [{"p99_latency_ms": 0.001}, {"min_throughput_qps": 1e9}, {"max_memory_mb": 1}, {"max_size_mb": 0.001}],
)
def test_what_nobody_meets_names_the_nearest_miss(constraints: dict[str, float]) -> None:
    verdict = judge(_spec(constraints=constraints), _baseline(), [_candidate(2.0)], QUIET)
    assert verdict.picked is None
    assert verdict.nearest is not None
    assert verdict.nearest[1]


def test_a_percentile_without_enough_samples_does_not_pass() -> None:
    candidate = _candidate(2.0)
    for tried in (candidate, base := _baseline()):
        assert tried.figures is not None
        tried.figures["batches"]["1"].update(p99_ms=None, reasons={"p99_ms": "662 samples are needed"})
    verdict = judge(_spec(constraints={"p99_latency_ms": 50}), base, [candidate], QUIET)
    assert verdict.picked is None
    assert "662" in " ".join(candidate.reasons)


def test_pareto_keeps_what_nobody_beats_in_both() -> None:
    fast, slow, beaten = _candidate(3.0), _candidate(2.0), _candidate(1.5)
    fast.accuracy, slow.accuracy, beaten.accuracy = ({**MEASURED, "loss_percent": loss} for loss in (2.0, 0.1, 0.5))
    fast.id, slow.id, beaten.id = "fast", "slow", "beaten"
    assert pareto(_baseline(), [(t, t.figures or {}) for t in (fast, slow, beaten)], "1") == [BASELINE, "fast", "slow"]


def test_of_those_that_tie_where_it_counts_the_better_over_all_batch_sizes_is_picked() -> None:
    even, lopsided = _candidate(3.0, width=0.09, at8=3.0), _candidate(3.05, width=0.09, at8=2.0)
    slower = _candidate(2.6, width=0.09, at8=9.0)
    even.id, lopsided.id, slower.id = "even", "lopsided", "slower"
    assert judge(_spec(), _baseline(), [even, lopsided, slower], {}).picked == "even"


def test_a_smaller_engine_ships_where_the_original_is_over_the_limit_of_size_or_memory() -> None:
    limits = {"constraints": {"max_size_mb": 2.0}}
    slow = _candidate(0.9, size_bytes=1_000_000)
    verdict = judge(_spec(**limits), _baseline(), [slow], QUIET)
    assert (verdict.picked, verdict.smaller) == ("int8", True)
    assert "not faster" in slow.speed[0], "and it is said"
    assert _pick(_candidate(0.9, size_bytes=1_000_000)) == BASELINE, "nobody asked for less"
    assert _pick(_candidate(0.9), **limits) is None, "it is no smaller"
    lossy = _candidate(0.9, {**MEASURED, "loss_percent": 3.0}, size_bytes=1_000_000)
    assert _pick(lossy, **limits) is None
    faster = _candidate(2.0, size_bytes=1_500_000)
    faster.id = "faster"
    verdict = judge(_spec(**limits), _baseline(), [slow, faster], QUIET)
    assert (verdict.picked, verdict.smaller) == ("faster", False)
    memory = {"constraints": {"max_memory_mb": 80.0}}
    assert _pick(_candidate(0.9, peak_memory_mb=60.0), **memory) == "int8"
    assert _pick(_candidate(0.9), constraints={"min_throughput_qps": 1e6}) is None


def test_the_nearest_miss_may_be_one_that_was_never_measured_in_full() -> None:
    near, far = _candidate(2.0), _candidate(2.0)
    near.id = "near"
    for tried, value in ((near, 6.0), (far, 60.0)):
        tried.figures, tried.failed = None, "over the limit"
        tried.missed = Check("p99_latency_ms", value, 5.0, False, "over the limit", at_least=True)
    baseline = _baseline()
    verdict = judge(_spec(constraints={"p99_latency_ms": 5.0}), baseline, [far, near], QUIET)
    assert verdict.nearest is not None
    assert (verdict.nearest[0], verdict.nearest[1]) == ("near", [near.missed])


BUSY = {"claim": False, "reason": "batch 1: 2 of 10 rounds of the original were undisturbed"}


def test_a_busy_machine_makes_no_claim() -> None:
    fast = _candidate(57.2)
    verdict = judge(_spec(), _baseline(), [fast], QUIET, BUSY)
    assert (verdict.picked, verdict.unclaimed) == (BASELINE, BUSY["reason"])
    assert "no speed-up is claimed" in fast.reasons[0]
    assert judge(_spec(), _baseline(), [fast], QUIET, {"claim": True, "reason": None}).unclaimed is None
    allowed = judge(_spec(benchmark={"allow_noisy": True}), _baseline(), [fast], QUIET, BUSY)
    assert (allowed.picked, allowed.unclaimed) == ("int8", BUSY["reason"])


def test_too_few_undisturbed_rounds_of_one_engine_claim_nothing_of_it() -> None:
    busy, calm = _candidate(3.0), _candidate(2.0)
    calm.id = "calm"
    assert busy.figures is not None
    busy.figures["batches"]["8"]["undisturbed"] = False
    verdict = judge(_spec(), _baseline(), [busy, calm], QUIET)
    assert (verdict.picked, verdict.unclaimed) == ("calm", None)
    assert "batch size 8" in busy.reasons[0]


def test_a_wide_throughput_of_the_original_stops_a_claim_of_throughput() -> None:
    wide = {b: {**aa, "throughput": {"ratio": 1.0, "low": 0.7, "high": 1.4}} for b, aa in QUIET.items()}
    verdict = judge(_spec(objective="throughput"), _baseline(), [_candidate(2.0)], wide)
    assert verdict.picked == BASELINE
    assert "throughput" in str(verdict.unclaimed)
    assert judge(_spec(), _baseline(), [_candidate(2.0)], wide).picked == "int8"
