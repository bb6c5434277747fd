"""Answers a search's requests by stage calls. It decides nothing, and needs of the search no more than the request."""

from __future__ import annotations

from collections.abc import Sequence

from app.domain.failures import FailureKind, StageFailure
from workers.candidates import Candidate
from workers.pipeline import compatibility
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.evaluate import Evaluator
from workers.pipeline.shape_checks import ShapeChecks
from workers.pipeline.stage_calls import Outcome
from workers.search.limits import NO_MEMORY
from workers.search.requantized import is_quantized, quantization
from workers.search.requests import (
    Answer,
    Confirm,
    Examine,
    Judge,
    Make,
    Rank,
    Refer,
    Request,
    Subject,
    Time,
    TryShapes,
)

# Of the quantization, as the sensitivity takes them.
_SHARED_OPTIONS = ("recipe", "method", "percentile", "op_types", "activations", "per_channel", "reduce_range", "part")


# Metrics that ask how far numbers are off, not which class is the best or where a vector points.
_OF_NUMBERS = ("normalized_error", "psnr", "mae", "rmse", "r2")


class Desk:
    """Of one job, on one worker. `runs`: what it holds of each candidate, by id. `timing`: the last short timing."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.runs: dict[str, CandidateRun] = {}
        self.timing: Outcome | None = None
        self._shapes = ShapeChecks(evaluator)

    def answer(self, request: Request) -> Answer:
        """Raises the StageFailure of what the machine or the user has to mend first: it ends the job."""
        match request:
            case Make():
                return self._make(request)
            case Judge():
                return self._judge(request)
            case TryShapes():
                return self._try_shapes(request)
            case Time():
                return self._time(request)
            case Rank():
                return self._rank(request)
            case Refer():
                samples = self.evaluator.spec.validation.max_samples
                self.evaluator.reference(samples, "confirm", request.until)
                return {}
            case Examine():
                compatibility.examine(self.evaluator.runner, self.evaluator.export, request.backend, self._left())
                return {}
            case Confirm():
                return self._confirm(request)

    def run_of(self, plan: Candidate) -> CandidateRun:
        return self.runs.setdefault(plan.id, CandidateRun.of(plan))

    def held(self, subject: Subject, until: float) -> CandidateRun:
        """With its engine; made here where another worker made it before: then the calls are answered from storage."""
        run = self.run_of(subject.candidate)
        if run.build is None:
            if subject.base is not None and self.run_of(subject.base).build is None:
                self.evaluator.make(self.run_of(subject.base), until)  # its calibration serves this one
            self.evaluator.make(run, until)
        return run

    def _make(self, request: Make) -> Answer:
        run = self.held(request.subject, request.until)
        if run.build is None:
            return _failed(run)
        assert run.graph is not None  # what is built has one
        reuses = False
        if is_quantized(run.plan):
            _, step = quantization(run.plan)
            reuses = self.evaluator.quantized_before(step, self._before_quantization(run))
        return {
            "built": {
                "engine": run.engine.digest,
                "size_bytes": run.engine.size_bytes,
                "graph": run.graph.key,
                "runtime": run.runtime,
                "seconds": [made.seconds for made in run.steps],
                "reuses": reuses,
            }
        }

    def _before_quantization(self, run: CandidateRun) -> Outcome:
        index, _ = quantization(run.plan)
        return run.steps[index - 1] if index else self.evaluator.export

    def _judge(self, request: Judge) -> Answer:
        run = self.held(request.subject, request.until)
        if run.build is None:
            return _failed(run)
        self.evaluator.apart = request.apart
        try:
            sound = self.evaluator.check(run, request.samples, request.until)
        except StageFailure as failure:
            if failure.code != "metric_undefined":
                raise
            return {"undefined": failure.to_json()}
        if run.tried.failed is not None or run.validate is None:
            return _failed(run)
        return {
            "accuracy": run.tried.accuracy,
            "asked": run.validate.options.get("max_samples", 0),
            "sound": sound,
            "all_seconds": self.evaluator.expected_check_seconds(run, self.evaluator.spec.validation.max_samples),
        }

    def _try_shapes(self, request: TryShapes) -> Answer:
        run = self.held(request.subject, request.until)
        if run.build is not None:
            self._shapes.shortest_first(run, request.until)
        if run.tried.failed is not None:
            return {**_failed(run), "probes": True, "shapes": None}
        return {"shapes": run.tried.shapes, "probes": not self._shapes.in_vain}

    def _time(self, request: Time) -> Answer:
        held: Sequence[CandidateRun] = [self.held(subject, request.until) for subject in request.subjects]
        sizes = None if request.batch_sizes is None else list(request.batch_sizes)
        try:
            timed = self.evaluator.time(
                held, request.until, min_seconds=request.seconds, screening=True, batch_sizes=sizes
            )
        except StageFailure as failure:
            if failure.code not in ("timed_out", *NO_MEMORY):
                raise  # the original itself fails, or the machine
            return {"failure": {"code": failure.code, "detail": failure.detail}}
        self.timing = timed
        told = timed.data
        return {"engines": told["engines"], "batch_sizes": told.get("batch_sizes", []), "at": timed.made.get("at")}

    def _left(self) -> float:
        budget = self.evaluator.budget
        return budget.left(budget.end)

    def _confirm(self, request: Confirm) -> Answer:
        run = self.held(request.subject, request.until)
        if run.build is not None:
            self.evaluator.apart = request.apart
            self.evaluator.confirm(run, request.confidence, request.until)
        return {}

    def _rank(self, request: Rank) -> Answer:
        run = self.held(request.subject, request.until)
        if run.build is None:
            return {"why_not": run.tried.failed}
        index, step = quantization(run.plan)
        before, data = self._before_quantization(run), self.evaluator.data
        inputs = {"model": before.outputs["model"]}
        if data.calibration is not None:
            inputs["calibration"] = data.calibration
        ranges = self.evaluator.ranges_of(step, before)
        if ranges is not None:
            inputs["ranges"] = ranges
        # NNCF's own quantizers are not simulated: static int8 stands for them.
        known = step.options if step.rounding is not None and step.rounding.in_onnx else {}
        options = {
            "recipe": "static_int8",
            "part": "calibration" if data.same else "all",
            **{k: v for k, v in known.items() if k in _SHARED_OPTIONS},
            "max_samples": request.samples,
            "exclude_nodes": list(step.options.get("exclude_nodes", ())),
            "shapes": data.shapes,
            **({"metric": "normalized_error"} if self.evaluator.spec.validation.metric in _OF_NUMBERS else {}),
        }
        try:
            run.sensitivity = self.evaluator.call("sensitivity", inputs, options, run.plan.id, request.until)
        except StageFailure as failure:
            if failure.kind is FailureKind.INFRASTRUCTURE:
                raise
            return {"why_not": failure.detail}
        nodes = run.sensitivity.data["nodes"]
        # To keep a node that the quantization left as it was changes nothing.
        took = None if known else run.steps[index].data.get("revertible_nodes")
        nodes = [n for n in nodes if took is None or n["name"] in took]
        return {"nodes": nodes, "metric": run.sensitivity.data["metric"]}


def _failed(run: CandidateRun) -> Answer:
    return {
        "failed": run.tried.failed or "it could not be made",
        "failure": run.failure.to_json() if run.failure else None,
    }
