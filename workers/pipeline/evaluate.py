"""Makes, checks and times candidates by keyed stage calls. What it learns of each stands in its `CandidateRun`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from app.domain.artifact_key import ArtifactRef
from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import OptimizationSpec
from workers import devices
from workers.artifacts import CHAINED
from workers.candidates import Candidate, Step
from workers.kernel import backends, stages
from workers.measure.shares import Part
from workers.pipeline.budget import Budget
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.chain import engine_of_each
from workers.pipeline.job_data import Data
from workers.pipeline.runner import StageRunner
from workers.pipeline.stage_calls import Outcome
from workers.search import room
from workers.search.halving import speed_of
from workers.search.limits import NO_MEMORY
from workers.search.objective import primary_batch

SEED = 20_240_229
_NOT_ITS_FAULT = (FailureKind.INFRASTRUCTURE, FailureKind.DATA, FailureKind.REQUEST)


class Evaluator:
    """Of one job. Stage calls that another candidate has made already are not made again."""

    def __init__(
        self,
        runner: StageRunner,
        spec: OptimizationSpec,
        export: Outcome,
        data: Data,
        budget: Budget,
        baseline_backend: str,
        chain: Outcome | None = None,
    ) -> None:
        """`chain`: how the model was made of several, where it was."""
        self.runner = runner
        self.spec = spec
        self.export = export
        self.chain = chain
        self.data = data
        self.budget = budget
        self.baseline_backend = baseline_backend
        self._made: dict[str, tuple[list[Outcome], Outcome]] = {}
        self._grouped: dict[str, Outcome | StageFailure] = {}
        self.apart = True  # the search and the verdict look at samples of their own
        self._references: dict[tuple[str, int], Outcome] = {}  # the original's outputs, by part and number of samples
        # What an earlier calibration found or made, by graph and calibration, and the input that takes it up.
        self._reusable: dict[tuple[str, str], ArtifactRef] = {}

    # Making

    def make(self, run: CandidateRun, until: float) -> bool:
        """Graph steps and build. A failure of the candidate is its own (False); only what the machine or the user has
        to mend first ends the job."""
        key = _key(run.plan.steps, run.plan.backend, run.plan.build_options)
        try:
            if key not in self._made:
                self._made[key] = self._make(run.plan, until)
        except StageFailure as failure:
            self.failed(run, "make", failure)
            return False
        run.steps, run.build = [*self._made[key][0]], self._made[key][1]
        run.graph = run.steps[-1] if run.steps else self.export
        run.steps.append(run.build)
        return True

    def _make(self, plan: Candidate, until: float) -> tuple[list[Outcome], Outcome]:
        graph, steps = self.export, []
        for step in plan.steps:
            graph = self._step(step, graph, plan.id, until)
            steps.append(graph)
        model = graph.of_kind(*backends()[plan.backend].accepts)
        if backends()[plan.backend].engine_format == CHAINED:
            assert self.chain is not None
            run = partial(self.call, candidate=plan.id, until=until)
            return steps, engine_of_each(run, self.chain, self.export, plan.unlinked(), model, self.data.shapes)
        shapes = {"shapes": self.data.shapes} if self.data.shapes else {}
        options = {"backend": plan.backend, "options": {**plan.build_options, **shapes}}
        return steps, self.call("build", {"model": model}, options, plan.id, until)

    def _step(self, step: Step, graph: Outcome, candidate: str, until: float) -> Outcome:
        """Steps of a group are made once in a job, whatever time is left to the next candidate that has them."""
        if step.group is None:
            return self.graph_step(step, graph, candidate, until)
        key = json.dumps([graph.key, step.stage, dict(step.options), step.extra], sort_keys=True)
        if key not in self._grouped:
            try:
                self._grouped[key] = self.graph_step(step, graph, candidate, until)
            except StageFailure as failure:
                if failure.kind in _NOT_ITS_FAULT:
                    raise
                self._grouped[key] = failure
        found = self._grouped[key]
        if isinstance(found, StageFailure):
            raise found
        return found

    def graph_step(self, step: Step, graph: Outcome, candidate: str, until: float) -> Outcome:
        """One step on the graph that `graph` put out."""
        stage = stages()[step.stage]
        inputs = {stage.reads: graph.of_kind(*stage.takes)}
        inputs |= {name: ref for name, ref in self.data.extra.items() if name in step.extra}
        key, excluded = _calibration_key(step, graph), step.options.get("exclude_nodes")
        if "calibration" in inputs and excluded:
            inputs |= {name: ref for name in stage.reuses if (ref := self._reusable.get((key, name))) is not None}
        shapes = {"shapes": self.data.shapes} if "shapes" in stage.Options.model_fields else {}
        found = self.call(step.stage, inputs, {**step.options, **shapes}, candidate, until)
        for name, output in stage.reuses.items():
            if output in found.outputs:
                self._reusable.setdefault((key, name), found.outputs[output])
        return found

    def quantized_before(self, step: Step, graph: Outcome) -> bool:
        """Whether keeping further nodes of this step in higher precision takes no new calibration."""
        key = _calibration_key(step, graph)
        return any((key, name) in self._reusable for name in stages()[step.stage].reuses)

    def ranges_of(self, step: Step, graph: Outcome) -> ArtifactRef | None:
        """What an earlier calibration of the same kind found on this graph, whichever nodes it was for."""
        return self._reusable.get((_calibration_key(step, graph), "ranges"))

    def call(
        self,
        stage: str,
        inputs: Mapping[str, ArtifactRef],
        options: Mapping[str, Any],
        candidate: str | None,
        until: float,
        *,
        weight: float | None = None,
    ) -> Outcome:
        soft, hard = self.budget.limits(until)
        return self.runner.run(
            stage,
            inputs,
            options,
            candidate=candidate,
            weight=weight,
            seconds=hard,
            soft_seconds=soft,
        )

    def failed(self, run: CandidateRun, phase: str, failure: StageFailure) -> None:
        """What is its own fault drops it; everything else ends the job."""
        if failure.kind in _NOT_ITS_FAULT:
            raise failure
        run.failure = failure
        if failure.code == "timed_out" and self.budget.over(self.budget.make_until):
            run.drop(phase, f"the budget of {self.spec.budget_seconds} s left too little time for its {failure.stage}")
        else:
            run.drop(phase, f"{failure.stage}: {failure.detail}")

    # Checking

    def check(self, run: CandidateRun, samples: int, until: float) -> bool:
        """Its accuracy on so many of the samples that the search may look at (the same ones for all candidates); False
        where it cannot be known."""
        found = self._validate(run, "select", samples, until, "check")
        if found is None:
            return False
        if not _fewer(found.data, run.tried.accuracy):  # where the time was too short, what was known before stands
            run.validate, run.tried.accuracy = found, found.data
        return not found.data.get("broken")

    def confirm(self, run: CandidateRun, confidence: float, until: float) -> bool:
        """Its accuracy on the samples that nobody chose by, with its bound; False where it cannot be known."""
        limit = self.spec.validation.max_accuracy_loss_percent
        bound = {"confidence": confidence, "max_loss_percent": limit}
        found = self._validate(run, "confirm", self.spec.validation.max_samples, until, "final", bound)
        if found is None:
            return False
        run.confirmed, run.tried.accuracy = found, found.data
        return not found.data.get("broken")

    def _validate(
        self,
        run: CandidateRun,
        part: Part,
        samples: int,
        until: float,
        phase: str,
        bound: Mapping[str, float] | None = None,
    ) -> Outcome | None:
        inputs = {"model": self.export.outputs["model"], "engine": run.engine}
        selection = self.selection(inputs, samples, part)
        expected = self.reference(samples, part, until)
        if expected is not None:
            inputs["expected"] = expected  # without it the original runs beside the engine
        options = {
            **selection,
            "backend": run.plan.backend,
            "runtime": run.runtime,
            "metric": self.spec.validation.metric,
            **(bound or {}),
        }
        try:
            return self.call("validate", inputs, options, run.plan.id, until)
        except StageFailure as failure:
            self.failed(run, phase, failure)
            return None

    def expected_check_seconds(self, run: CandidateRun, samples: int) -> float:
        """What a check on so many samples (or as many as there are) will take, going by an earlier one on fewer."""
        judged = (run.tried.accuracy or {}).get("samples") or 0
        if run.validate is None or not judged:
            return 0.0
        known = [r for (part, _), r in self._references.items() if part != "confirm" and r.data["samples"]]
        usable = next((r.data["usable"] for r in known if r.data["usable"]), None)
        count = min(samples, usable or samples)
        each = run.validate.seconds / judged
        if samples not in [count for part, count in self._references if part != "confirm"] and known:
            each += known[-1].seconds / known[-1].data["samples"]
        return count * each

    def selection(self, inputs: dict[str, ArtifactRef], samples: int, part: Part) -> dict[str, Any]:
        """Which samples judge; adds the data to `inputs`. Those that calibrated are left out."""
        if self.data.validation is not None:
            inputs["data"] = self.data.validation
            if self.data.calibration is not None and not self.data.same:
                inputs["calibration"] = self.data.calibration
        everything: Part = "validation" if self.data.same else "all"
        return {
            "max_samples": samples,
            "part": part if self.apart and self.data.validation is not None else everything,
            "shared": self.data.same,
            "shapes": self.data.ranges,
            "seed": SEED,
            "baseline_backend": self.baseline_backend,
        }

    def reference(self, samples: int, part: Part, until: float) -> ArtifactRef | None:
        """The original's outputs on these samples, made once; None where they are too large to keep."""
        inputs = {"model": self.export.outputs["model"]}
        options = self.selection(inputs, samples, part)
        known = (str(options["part"]), samples)
        if known not in self._references:
            try:
                found = self.call("reference_outputs", inputs, options, None, until)
            except StageFailure as failure:
                if failure.code not in ("timed_out", *NO_MEMORY):
                    raise
                return None
            self._references[known] = found
        return self._references[known].outputs.get("outputs")

    # Timing

    def time(
        self,
        runs: Sequence[CandidateRun],
        until: float,
        *,
        min_seconds: float,
        screening: bool,
        compare_to: str | None = None,
        rounds: int = 10,
        batch_sizes: Sequence[int] | None = None,
        every_shape: bool = False,
    ) -> Outcome:
        """Baseline and these engines side by side; figures by id in the answer's data. `batch_sizes`: other than the
        job's. `every_shape`: at the shapes beside the typical, too."""
        inputs = {"baseline": self.export.outputs["model"]}
        engines = []
        for run in runs:
            inputs[f"engine.{run.plan.id}"] = run.engine
            known = speed_of(self.spec, run.screened)
            expected = {} if known is None else {"expected": min(max(round(1 / known.ratio, 3), 0.001), 1000.0)}
            told = {"id": run.plan.id, "backend": run.plan.backend, "runtime": run.runtime, **expected}
            engines.append({**told, "beside": True} if run.has_rivals else told)
        if self.data.validation is not None:
            inputs["data"] = self.data.validation
        sizes = [str(b) for b in self.spec.benchmark.batch_sizes]
        options = {
            "engines": engines,
            "batch_sizes": [*(batch_sizes or self.spec.benchmark.batch_sizes)],
            "min_seconds": min_seconds,
            "rounds": rounds,
            "shapes": self.data.ranges,
            "want_p99": self.spec.constraints.p99_latency_ms is not None and not screening,
            "seed": SEED,
            "screening": screening,
            "essential": int(primary_batch(self.spec, sizes)),
            "every_shape": every_shape,
            "cold": not screening,
            "compare_to": compare_to,
            "baseline_backend": self.baseline_backend,
        }
        weight = (0.5 if screening else 2.0) * (len(runs) + 2)
        return self.call("benchmark", inputs, options, None, until, weight=weight)

    def memory_bytes(self) -> float:
        """Of what holds the engines: the device's own, or the worker's."""
        limit = self.runner.limits.memory_bytes
        return devices.of_backend(self.baseline_backend).memory_bytes(self.runner.hardware, limit)

    def groups_that_fit(self, runs: Sequence[CandidateRun]) -> tuple[list[list[CandidateRun]], list[CandidateRun]]:
        """Of a full measurement, which holds the baseline twice; and those that do not fit even alone."""
        by_id = {run.plan.id: run for run in runs}
        sizes = {cid: run.engine.size_bytes for cid, run in by_id.items()}
        original = self.export.outputs["model"].size_bytes
        groups, too_large = room.groups_that_fit(sizes, self.memory_bytes(), original, baselines=2)
        return [[by_id[i] for i in group] for group in groups], [by_id[i] for i in too_large]


def _fewer(accuracy: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
    """Whether it rests on fewer samples than what was known before, and found nothing broken."""
    if not before or accuracy.get("broken") or before.get("broken"):
        return False
    return bool(accuracy.get("samples", 0) < before.get("samples", 0))


def _calibration_key(step: Step, graph: Outcome) -> str:
    return json.dumps([graph.key, {**step.options, "exclude_nodes": None}], sort_keys=True)


def _key(steps: Sequence[Step], backend: str, build_options: Mapping[str, Any]) -> str:
    parts = [[s.stage, dict(s.options), s.extra] for s in steps]
    return json.dumps([parts, backend, dict(build_options)], sort_keys=True)
