"""The way of one job: export → search → full validation and benchmark of the finalists → verdict → package → what each
part gained, how to deploy. Each step is a keyed stage call, so that running this again after a crash goes on from the
last finished one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from app.db.orm import Dataset, Job, SourceModel
from app.domain.artifact_key import ArtifactRef, FileRef
from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import OptimizationSpec, ShapeRange
from app.settings import LimitSettings
from workers import kernel
from workers.candidates import Case
from workers.pipeline import planner
from workers.pipeline.budget import Budget
from workers.pipeline.checking import confirm
from workers.pipeline.deployment import deployment_of
from workers.pipeline.evaluate import NO_MEMORY, WEIGHTS, CandidateRun, Data, Evaluator
from workers.pipeline.explain import Explainer
from workers.pipeline.outcome import Explanation, Optimization, Proof
from workers.pipeline.packaging import completed, package
from workers.pipeline.progress import JobProgress
from workers.pipeline.runner import Outcome, StageRunner
from workers.pipeline.search import Found, Search
from workers.pipeline.select import BASELINE, Tried, Verdict, judge, undecided
from workers.pipeline.shape_checks import ShapeChecks

_WARM_UP_S = 1.0  # per engine and batch size, about
_LONGER, _MORE_ROUNDS = 3, 25  # of a measurement that has to tell a small gain from noise
_LONGEST_MIN_S = 600.0
_NO_ROOM = "not measured: the worker's memory does not hold it beside the others"
_EXPLAINED = 3 * WEIGHTS["build"] + 4.0 + WEIGHTS["sweep"] + WEIGHTS["profile"]  # weights, about
_LOOK_SHARE = 0.1  # of the time left, that a look at the confirming samples may take where that hardly holds the rest
_RESUMED_S = 10.0  # beside the final measurement: what is left at least to a job that is taken up again
_START_S = 2.0  # per engine: two processes, cold start


class Optimizer:
    """Takes one claimed job through the pipeline."""

    def __init__(
        self,
        runner: StageRunner,
        job: Job,
        model: SourceModel,
        datasets: Mapping[str, Dataset],
        backends: Sequence[kernel.BackendInfo],
        limits: LimitSettings,
    ) -> None:
        self.runner = runner
        self.job = job
        self.model = model
        self.spec = OptimizationSpec.model_validate(job.spec)
        self.device = device_of(self.spec, backends)
        known = kernel.backends()
        self.backends = {b.name: known[b.name]() for b in backends if self.device in b.devices}
        self.limits = limits
        self.budget = self._budget(runner.claim.spent_seconds)
        runner.view.progress = JobProgress(self.budget, job.progress)
        self.baseline_backend = baseline_backend(self.device)
        calibration_id = self.spec.calibration.dataset_id if self.spec.calibration else None
        judging_id = self.spec.validation.dataset_id or calibration_id
        calibration = _dataset_ref(calibration_id, datasets)
        validation = _dataset_ref(self.spec.validation.dataset_id, datasets)
        # One data set for both is split, sample by sample: what calibrates never judges.
        same = calibration is not None and validation in (None, calibration)
        shapes = {k: v.model_dump() for k, v in self.spec.shapes.items()} if self.spec.shapes else None
        judging = datasets[judging_id].samples if judging_id else 0
        calibrating = datasets[calibration_id].samples if calibration_id else 0
        profiles = spanned(self.spec.tensorrt.profiles or ())
        self.data = Data(calibration, validation or calibration, same, shapes, judging, calibrating, profiles)

    def _budget(self, spent: float) -> Budget:
        """The rest of it, where an earlier attempt was lost; always so much that something can be proven: what that one
        finished costs no time again."""
        seconds = float(self.spec.budget_seconds)
        least = min(self._final_seconds(2) + _RESUMED_S, seconds)
        return Budget(seconds, spent=min(spent, seconds - least))

    def run(self) -> Optimization:
        """What ships is proven and packaged first, then explained. Raises `StageFailure` where the job fails as a
        whole."""
        export = self._export()
        evaluator = Evaluator(self.runner, self.spec, export, self.data, self.budget, self.baseline_backend)
        proof = self._prove(export, evaluator)
        made, explanation = None, Explanation()
        if proof.verdict.picked is not None:
            self.runner.view.progress.enter("package", WEIGHTS["package"])
            made = package(self.runner, proof, self.data)
            self.runner.view.progress.enter("explain", _EXPLAINED)
            explanation = Explainer(proof, evaluator, self.backends, self.budget).explain()
            if explanation.deployment is not None:
                deployment = deployment_of(proof, explanation)
                made = completed(self.runner, proof, self.data, made, deployment, self.budget)
        return Optimization.of(proof, explanation=explanation, package=made, spent_seconds=self.budget.elapsed())

    def _prove(self, export: Outcome, evaluator: Evaluator) -> Proof:
        """Search, full measurement and verdict."""
        case = self._case(export)
        plan = planner.plan(case, self.backends)
        self.budget.share(self._final_seconds(4), export.outputs["model"].size_bytes)
        if self.budget.over(self.budget.end):
            raise self._too_small("the export")
        progress = self.runner.view.progress
        progress.enter("search", 6.0 * max(len(plan.candidates), 1))
        found = Search(case, plan, self.backends, evaluator, self.budget).run()
        progress.enter("final", self._final_weight(len(found.finalists)) + len(found.finalists))
        benchmark = self._shortly(evaluator, found) if found.out_of_reach else self._final(evaluator, found)
        baseline, verdict = self._judge(benchmark, found, found.finalists)
        wider = [r for r in found.finalists if undecided(self.spec, r.tried, verdict.primary_batch)]
        claims = verdict.unclaimed is None or _mostly_quiet(benchmark)  # else longer does not help
        if verdict.picked in (None, BASELINE) and wider and claims and self._time_for_more(benchmark, len(wider)):
            longer = self._final_again(evaluator, wider)
            if longer is not None:
                benchmark = longer
                baseline, verdict = self._judge(benchmark, found, wider)
        return Proof(
            job=self.job,
            model=self.model,
            spec=self.spec,
            case=case,
            hardware=self.runner.hardware,
            export=export,
            plan=plan,
            baseline=baseline,
            baseline_backend=self.baseline_backend,
            search=found,
            benchmark=benchmark,
            verdict=verdict,
            verdict_seconds=self.budget.elapsed(),
        )

    def _export(self) -> Outcome:
        extension = {"onnx": ".onnx", "pt2": ".pt2"}.get(self.model.format, _archive_suffix(self.model.filename))
        source = ArtifactRef((FileRef(f"source{extension}", self.model.sha256, self.model.size_bytes),))
        options = {
            "format": self.model.format,
            "shapes": self.data.shapes,
            "batch_axes": {n: i.batch_axis for n, i in self.spec.inputs.items()} if self.spec.inputs else None,
            "max_unpacked_bytes": self.limits.unpacked_bytes,
            "max_members": self.limits.archive_members,
            "max_ratio": self.limits.compression_ratio,
        }
        inputs = {"source": source}
        if self.data.validation is not None:
            inputs["data"] = self.data.validation  # the model is tried on what it is for
        _, hard = self.budget.limits(self.budget.end)
        try:
            return self.runner.run("export", inputs, options, weight=WEIGHTS["export"], seconds=hard)
        except StageFailure as failure:
            if failure.code == "timed_out" and self.budget.over(self.budget.end):
                raise self._too_small("the export") from failure
            raise

    def _case(self, export: Outcome) -> Case:
        structure = export.data["structure"]
        return Case(
            spec=self.spec,
            ops=structure["ops"],
            kind=structure["kind"],
            quantized=bool(structure.get("quantized")),
            size_bytes=export.outputs["model"].size_bytes,
            isa=self.runner.hardware.get("isa", ()),
            cores=int(self.runner.hardware.get("cores") or 1),
            hardware=self.runner.hardware,
            arithmetic=structure["arithmetic"],
            random=not export.data["checks"]["repeats_itself"]["passed"],
            has_calibration=self.data.calibration is not None,
            same_data=self.data.same,
        )

    # The full method for those that can still win

    def _final(self, evaluator: Evaluator, found: Found) -> Outcome:
        """Full validation of the finalists, then baseline and all that passed it side by side. Those that lose too much
        are timed too where nobody keeps the limit: their figures tell what a looser limit would buy."""
        until = self.budget.final_until()
        judged_until = self.budget.judged_until()
        hurried = self.budget.left(until) < self.budget.final_seconds
        spare = _LOOK_SHARE * self.budget.left(until) if hurried else math.inf
        confirm(self.spec, evaluator, found.finalists, judged_until, spare=spare)
        shapes = ShapeChecks(evaluator)
        for run in [r for r in found.finalists if r.tried.failed is None]:
            shapes.every_order(run, judged_until)
        sound = [r for r in found.finalists if r.tried.failed is None]
        sound = [r for r in sound if not (r.tried.accuracy or {"broken": True}).get("broken")]
        groups, too_large = evaluator.groups_that_fit(sound)
        ready = groups[0] if groups else []
        for run in [*too_large, *(r for group in groups[1:] for r in group)]:
            run.drop("final", _NO_ROOM)
        while True:
            try:
                seconds = self.spec.benchmark.min_seconds
                return evaluator.time(ready, until, min_seconds=seconds, screening=False, every_shape=True)
            except StageFailure as failure:
                if failure.code in NO_MEMORY and ready:
                    ready.pop().drop("final", _NO_ROOM)  # the last one: activations count, and are not known before
                elif failure.code == "timed_out" and self.budget.over(until):
                    raise self._too_small("the measurement of the original") from failure
                else:
                    raise

    def _shortly(self, evaluator: Evaluator, found: Found) -> Outcome:
        """The short timing that showed that nothing meets the constraints; or one of the original, where sizes did."""
        if found.timing is not None:
            return found.timing
        seconds = min(self.spec.benchmark.min_seconds, 1.0)
        return evaluator.time([], self.budget.final_until(), min_seconds=seconds, screening=True)

    def _judge(self, benchmark: Outcome, found: Found, measured: Sequence[CandidateRun]) -> tuple[Tried, Verdict]:
        figures = benchmark.data["engines"]
        baseline = Tried(BASELINE, "fp32", True, figures=figures[BASELINE])
        for run in measured:
            run.tried.figures = figures.get(run.plan.id)
        tried, told = [r.tried for r in found.runs], benchmark.data["disturbance"]
        return baseline, judge(self.spec, baseline, tried, benchmark.data["aa"], told)

    def _time_for_more(self, benchmark: Outcome, engines: int) -> bool:
        expected = _LONGER * max(benchmark.seconds, self._final_seconds(engines))
        return expected < self.budget.left(self.budget.final_until())

    def _final_again(self, evaluator: Evaluator, runs: Sequence[CandidateRun]) -> Outcome | None:
        """Once more, and longer, for those whose gain could not be told from noise. What was seen before does not
        count: to look again until something shines would find a gain where there is none."""
        for run in runs:
            run.note("final", "measured again", "its gain could not be told from noise")
        seconds = min(_LONGER * self.spec.benchmark.min_seconds, _LONGEST_MIN_S)
        until = self.budget.final_until()
        try:
            return evaluator.time(
                runs, until, min_seconds=seconds, screening=False, rounds=_MORE_ROUNDS, every_shape=True
            )
        except StageFailure as failure:
            if failure.code != "timed_out":
                raise
            return None

    def _final_seconds(self, engines: int) -> float:
        """What the last benchmark takes as the user asked for it: measuring, warming up and starting."""
        batches = len(self.spec.benchmark.batch_sizes)
        return (engines + 2) * (batches * (self.spec.benchmark.min_seconds * 1.2 + _WARM_UP_S) + _START_S)

    def _final_weight(self, engines: int) -> float:
        return 2.0 * (engines + 2)

    def _too_small(self, what: str) -> StageFailure:
        needs = int(2 * max(self.budget.elapsed(), self.spec.budget_seconds)) + int(self._final_seconds(2))
        return StageFailure(
            "budget_too_small",
            f"The budget of {self.spec.budget_seconds} s ended during {what}: nothing could be compared.",
            FailureKind.REQUEST,
            "export" if "export" in what else "benchmark",
            remedy=f"Give budget_seconds of {needs} or more, or a smaller benchmark.min_seconds.",
            cacheable=False,
        )


def _mostly_quiet(benchmark: Outcome) -> bool:
    """Whether little of it was disturbed: what it does not claim is for want of rounds, not for company."""
    told = benchmark.data["disturbance"]
    return bool(told["clean_windows"] > 4 * told["dropped_windows"])


def device_of(spec: OptimizationSpec, backends: Sequence[kernel.BackendInfo]) -> str:
    """Where the job's engines run: what it asks for, else a GPU where this worker has one that the job may use."""
    if spec.target.device != "auto":
        return spec.target.device
    usable = [b for b in backends if spec.target.backends is None or b.name in spec.target.backends]
    return "cuda" if any("cuda" in b.devices for b in usable) else "cpu"


