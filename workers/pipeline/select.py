"""The verdict: which engine ships. Pure functions over measured figures.

An engine ships only if it is at least as accurate as agreed on the very bytes, faster with confidence (the lower end of
the 95 % interval of its speed-up lies above 1, beyond what the machine's own noise shows), not slower at any other
measured batch size nor at any shape in use, and within every constraint. Otherwise the untouched baseline ships.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.domain.spec import Constraints, OptimizationSpec
from workers.measure.claim import MOST_WIDE_MEAN
from workers.measure.device_memory import limited_mb
from workers.pipeline.checks import Check, accuracy_checks, at_most, p99_check
from workers.pipeline.shape_rules import fails, not_kept, unfit
from workers.search.limits import SLOWER
from workers.search.objective import BASELINE, TIE, primary_batch, ratio_of

_SIZES = ("size_mb", "memory_mb")
WORTH_TWO = 1.03  # of the speed of one engine, at some batch size, for which two in one bundle are worth their memory


@dataclass
class Tried:
    """A candidate (or the baseline) with all that was found out about it."""

    id: str
    precision: str
    lossless: bool
    accuracy: Mapping[str, Any] | None = None  # the validate stage's data
    figures: Mapping[str, Any] | None = None  # its part of the benchmark stage's data
    shapes: Mapping[str, Any] | None = None  # the check_shapes stage's data
    failed: str | None = None  # why it never got that far
    narrows: str | None = None  # as the candidate's
    checks: list[Check] = field(default_factory=list)
    speed: list[str] = field(default_factory=list)  # why it is not faster
    missed: Check | None = None  # the limit that it was seen to miss before it was measured in full
    served: Mapping[str, Tried] = field(default_factory=dict)  # of two in one bundle: who answers, by batch size

    @property
    def reasons(self) -> list[str]:
        if self.failed:
            return [self.failed]
        return [c.reason or f"{c.name}: {c.value} against {c.limit}" for c in self.checks if not c.passed] + self.speed


@dataclass(frozen=True)
class Verdict:
    """`picked` is a candidate's id or `baseline`; None where not even the baseline meets the constraints. `smaller`: it
    ships because the original is over a limit of size or memory, not because it is faster. `unclaimed`: why no speed-up
    is claimed, of whatever ships."""

    picked: str | None
    primary_batch: str
    nearest: tuple[str, list[Check]] | None = None
    smaller: bool = False
    unclaimed: str | None = None


def judge(
    spec: OptimizationSpec,
    baseline: Tried,
    candidates: Sequence[Tried],
    noise: Mapping[str, Mapping[str, Any]],
    disturbance: Mapping[str, Any] | None = None,
) -> Verdict:
    """Fill in everybody's checks and name the pick. `noise`: batch → the A/A ratio's {ratio, low, high}. `disturbance`:
    as the benchmark says it; where it does not carry a claim, nothing ships for its speed, unless the job allows it."""
    return _judge(spec, baseline, candidates, noise, _unclaimed(spec, noise, disturbance))


def _unclaimed(
    spec: OptimizationSpec, noise: Mapping[str, Mapping[str, Any]], disturbance: Mapping[str, Any] | None
) -> str | None:
    """Why no speed-up can be claimed from this benchmark; None where one can."""
    reasons = [str(disturbance["reason"])] if disturbance and not disturbance["claim"] else []
    if spec.objective != "latency":
        wide = [
            size for size, aa in noise.items() if (at := _noise(spec, aa)) and at["high"] > MOST_WIDE_MEAN * at["low"]
        ]
        reasons += [f"batch {size}: the original's throughput against itself is too wide" for size in wide]
    return "; ".join(reasons) or None


def _judge(
    spec: OptimizationSpec,
    baseline: Tried,
    candidates: Sequence[Tried],
    noise: Mapping[str, Mapping[str, Any]],
    unclaimed: str | None,
) -> Verdict:
    assert baseline.figures is not None
    batch = primary_batch(spec, [*baseline.figures["batches"]])
    usual = _not_finite(baseline.figures)
    baseline.checks = [*_constraints(spec.constraints, baseline, batch, usual)]
    for tried in candidates:
        if tried.failed is None:
            tried.checks = [
                *_accuracy(spec, tried),
                *_at_every_shape(spec, tried),
                *_constraints(spec.constraints, tried, batch, usual),
            ]
            tried.speed = _not_faster(spec, tried, batch, noise)
            if unclaimed is not None and not spec.benchmark.allow_noisy:
                tried.speed = [f"no speed-up is claimed: {unclaimed}"]
    shippable = [t for t in candidates if not t.reasons and not t.served]
    alone = _best(spec, shippable, batch) if shippable else None
    for tried in [t for t in candidates if t.served and t.failed is None]:
        tried.speed += not_worth_it(spec, tried, alone)
        if not tried.reasons:
            return Verdict(tried.id, batch, unclaimed=unclaimed)
    if alone is not None:
        return Verdict(alone.id, batch, unclaimed=unclaimed)
    if all(c.passed for c in baseline.checks):
        return Verdict(BASELINE, batch, unclaimed=unclaimed)
    smaller = [t for t in candidates if _only_smaller(spec, t)]
    if smaller and any(c.name in _SIZES and not c.passed for c in baseline.checks):
        return Verdict(_best(spec, smaller, batch).id, batch, smaller=True, unclaimed=unclaimed)
    everyone = [t for t in (baseline, *candidates) if t.failed is None or t.missed is not None]
    nearest = min(everyone, key=lambda t: max((c.miss for c in _all_checks(t)), default=0.0))
    return Verdict(None, batch, (nearest.id, [c for c in _all_checks(nearest) if not c.passed]), unclaimed=unclaimed)


def _only_smaller(spec: OptimizationSpec, tried: Tried) -> bool:
    """Whether it keeps every limit, and lacks nothing but speed."""
    kept = tried.failed is None and all(c.passed for c in tried.checks) and not tried.served
    return kept and tried.figures is not None and bool(_ratios(spec, tried))


def undecided(spec: OptimizationSpec, tried: Tried, batch: str) -> bool:
    """Whether it fails by nothing but an interval that is too wide: it keeps every limit, is faster by its estimate,
    and slower nowhere. More rounds would tell."""
    if tried.failed is not None or not tried.speed or not all(c.passed for c in tried.checks):
        return False
    ratios = {size: ratio_of(spec, at) for size, at in ((tried.figures or {}).get("batches") or {}).items()}
    primary = ratios.pop(batch, None)
    slower = any(ratio is None or ratio["high"] < 1.0 for ratio in ratios.values())
    slower = slower or bool(not_kept(spec, tried.figures or {}))
    return primary is not None and primary["ratio"] > 1.0 and not slower


def _all_checks(tried: Tried) -> list[Check]:
    """With the one that no constraint names: what is not faster never ships, whatever limit it would meet."""
    if tried.missed is not None:
        return [tried.missed]
    return [*tried.checks, *(Check("faster_than_original", None, None, False, why) for why in tried.speed)]


def _best(spec: OptimizationSpec, shippable: Sequence[Tried], batch: str) -> Tried:
    """The fastest at the batch size that counts. Of those that cannot be told from it there (their intervals overlap,
    and they lie within 5 %), the one with the largest gain over all batch sizes measured."""
    at = {t.id: _ratios(spec, t) for t in shippable}
    leader = max(shippable, key=lambda t: at[t.id][batch][0])
    ratio, low = at[leader.id][batch][0], at[leader.id][batch][1]
    ties = [t for t in shippable if at[t.id][batch][2] >= low and at[t.id][batch][0] >= TIE * ratio]
    return max(ties, key=lambda t: math.prod(r for r, _, _ in at[t.id].values()))


def _ratios(spec: OptimizationSpec, tried: Tried) -> dict[str, tuple[float, float, float]]:
    """By batch size: (gain, low, high)."""
    assert tried.figures is not None
    found = {size: ratio_of(spec, at) for size, at in tried.figures["batches"].items()}
    return {size: (float(r["ratio"]), float(r["low"]), float(r["high"])) for size, r in found.items() if r}


def _accuracy(spec: OptimizationSpec, tried: Tried) -> list[Check]:
    tried = worse_of(spec, tried)
    return accuracy_checks(spec, tried.accuracy, lossless=tried.lossless, narrows=tried.narrows)


def worse_of(spec: OptimizationSpec, tried: Tried) -> Tried:
    """Of two engines in one bundle the one whose accuracy is the less sure, as both have to keep the limit; a single
    one is that itself. The original loses nothing."""
    judged = {t.id: t for t in tried.served.values() if t.id != BASELINE}.values()

    def doubt(t: Tried) -> tuple[bool, bool, float]:
        checks = accuracy_checks(spec, t.accuracy, lossless=t.lossless, narrows=t.narrows)
        loss = max((c.bound if c.bound is not None else c.value or 0.0) for c in checks)
        return not all(c.passed for c in checks), not all(c.proven is not False for c in checks), loss

    return max(judged, key=doubt, default=tried)


def _at_every_shape(spec: OptimizationSpec, tried: Tried) -> list[Check]:
    """Whether it answers as the original does at every shape in use, in whatever order the calls come."""
    limit = spec.validation.max_accuracy_loss_percent
    judged = {t.id: t for t in (tried, *tried.served.values())}.values()
    found = [why for t in judged for why in unfit(t.shapes, t.accuracy, limit)] + fails(tried.figures or {})
    if not found and tried.shapes is None:
        return []
    return [Check("answers_at_every_shape", None, None, not found, "; ".join(found) or None)]


def _not_finite(figures: Mapping[str, Any]) -> set[str]:
    """Outputs in which the benchmark met NaN or Inf, at any batch size."""
    return {name for at in figures.get("batches", {}).values() for name in at.get("not_finite") or ()}


def _constraints(constraints: Constraints, tried: Tried, batch: str, usual: set[str]) -> list[Check]:
    """`usual`: outputs that are not finite in the original either."""
    figures = tried.figures
    if figures is None or "failed" in figures:
        why = figures["failed"].get("detail", "failed") if figures else "it was not measured"
        return [Check("benchmark", None, None, False, f"benchmark failed: {why}")]
    at = figures["batches"].get(batch)
    if at is None:
        return [Check("benchmark", None, None, False, f"not measured at batch size {batch}")]
    checks = []
    strange = _not_finite(figures) - usual
    if strange:
        where = ", ".join(sorted(strange))
        reason = f"NaN or Inf in {where} during the benchmark, where the original has none"
        checks.append(Check("finite_outputs_in_benchmark", None, None, False, reason))
    checks.append(p99_check(at, constraints.p99_latency_ms))
    value, limit = at.get("throughput_qps"), constraints.min_throughput_qps
    enough = limit is None or (value is not None and value >= limit)
    checks.append(Check("throughput_qps", value, limit, enough, None if enough else f"{value} qps, wanted {limit}"))
    checks.append(at_most("memory_mb", limited_mb(figures), constraints.max_memory_mb, "not measured"))
    checks.append(at_most("size_mb", figures["size_bytes"] / 1e6, constraints.max_size_mb, "not measured"))
    return checks


def _not_faster(spec: OptimizationSpec, tried: Tried, batch: str, noise: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if tried.figures is None or batch not in tried.figures.get("batches", {}):
        return ["its speed was not measured"]
    reasons = []
    for size, at in tried.figures["batches"].items():
        ratio = ratio_of(spec, at)
        if ratio is None:
            reasons.append(f"no speed-up known at batch size {size}")
        elif not at.get("undisturbed", True) and not spec.benchmark.allow_noisy:
            reasons.append(f"no speed-up is claimed at batch size {size}: too few of its rounds were undisturbed")
        elif size == batch:
            # What the baseline shows against itself is noise; a gain must lie beyond it.
            floor = _noise_floor(_noise(spec, noise.get(size)))
            if not ratio["low"] > floor:
                beyond = "" if floor == 1.0 else f" (the machine's noise reaches {floor:.2f}x)"
                interval = f"{ratio['ratio']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
                reasons.append(f"not faster with confidence at batch size {size}: {interval}{beyond}")
        elif ratio["high"] < (1.0 if not _original_answers(tried, size) else SLOWER):
            reasons.append(f"slower at batch size {size}: {ratio['ratio']:.2f}x")
    return reasons + not_kept(spec, tried.figures)


def _original_answers(tried: Tried, size: str) -> bool:
    """There nothing but the choice stands between a caller and the original, and two processes of it differ by more."""
    return size in tried.served and tried.served[size].id == BASELINE


def not_worth_it(spec: OptimizationSpec, pair: Tried, alone: Tried | None) -> list[str]:
    """Why two engines, which take the memory of both, do not ship in place of the one that would: nowhere a gain that
    is beyond noise, or somewhere a loss."""
    if alone is None or pair.figures is None or "failed" in pair.figures:
        return []
    gains = _over(spec, pair, alone)
    # Where that one answers here, too, two processes of one engine are compared, which differ by a few percent.
    losses = [size for size, (_, high) in gains.items() if high < SLOWER]
    if losses:
        return [f"slower than {alone.id} alone at batch size {size}" for size in sorted(losses, key=int)]
    if max((low for low, _ in gains.values()), default=0.0) > WORTH_TWO:
        return []
    least = 100 * (WORTH_TWO - 1)
    return [f"at no batch size faster than {alone.id} alone by {least:.0f} % beyond doubt, for the memory of two"]


def _over(spec: OptimizationSpec, tried: Tried, other: Tried) -> dict[str, tuple[float, float]]:
    """By batch size, between what its gain over the other one lies: of the two side by side, round by round; where too
    few rounds were undisturbed, by the ends of both gains over the original."""
    ours, theirs = _ratios(spec, tried), _ratios(spec, other)
    found = {}
    for size in ours.keys() & theirs.keys():
        assert tried.figures is not None
        direct = (tried.figures["batches"][size].get("beside") or {}).get(other.id) or {}
        ratio = ratio_of(spec, direct) if direct.get("undisturbed") else None
        if ratio is not None:
            found[size] = (float(ratio["low"]), float(ratio["high"]))
        else:
            found[size] = (ours[size][1] / theirs[size][2], ours[size][2] / theirs[size][1])
    return found


def _noise(spec: OptimizationSpec, aa: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The A/A ratio of the statistic that the objective is judged by: medians for latency, else throughput."""
    return aa if not aa or spec.objective == "latency" else aa.get("throughput", aa)


