"""The accuracy checks of a search: on a few samples first; on all where those cannot tell and the time holds it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from app.domain.failures import StageFailure
from app.domain.spec import OptimizationSpec
from workers.measure.parts import judging
from workers.pipeline import halving
from workers.pipeline.budget import Budget
from workers.pipeline.checks import FEWEST, confidence_of_a_look, looks, without_data
from workers.pipeline.evaluate import CandidateRun, Evaluator, complete
from workers.pipeline.shape_checks import ShapeChecks

_FEW = 96  # samples of the small check
_AT_ONCE = 4 * _FEW
_FULL_SHARE = 0.5  # of the time left to the search, at most, for a check on all samples
_CHEAP = 0.02  # of the budget: a check on all samples that takes less is made at once
_CHEAP_OF_LEFT = 0.05  # of the time left to the search, likewise
_CALL_S = 1.0  # of a check: starting it, loading the engine


class Checker:
    """Of one job. What it asks of one candidate it learns from those before: how many samples, how long they take."""

    def __init__(self, spec: OptimizationSpec, evaluator: Evaluator, budget: Budget) -> None:
        self.spec, self.evaluator, self.budget = spec, evaluator, budget
        self._shapes = ShapeChecks(evaluator)
        self._few = _FEW

    def expect(self, sample_ms: float) -> None:
        """What the original takes for a sample. Where judging all of them costs next to nothing, they judge at once:
        the finalists are judged on all in any case."""
        most = self.spec.validation.max_samples
        data = self.evaluator.data
        count = min(judging(data.judging // (2 if data.same else 1), "select") if data.judging else 0, most)
        limit = min(_CHEAP * self.budget.seconds, _CHEAP_OF_LEFT * self.budget.left(self.budget.search_until))
        if count and sample_ms > 0 and _CALL_S + count * sample_ms / 1e3 <= limit:
            self._few = most

    def check(self, run: CandidateRun) -> bool:
        """Whether it keeps the limit, as far as the samples judged can tell; dropped where its outputs are broken."""
        most = self.spec.validation.max_samples
        if not self._judged(run, min(self._few, most)):
            return False
        if self._cannot_tell(run) and not complete(run, most) and self._fits(run, most):
            # One flip among few samples is no loss that mending could find, and none among few is no proof.
            if not self._judged(run, most):
                return False
            if (run.tried.accuracy or {}).get("samples", most) <= _AT_ONCE:
                self._few = most  # too few for one are too few for the next, and all are not many
        accuracy = run.tried.accuracy or {}
        if accuracy.get("source") == "synthetic" and not run.plan.lossless:
            run.note("check", "cannot ship", without_data(run.plan.narrows))
            return False
        samples = accuracy.get("samples", 0)
        if samples < FEWEST and not accuracy.get("complete", True) and not run.plan.lossless:
            run.note("check", "cannot tell", f"the time left allowed {samples} samples")
            return False
        if run.validate is not None and complete(run, most):
            kept = halving.may_keep(self.spec, accuracy)  # those that confirm may tell otherwise
        else:
            kept = not halving.loses_too_much(self.spec, accuracy)
        return kept and self._shapes.shortest_first(run, self.budget.search_until)

    def beyond_doubt(self, run: CandidateRun) -> bool:
        """Whether no further sample will show that it loses too much."""
        accuracy, limit = run.tried.accuracy or {}, self.spec.validation.max_accuracy_loss_percent
        if run.plan.lossless:
            return True
        if halving.over_limit(self.spec, accuracy):
            return False
        interval = accuracy.get("loss_ci")
        whole = run.validate is not None and complete(run, self.spec.validation.max_samples)
        return whole or bool(interval and interval[1] <= limit)

    def why_not(self, run: CandidateRun) -> str:
        """For the report: why a checked candidate cannot ship."""
        accuracy = run.tried.accuracy or {}
        if accuracy.get("source") == "synthetic":
            return without_data(run.plan.narrows)
        loss, samples = accuracy.get("loss_percent"), accuracy.get("samples")
        if loss is not None and not halving.over_limit(self.spec, accuracy):
            return f"the time left allowed {samples} samples: too few to show that it keeps the accuracy"
        shown = "an unknown part" if loss is None else f"{loss:.2f} %"
        limit = self.spec.validation.max_accuracy_loss_percent
        return f"accuracy loss {shown} on {samples} samples, over the limit of {limit} %"

    def _judged(self, run: CandidateRun, samples: int) -> bool:
        most = self.spec.validation.max_samples
        try:
            sound = self.evaluator.check(run, samples, self.budget.search_until)
        except StageFailure as failure:
            if failure.code != "metric_undefined" or (samples >= most and not self.evaluator.apart):
                raise
            # So few of them are all of one kind; all of them may not be. If those that the search may look at are too
            # few, it looks at all there are, and then nothing is left that could prove anything.
            self.evaluator.apart &= samples < most
            self._few = most
            return self._judged(run, most)
        if not sound:
            run.drop("check", broken(run))
            return False
        accuracy = run.tried.accuracy or {}
        facts = {"loss_percent": accuracy.get("loss_percent"), "samples": accuracy.get("samples")}
        run.note("check", "checked", **facts)
        return True

    def _cannot_tell(self, run: CandidateRun) -> bool:
        accuracy = run.tried.accuracy or {}
        if accuracy.get("source") == "synthetic" or halving.loses_too_much(self.spec, accuracy):
            return False
        return not self.beyond_doubt(run)

    def _fits(self, run: CandidateRun, samples: int) -> bool:
        expected = self.evaluator.expected_check_seconds(run, samples)
        if expected <= _FULL_SHARE * self.budget.left(self.budget.search_until):
            return True
        run.note("check", "not judged on all samples", f"that would take {expected:.0f} s, too long for the search")
        return False


def confirm(
    spec: OptimizationSpec,
    evaluator: Evaluator,
    finalists: Sequence[CandidateRun],
    until: float,
    *,
    spare: float = math.inf,
) -> None:
    """The last word on the accuracy of the finalists, on samples that nobody chose by. How many looks at them there
    will be is known before the first, and each is as much surer. `spare`: seconds that a look may take; what was
    checked and takes longer is not looked at again."""
    sure = confidence_of_a_look(spec, looks([(r.plan.lossless, r.tried.accuracy) for r in finalists]))
    for run in finalists:
        if run.validate is not None and evaluator.expected_check_seconds(run, spec.validation.max_samples) > spare:
            run.note("final", "not confirmed", "the time left hardly holds the final measurement")
        else:
            evaluator.confirm(run, sure, until)


def broken(run: CandidateRun) -> str:
    found = (run.tried.accuracy or {}).get("broken") or {}
    return f"output broken: {found.get('detail', 'it could not be checked')}"
