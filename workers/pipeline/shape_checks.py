"""Candidates at shapes beside those of the data, in several orders of calls."""

from __future__ import annotations

from app.domain.failures import FailureKind, StageFailure
from workers.kernel import TensorSpec
from workers.measure.shapes import free_axes
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.evaluate import Evaluator
from workers.pipeline.stage_calls import Outcome


class ShapeChecks:
    """Of one job. What the original answers is found out once; `in_vain`: it did not get through it itself."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._probes: Outcome | None = None
        self.in_vain = False

    @property
    def free(self) -> bool:
        """Whether the model has axes beside the batch that are free."""
        inputs = self._evaluator.export.data["inputs"]
        return bool(free_axes([TensorSpec(i["name"], i["dtype"], tuple(i["shape"])) for i in inputs]))

    def shortest_first(self, run: CandidateRun, until: float) -> None:
        """A cheap look, for the search: called from the shortest shape on."""
        if self.free:
            self._check(run, until, thorough=False)

    def every_order(self, run: CandidateRun, until: float) -> None:
        """For the verdict."""
        self._check(run, until, thorough=True)

    def _check(self, run: CandidateRun, until: float, *, thorough: bool) -> None:
        """Writes down what was found. A failure of the engine drops it; where the time is too short, nothing more is
        known than before."""
        if self._evaluator.budget.over(until):
            return
        probes = self._probed(until)
        if probes is None:
            return
        try:
            inputs = {"engine": run.engine, "probes": probes.outputs["probes"]}
            options = {"backend": run.plan.backend, "runtime": run.runtime, "thorough": thorough}
            found = self._evaluator.call("check_shapes", inputs, options, run.plan.id, until)
        except StageFailure as failure:
            if failure.code != "timed_out":
                self._evaluator.failed(run, "shapes", failure)
            return
        run.tried.shapes = {**found.data, "left_out": probes.data["left_out"], "why": probes.data["why"]}

    def _probed(self, until: float) -> Outcome | None:
        """None where the original itself did not get through it: no engine is to blame for that."""
        if self._probes is None and not self.in_vain:
            inputs = {"model": self._evaluator.export.outputs["model"]}
            options = self._evaluator.selection(inputs, 1, "select")
            inputs.pop("calibration", None)  # whether the order of calls counts, any sample shows
            try:
                self._probes = self._evaluator.call("shape_probes", inputs, options, None, until)
            except StageFailure as failure:
                if failure.kind is not FailureKind.MODEL:
                    raise
                self.in_vain = True
        return self._probes