def _noise_floor(aa: Mapping[str, Any] | None) -> float:
    """How far the baseline was from itself; or what that interval reaches where it does not hold 1 (the run is then
    marked noisy). A gain no larger than that can be the difference between two processes of one engine."""
    if not aa:
        return 1.0
    if aa["low"] <= 1.0 <= aa["high"]:
        return float(max(aa["ratio"], 1 / aa["ratio"]))
    return float(max(aa["high"], 1 / aa["low"]))


def pareto(baseline: Tried, candidates: Sequence[tuple[Tried, Mapping[str, Any]]], batch: str) -> list[str]:
    """Ids of the measured, unbroken configurations that no other one beats in both latency and accuracy loss.

    Each with its figures, of the full measurement or of a short timing; latencies are compared over the baseline's of
    the same run."""
    points = [(BASELINE, 1.0, 0.0)] if baseline.figures else []
    for tried, figures in candidates:
        speedup = (figures.get("batches", {}).get(batch) or {}).get("speedup")
        loss = (tried.accuracy or {}).get("loss_percent")
        if speedup and loss is not None and not (tried.accuracy or {}).get("broken"):
            points.append((tried.id, 1.0 / speedup["ratio"], loss))
    return [
        i
        for i, latency, loss in points
        if not any(lat <= latency and los <= loss and (lat, los) != (latency, loss) for _, lat, los in points)
    ]