def baseline_backend(device: str) -> str:
    """The original as its owner would run it on this device."""
    return "onnxruntime-cuda" if device == "cuda" else "onnxruntime"


def spanned(profiles: Sequence[Mapping[str, ShapeRange]]) -> dict[str, Any] | None:
    """The ranges that all of TensorRT's profiles span; the first one's most usual shapes."""
    found: dict[str, Any] = {}
    for name, first in (profiles[0] if profiles else {}).items():
        every = [p[name] for p in profiles if name in p and len(p[name].opt) == len(first.opt)]
        low, high = zip(*(r.min for r in every), strict=True), zip(*(r.max for r in every), strict=True)
        found[name] = {"min": [min(a) for a in low], "opt": first.opt, "max": [max(a) for a in high]}
    return found or None


def _archive_suffix(filename: str) -> str:
    lower = filename.lower()
    return next((s for s in (".tar.gz", ".tgz", ".tar", ".zip") if lower.endswith(s)), ".zip")


def _dataset_ref(dataset_id: str | None, datasets: Mapping[str, Dataset]) -> ArtifactRef | None:
    if dataset_id is None:
        return None
    row = datasets[dataset_id]
    suffix = ".npz" if row.format == "npz" else _archive_suffix(row.filename)
    return ArtifactRef((FileRef(f"data{suffix}", row.sha256, row.size_bytes),))
