"""Wins accuracy back where a quantized candidate loses more than the job allows: other calibration, equalization, and
the most sensitive nodes in higher precision, until the limit holds or the time is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from app.domain.failures import FailureKind, StageFailure
from workers.candidates import Candidate, Case, Step
from workers.pipeline.budget import Budget
from workers.pipeline.evaluate import CandidateRun, Evaluator

METHODS = ("percentile", "entropy", "mse")  # tried after the one that missed, in this order
_ALPHAS = (0.8, 0.5)  # of the equalization; the first helped real embedding models, the second helps with outliers
_SENSITIVITY_SAMPLES = 16
_FEWEST_SAMPLES = 2
_SENSITIVITY_CALLS = 45  # about how many nodes and groups of them are measured
_SIMULATED = 1.5  # what a call takes there, over the original's
_SENSITIVITY_SHARE = 0.2  # of the time left, which the number of samples goes by
_REMAKING = 3.0  # times what the quantization took: else there is no time to calibrate anew, and to judge that
_FIRST_KEPT = 1 / 32  # of the quantized nodes, where the search for their number begins
_FEW_KEPT = 1 / 24  # likewise: to keep fewer than that gains nothing that could be measured
_SHARED_OPTIONS = ("recipe", "method", "percentile", "op_types", "activations", "per_channel", "reduce_range", "part")
_MOST_KEPT = 0.5  # of the quantized nodes: beyond that the gain is gone
_HOPELESS = 10.0  # times the limit: other ranges do not mend that, some nodes do

PHASE = "win back"


@dataclass
class Attempt:
    """What was tried for one candidate, and the first one that kept the limit (None: none did)."""

    tried: list[CandidateRun] = field(default_factory=list)
    mended: CandidateRun | None = None


class WinBack:
    """`check(run)`: the search's small accuracy check; it says whether the limit holds. `sample_ms`: what the original
    takes for a sample, 0 where it is not known. `until`: when mending ends, in seconds of the budget."""

    def __init__(
        self,
        case: Case,
        evaluator: Evaluator,
        budget: Budget,
        check: Callable[[CandidateRun], bool],
        sample_ms: float,
        until: float,
    ) -> None:
        self.case = case
        self.spec = case.spec
        self.evaluator = evaluator
        self.budget = budget
        self.check = check
        self.sample_ms = sample_ms
        self.until = until

    def mend(self, run: CandidateRun) -> Attempt:
        found = Attempt()
        remaking = _REMAKING * self._remaking_seconds(run)
        for candidate in self._other_ways(run):
            if self.budget.left(self.until) < remaking:
                run.note(PHASE, "not tried", f"{candidate.name}: the time left does not hold calibrating anew")
                break
            if self._try(candidate, found):
                return found
        self._keep_nodes(run, found)
        return found

    def _try(self, candidate: Candidate, found: Attempt) -> bool:
        """Whether this one keeps the limit; it is remembered in any case."""
        if self.budget.over(self.until):
            return False
        made = CandidateRun.of(candidate)
        found.tried.append(made)
        if not self.evaluator.make(made, self.until) or not self.check(made):
            return False
        if (made.tried.accuracy or {}).get("loss_percent", 100.0) > self.spec.validation.max_accuracy_loss_percent:
            return False
        if found.mended is not None:
            found.mended.drop(PHASE, f"{candidate.name} keeps the limit, too, and is quantized further")
        found.mended = made
        made.note(PHASE, "keeps the limit")
        return True

    # Other ways to quantize the same nodes

    def _other_ways(self, run: CandidateRun) -> Iterator[Candidate]:
        index, step = quantization(run.plan)
        loss = (run.tried.accuracy or {}).get("loss_percent") or 0.0
        limit = self.spec.validation.max_accuracy_loss_percent
        if step.stage in ("quantize", "convert") and self.case.has("MatMul", "Gemm") and self.case.has_calibration:
            for alpha in _ALPHAS:
                yield _equalized(run.plan, index, self.case, alpha)
        free = self.spec.calibration is not None and self.spec.calibration.method == "auto"
        if "method" in step.options and free and loss <= _HOPELESS * max(limit, 0.1):
            for method in (m for m in methods_of(step) if m != step.options["method"]):
                other = replace(step, options={**step.options, "method": method})
                yield _changed(run.plan, index, other, method, f"{method} calibration")

    # The most sensitive nodes in higher precision

    def _keep_nodes(self, run: CandidateRun, found: Attempt) -> None:
        ranked = self._sensitivity(run)
        most = int(len(ranked) * _MOST_KEPT)
        keep, failed = max(1, int(len(ranked) * _FIRST_KEPT)), 0
        while keep <= most and not self.budget.over(self.until):
            if self._try(kept(run.plan, ranked[:keep]), found):
                self._fewer(run, ranked, failed, keep, found)
                return
            failed, keep = keep, (min(keep * 2, most) if keep < most else most + 1)

    def _fewer(self, run: CandidateRun, ranked: list[str], failed: int, kept_now: int, found: Attempt) -> None:
        """Between a number that was too small and one that holds: fewer nodes kept are faster."""
        if kept_now <= len(ranked) * _FEW_KEPT:
            return
        while kept_now - failed > max(1, kept_now // 4) and not self.budget.over(self.until):
            middle = (failed + kept_now) // 2
            if self._try(kept(run.plan, ranked[:middle]), found):
                kept_now = middle
            else:
                failed = middle

    def _sensitivity(self, run: CandidateRun) -> list[str]:
        """Names of the quantized nodes, the worst first; empty where it could not be measured. Dynamic quantization
        needs no data: without any it is measured on random inputs, and the check on real ones tells."""
        index, step = quantization(run.plan)
        needs_data = step.options.get("recipe") != "dynamic_int8"
        if self.budget.over(self.until) or (needs_data and not self.case.has_calibration):
            return []
        before = run.steps[index - 1] if index else self.evaluator.export
        inputs = {"model": before.outputs["model"]}
        if self.evaluator.data.calibration is not None:
            inputs["calibration"] = self.evaluator.data.calibration
        ranges = self.evaluator.ranges_of(step, before)
        if ranges is not None:
            inputs["ranges"] = ranges
        # NNCF's own quantizers are not simulated: static int8 stands for them.
        known = step.options if step.stage in ("quantize", "convert") else {}
        options = {
            "recipe": "static_int8",
            "part": "calibration" if self.case.same_data else "all",
            **{k: v for k, v in known.items() if k in _SHARED_OPTIONS},
            "max_samples": self._samples(),
            "exclude_nodes": list(step.options.get("exclude_nodes", ())),
            "shapes": self.evaluator.data.shapes,
        }
        half = self.budget.elapsed() + self.budget.left(self.until) / 2
        try:
            outcome = self.evaluator.call("sensitivity", inputs, options, run.plan.id, half)
        except StageFailure as failure:
            if failure.kind is FailureKind.INFRASTRUCTURE:
                raise
            run.note(PHASE, "no sensitivity", failure.detail)
            return []
        nodes: list[Mapping[str, Any]] = outcome.data["nodes"]
        run.sensitivity = outcome
        run.note(PHASE, "sensitivity", worst=[{"node": n["name"], "error": n["error"]} for n in nodes[:10]])
        return [str(n["name"]) for n in nodes if n["error"]]

    def _remaking_seconds(self, run: CandidateRun) -> float:
        """What quantizing anew takes: as it did, or an inference a sample where the first came from the cache."""
        index, step = quantization(run.plan)
        samples = min(int(step.options.get("max_samples", 0)), self.evaluator.data.calibrating)
        return max(run.steps[index].seconds, samples * self.sample_ms / 1e3)

    def _samples(self) -> int:
        """Of the sensitivity: as many as the time holds, a power of two: the same job asks for the same ones again."""
        call_s = _SENSITIVITY_CALLS * _SIMULATED * self.sample_ms / 1e3
        if not call_s:
            return _SENSITIVITY_SAMPLES
        held = _SENSITIVITY_SHARE * self.budget.left(self.until) / call_s
        return int(2 ** math.floor(math.log2(min(max(held, _FEWEST_SAMPLES), _SENSITIVITY_SAMPLES))))


def is_quantized(plan: Candidate) -> bool:
    """Whether there is a step to mend: what only computes in another precision has none."""
    return any(_quantizes(step) for step in plan.steps)


def quantization(plan: Candidate) -> tuple[int, Step]:
    """The step that quantizes, and where it stands."""
    return next((i, s) for i, s in enumerate(plan.steps) if _quantizes(s))


def _quantizes(step: Step) -> bool:
    return "quantize" in step.stage or (step.stage == "convert" and step.options.get("recipe") in ("int8", "fp8"))


def methods_of(step: Step) -> tuple[str, ...]:
    """Calibration methods that this step's stage takes."""
    return ("histogram", "percentile") if step.stage == "quantize_nncf" else METHODS


def kept(plan: Candidate, nodes: list[str]) -> Candidate:
    """The candidate with these nodes in higher precision."""
    index, step = quantization(plan)
    before = step.options.get("exclude_nodes", ())
    excluded = replace(step, options={**step.options, "exclude_nodes": sorted({*before, *nodes})})
    return _changed(plan, index, excluded, f"keep{len(nodes)}", f"{len(nodes)} sensitive nodes in higher precision")


def _equalized(plan: Candidate, index: int, case: Case, alpha: float) -> Candidate:
    options = {"alpha": alpha, "part": "calibration" if case.same_data else "all"}
    steps = [*plan.steps]
    steps.insert(index, Step("equalize", options, ("calibration",)))
    return replace(
        plan, id=f"{plan.id}.equalized-{alpha}", name=f"{plan.name}, equalized ({alpha})", steps=tuple(steps)
    )


def _changed(plan: Candidate, index: int, step: Step, suffix: str, name: str) -> Candidate:
    steps = [*plan.steps]
    steps[index] = step
    return replace(plan, id=f"{plan.id}.{suffix}", name=f"{plan.name}, {name}", steps=tuple(steps))
