"""The way of one job: export → candidates (simplify → quantize → build → validate) → benchmark → verdict → package →
report. Each step is a keyed stage call, so that running this again after a crash goes on from the last finished one."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from app.db.orm import Dataset, Job, SourceModel
from app.domain.artifact_key import ArtifactRef, FileRef
from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import OptimizationSpec
from app.settings import LimitSettings
from workers import kernel
from workers.candidates import Candidate, Case
from workers.pipeline import planner
from workers.pipeline.runner import Outcome, StageRunner
from workers.pipeline.select import BASELINE, Tried, Verdict, judge

log = structlog.get_logger(__name__)

_SEED = 20_240_229
_LEAST_STAGE_S = 60.0
_LOADED_FACTOR = 1.6  # memory of a loaded engine over the size of its file: weights, packed copies of some, activations
_WEIGHTS = {"export": 2.0, "simplify": 1.0, "quantize": 2.0, "build": 1.0, "validate": 1.0, "package": 1.0}


@dataclass
class CandidateRun:
    """A planned candidate and how far it came."""

    plan: Candidate
    tried: Tried
    graph: Outcome | None = None
    build: Outcome | None = None
    validate: Outcome | None = None
    steps: list[Outcome] = field(default_factory=list)
    failure: StageFailure | None = None


@dataclass
class Optimization:
    """Everything that a job found out; the report and the manifest are made from it."""

    job: Job
    model: SourceModel
    spec: OptimizationSpec
    hardware: Mapping[str, Any]
    export: Outcome
    plan: planner.Plan
    baseline: Tried
    runs: list[CandidateRun]
    benchmark: Outcome
    verdict: Verdict
    budget_exhausted: bool
    package: Outcome | None = None

    @property
    def picked(self) -> CandidateRun | None:
        """The winning candidate; None where the baseline (or nothing) ships."""
        return next((r for r in self.runs if r.plan.id == self.verdict.picked), None)


class Optimizer:
    """Takes one claimed job through the pipeline."""

    def __init__(
        self,
        runner: StageRunner,
        job: Job,
        model: SourceModel,
        datasets: Mapping[str, Dataset],
        backends: list[str],
        limits: LimitSettings,
    ) -> None:
        self.runner = runner
        self.job = job
        self.model = model
        self.spec = OptimizationSpec.model_validate(job.spec)
        self.backends = backends
        self.limits = limits
        self.started = time.monotonic()
        self.calibration = _dataset_ref(self.spec.calibration.dataset_id if self.spec.calibration else None, datasets)
        validation = _dataset_ref(self.spec.validation.dataset_id, datasets)
        # One data set for both is split, sample by sample: what calibrates never judges.
        self.same_data = self.calibration is not None and validation in (None, self.calibration)
        self.validation = validation or self.calibration
        self.shapes = {k: v.model_dump() for k, v in self.spec.shapes.items()} if self.spec.shapes else None

    def run(self) -> Optimization:
        """All stages up to the package. Raises `StageFailure` where the job fails as a whole."""
        export = self._export()
        known = kernel.backends()
        plan = planner.plan(self._case(export), {name: known[name]() for name in self.backends})
        self._plan_progress(plan)
        runs = [CandidateRun(c, Tried(c.id, c.precision, c.lossless)) for c in plan.candidates]
        exhausted = False
        for run in runs:
            if self._out_of_budget(1 + sum(r.build is not None for r in runs)):
                exhausted = True
                run.tried.failed = f"the budget of {self.spec.budget_seconds} s left no time for it"
                continue
            self._try_candidate(run, export)
        benchmark = self._benchmark(export, runs)
        figures = benchmark.data["engines"]
        baseline = Tried(BASELINE, "fp32", True, figures=figures[BASELINE])
        for run in runs:
            run.tried.figures = figures.get(run.plan.id)
        verdict = judge(self.spec, baseline, [r.tried for r in runs], benchmark.data["aa"])
        found = Optimization(
            self.job,
            self.model,
            self.spec,
            self.runner.hardware,
            export,
            plan,
            baseline,
            runs,
            benchmark,
            verdict,
            exhausted,
        )
        if verdict.picked is not None:
            found.package = self._package(found)
        return found

    def _export(self) -> Outcome:
        extension = {"onnx": ".onnx", "pt2": ".pt2"}.get(self.model.format, _archive_suffix(self.model.filename))
        source = ArtifactRef((FileRef(f"source{extension}", self.model.sha256, self.model.size_bytes),))
        return self.runner.run(
            "export",
            {"source": source},
            {
                "format": self.model.format,
                "shapes": self.shapes,
                "max_unpacked_bytes": self.limits.unpacked_bytes,
                "max_members": self.limits.archive_members,
                "max_ratio": self.limits.compression_ratio,
            },
            weight=_WEIGHTS["export"],
            seconds=self._stage_seconds(),
        )

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
            has_calibration=self.calibration is not None,
            same_data=self.same_data,
        )

    def _plan_progress(self, plan: planner.Plan) -> None:
        per_candidate = [
            sum(_WEIGHTS[s.stage] for s in c.steps) + _WEIGHTS["build"] + _WEIGHTS["validate"] for c in plan.candidates
        ]
        self.runner.view.planned = (
            _WEIGHTS["export"] + sum(per_candidate) + self._benchmark_weight(len(plan.candidates)) + _WEIGHTS["package"]
        )

    def _benchmark_weight(self, candidates: int) -> float:
        return 2.0 * (candidates + 2)

    def _benchmark_seconds(self, engines: int) -> float:
        """What the benchmark is expected to take: measuring, warming up and starting, per engine and batch size."""
        batches = len(self.spec.benchmark.batch_sizes)
        return (engines + 2) * (batches * (self.spec.benchmark.min_seconds * 1.2 + 1) + 2)

    def _stage_seconds(self) -> float:
        """How long one stage call may take: a model that hangs must not outlast the budget by far, and a small budget
        must not break what is only slow to start."""
        return max(_LEAST_STAGE_S, float(self.spec.budget_seconds))

    def _out_of_budget(self, engines: int) -> bool:
        elapsed = time.monotonic() - self.started
        return elapsed + self._benchmark_seconds(engines) > self.spec.budget_seconds

    def _try_candidate(self, run: CandidateRun, export: Outcome) -> None:
        """Build and validate one candidate. Its failure is its own; only infrastructure ends the job."""
        try:
            graph = export
            for step in run.plan.steps:
                inputs = {"model": graph.outputs["model"]}
                if "calibration" in step.extra and self.calibration is not None:
                    inputs["calibration"] = self.calibration
                graph = self._call(run, step.stage, inputs, {**step.options, "shapes": self.shapes})
            run.graph = graph
            build_options = {**run.plan.build_options, **({"shapes": self.shapes} if self.shapes else {})}
            options = {"backend": run.plan.backend, "options": build_options}
            run.build = self._call(run, "build", {"model": graph.outputs["model"]}, options)
            inputs = {"model": export.outputs["model"], "engine": run.build.outputs["engine"]}
            if self.validation is not None:
                inputs["data"] = self.validation
                if self.calibration is not None and not self.same_data:
                    inputs["calibration"] = self.calibration  # its samples are left out of the judgement
            run.validate = self._call(run, "validate", inputs, self._validate_options(run))
            run.tried.accuracy = run.validate.data
        except StageFailure as failure:
            if failure.kind in (FailureKind.INFRASTRUCTURE, FailureKind.DATA, FailureKind.REQUEST):
                raise  # not this candidate's fault: the machine, or what the user sent, has to be mended first
            run.failure = failure
            run.tried.failed = f"{failure.stage}: {failure.detail}"

    def _call(
        self, run: CandidateRun, stage: str, inputs: Mapping[str, ArtifactRef], options: Mapping[str, Any]
    ) -> Outcome:
        outcome = self.runner.run(
            stage,
            inputs,
            options,
            candidate=run.plan.id,
            weight=_WEIGHTS[stage],
            seconds=self._stage_seconds(),
        )
        run.steps.append(outcome)
        return outcome

    def _validate_options(self, run: CandidateRun) -> dict[str, Any]:
        assert run.build is not None
        return {
            "backend": run.plan.backend,
            "runtime": run.build.data["runtime"],
            "metric": self.spec.validation.metric,
            "max_samples": self.spec.validation.max_samples,
            "part": "validation" if self.same_data else "all",
            "shapes": self.shapes,
            "seed": _SEED,
        }

    def _benchmark(self, export: Outcome, runs: list[CandidateRun]) -> Outcome:
        """Baseline and all built candidates side by side; those that lost too much accuracy too, since their figures
        tell the user what a looser limit would buy. What is broken is not timed."""
        ready = [r for r in runs if r.build is not None and not (r.tried.accuracy or {"broken": True}).get("broken")]
        ready = self._that_fit(ready, export.outputs["model"].size_bytes)
        inputs = {"baseline": export.outputs["model"]}
        engines = []
        for run in ready:
            assert run.build is not None
            inputs[f"engine.{run.plan.id}"] = run.build.outputs["engine"]
            engines.append({"id": run.plan.id, "backend": run.plan.backend, "runtime": run.build.data["runtime"]})
        if self.validation is not None:
            inputs["data"] = self.validation
        options = {
            "engines": engines,
            "batch_sizes": self.spec.benchmark.batch_sizes,
            "min_seconds": self.spec.benchmark.min_seconds,
            "shapes": self.shapes,
            "want_p99": self.spec.constraints.p99_latency_ms is not None,
            "seed": _SEED,
        }
        # Nothing ships without it: it may take what it needs, and is ended only where it clearly hangs.
        seconds = max(self._stage_seconds(), 5 * self._benchmark_seconds(len(engines)))
        return self.runner.run("benchmark", inputs, options, weight=self._benchmark_weight(len(runs)), seconds=seconds)

    def _that_fit(self, ready: list[CandidateRun], baseline_bytes: int) -> list[CandidateRun]:
        """All engines are kept loaded side by side, the baseline twice. Where memory does not hold them, the largest
        are left out (seldom the fastest) and the report says so."""
        room = self.runner.limits.memory_bytes - 2 * baseline_bytes * _LOADED_FACTOR
        kept: list[CandidateRun] = []
        for run in sorted(ready, key=_engine_bytes):
            room -= _engine_bytes(run) * _LOADED_FACTOR
            if room >= 0:
                kept.append(run)
            else:
                run.tried.failed = "not measured: the worker's memory does not hold it beside the others"
        return [run for run in ready if run in kept]

    def _package(self, found: Optimization) -> Outcome:
        picked = found.picked
        if picked is not None and picked.build is not None:
            engine, backend = picked.build.outputs["engine"], picked.plan.backend
            runtime, precision = picked.build.data["runtime"], picked.plan.precision
            engine_format = picked.build.data["engine_format"]
        else:
            engine, backend, runtime, engine_format = found.export.outputs["model"], "onnxruntime", {}, "onnx"
            precision = baseline_precision(found)
        inputs = {"engine": engine}
        if self.validation is not None:
            inputs["data"] = self.validation
        manifest = {
            "engine": {
                "candidate": found.verdict.picked,
                "backend": backend,
                "format": engine_format,
                "precision": precision,
                "runtime": runtime,
                "files": engine.to_json(),
            },
            "model": {"name": self.model.name, "sha256": self.model.sha256},
            "inputs": found.export.data["inputs"],
            "outputs": found.export.data["outputs"],
            "hardware": dict(self.runner.hardware),
            "versions": picked.build.libraries if picked and picked.build else found.benchmark.libraries,
        }
        options = {
            "name": f"{slug(self.model.name)}-{precision}",
            "backend": backend,
            "runtime": runtime,
            "engine_format": engine_format,
            "manifest": manifest,
            "shapes": self.shapes,
            "seed": _SEED,
        }
        return self.runner.run("package", inputs, options, weight=_WEIGHTS["package"], seconds=self._stage_seconds())


def _engine_bytes(run: CandidateRun) -> int:
    assert run.build is not None
    return run.build.outputs["engine"].size_bytes


def baseline_precision(found: Optimization) -> str:
    return "int8" if found.export.data["structure"].get("quantized") else "fp32"


def slug(name: str) -> str:
    """A file name's stem that is safe everywhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "model"


def _archive_suffix(filename: str) -> str:
    lower = filename.lower()
    return next((s for s in (".tar.gz", ".tgz", ".tar", ".zip") if lower.endswith(s)), ".zip")


def _dataset_ref(dataset_id: str | None, datasets: Mapping[str, Dataset]) -> ArtifactRef | None:
    if dataset_id is None:
        return None
    row = datasets[dataset_id]
    suffix = ".npz" if row.format == "npz" else _archive_suffix(row.filename)
    return ArtifactRef((FileRef(f"data{suffix}", row.sha256, row.size_bytes),))
