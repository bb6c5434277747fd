"""The way of one job: export → search → full validation and benchmark of the finalists → verdict → package → what each
part gained, how to deploy. Each step is a keyed stage call, so that running this again after a crash goes on from the
last finished one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from app.db.orm import Dataset, Job, SourceModel
from app.domain.failures import StageFailure
from app.domain.spec import OptimizationSpec
from app.settings import LimitSettings
from workers import devices, kernel
from workers.artifacts import ONNX
from workers.candidates import Case
from workers.members import linker_of
from workers.pipeline import planner
from workers.pipeline.budget import Budget
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.chain import chained
from workers.pipeline.compatibility import asked, compatibility_of
from workers.pipeline.deployment import deployment_of
from workers.pipeline.evaluate import Evaluator
from workers.pipeline.explain import Explainer
from workers.pipeline.finals import Finals, final_seconds, too_small
from workers.pipeline.job_data import Data
from workers.pipeline.outcome import Explanation, Optimization, Proof
from workers.pipeline.packaging import completed, package
from workers.pipeline.progress import JobProgress
from workers.pipeline.runner import StageRunner
from workers.pipeline.source import source_ref
from workers.pipeline.stage_calls import Outcome
from workers.search import recording
from workers.search.calls import Call
from workers.search.crew import Crew
from workers.search.desk import Desk
from workers.search.driver import Search
from workers.search.requests import Examine

_RESUMED_S = 10.0  # beside the final measurement: what is left at least to a job that is taken up again


class Optimizer:
    """Takes one claimed job through the pipeline."""

    def __init__(
        self,
        runner: StageRunner,
        job: Job,
        models: Sequence[SourceModel],
        datasets: Mapping[str, Dataset],
        backends: Sequence[kernel.BackendInfo],
        limits: LimitSettings,
        searches_dir: Path | None = None,
        hardware: Mapping[str, Any] | None = None,
        tritonserver: Path | None = None,
        crew: Crew | None = None,
    ) -> None:
        """`models`: the job's, or those of its chain in order. `searches_dir`: where the search is recorded, if
        anywhere. `hardware`: that the job is for, if not this machine's. `tritonserver`: what bundles for it are tried
        in, if anything. `crew`: whom the job is shared with."""
        self.runner = runner
        self.job = job
        self.models = models
        self.spec = OptimizationSpec.model_validate(job.spec)
        self.hardware = runner.hardware if hardware is None else hardware
        self.device = device_of(self.spec, backends)
        known = kernel.backends()
        self.backends = {b.name: known[b.name]() for b in backends if self.device in b.devices}
        if self.spec.chain is not None and self.spec.chain.apart:
            linker = linker_of(self.device)
            self.backends[linker.name] = linker()
        self.offered = frozenset(b.name for b in backends)
        self.limits = limits
        self.searches_dir = searches_dir
        self.tritonserver = tritonserver
        self.crew = crew
        self.budget = self._budget(runner.claim.spent_seconds)
        runner.view.progress = JobProgress(self.budget, job.progress)
        self.baseline_backend = devices.named(self.device).baseline_backend
        self.data = Data.of(self.spec, datasets)
        self.chain: Outcome | None = None  # how its models are one, where they are several

    def _budget(self, spent: float) -> Budget:
        """The rest of it, where an earlier attempt was lost; always so much that something can be proven: what that one
        finished costs no time again."""
        seconds = float(self.spec.budget_seconds)
        least = min(final_seconds(self.spec, 2) + _RESUMED_S, seconds)
        budget = Budget(seconds, spent=min(spent, seconds - least))
        if self.spec.traffic is not None:
            budget.keep_for_traffic()
        return budget

    def run(self) -> Optimization:
        """What ships is proven and packaged first, then explained. Raises `StageFailure` where the job fails as a
        whole."""
        export = self._export()
        evaluator = self._evaluator(export)
        proof = self._prove(export, evaluator)
        made, explanation = None, Explanation()
        if proof.verdict.picked is not None:
            self.runner.view.progress.enter("package", _weight("package"))
            made = package(self.runner, proof, self.data, tritonserver=self.tritonserver)
            explained = 3 * _weight("build") + 4.0 + _weight("sweep") + _weight("profile")  # about
            explained += _weight("load_test") if self.spec.traffic is not None else 0.0
            self.runner.view.progress.enter("explain", explained)
            explanation = Explainer(proof, evaluator, self.backends, self.budget, made, self.crew).explain()
            if explanation.deployment is not None or explanation.load is not None:
                deployment = deployment_of(proof, explanation)
                made, lacks = completed(
                    self.runner, proof, self.data, made, deployment, self.budget, tritonserver=self.tritonserver
                )
                explanation = replace(explanation, bundle_lacks=lacks)
        told = compatibility_of(self.runner, export, self.offered, self.budget)
        spent = self.budget.elapsed()
        return Optimization.of(proof, explanation=explanation, package=made, spent_seconds=spent, compatibility=told)

    def build(self) -> None:
        """The engines of all candidates, for whoever takes the job: nothing is measured, and nothing ships. Raises
        `StageFailure` where the job itself would fail."""
        export = self._export()
        evaluator = self._evaluator(export)
        candidates = planner.plan(self._case(export), self.backends).candidates
        self.runner.view.progress.enter("search", 6.0 * max(len(candidates), 1))
        for candidate in candidates:
            if self.budget.over(self.budget.end):
                return
            evaluator.make(CandidateRun.of(candidate), self.budget.end)

    def answer(self, call: Call) -> None:
        """One call of this job's search, for the worker that has the job: what it makes is in storage afterwards.
        Raises `StageFailure` where the job itself would fail."""
        export = self._export()
        evaluator = self._evaluator(export)
        self.budget.share(final_seconds(self.spec, 4), export.outputs["model"].size_bytes)
        Desk(evaluator).answer(call.request)

    def _prove(self, export: Outcome, evaluator: Evaluator) -> Proof:
        """Search, full measurement and verdict."""
        case = self._case(export)
        plan = planner.plan(case, self.backends)
        self.budget.share(final_seconds(self.spec, 4), export.outputs["model"].size_bytes)
        if self.budget.over(self.budget.end):
            raise too_small(self.spec, self.budget, "the export", "export")
        progress = self.runner.view.progress
        progress.enter("search", 6.0 * max(len(plan.candidates), 1))
        recorder = recording.recorder(self.searches_dir, f"{self.job.id}-{self.job.fencing_token}")
        tell = partial(self.runner.tell, "candidates")
        if self.crew is not None:
            for name in asked(self.runner, self.offered):
                self.crew.beside(Examine(name, self.budget.end), apart=False)
        found = Search(
            case, plan, self.backends, evaluator, self.budget, crew=self.crew, recorder=recorder, tell=tell
        ).run()
        progress.enter("final", 2.0 * (len(found.finalists) + 2) + len(found.finalists))
        done = Finals(evaluator, found, self.crew).judged()
        return Proof(
            job=self.job,
            models=self.models,
            spec=self.spec,
            chain=self.chain,
            case=case,
            hardware=self.runner.hardware,
            export=export,
            plan=plan,
            baseline=done.baseline,
            baseline_backend=self.baseline_backend,
            search=found,
            benchmark=done.benchmark,
            verdict=done.verdict,
            verdict_seconds=self.budget.elapsed(),
        )

    def _evaluator(self, export: Outcome) -> Evaluator:
        return Evaluator(self.runner, self.spec, export, self.data, self.budget, self.baseline_backend, self.chain)

    def _export(self) -> Outcome:
        options = {
            "format": self.models[0].format,
            "shapes": self.data.shapes,
            "batch_axes": {n: i.batch_axis for n, i in self.spec.inputs.items()} if self.spec.inputs else None,
            "max_unpacked_bytes": self.limits.unpacked_bytes,
            "max_members": self.limits.archive_members,
            "max_ratio": self.limits.compression_ratio,
        }
        inputs = {"source": source_ref(self.models[0])}
        _, hard = self.budget.limits(self.budget.end)
        run = partial(self.runner.run, seconds=hard)
        try:
            if self.spec.chain is not None:
                self.chain = chained(run, self.models, self.spec, options, self.data.validation)
                inputs["source"], options["format"] = self.chain.of_kind(ONNX), "onnx"
            if self.data.validation is not None:
                inputs["data"] = self.data.validation  # the model is tried on what it is for
            return run("export", inputs, options)
        except StageFailure as failure:
            if failure.code == "timed_out" and self.budget.over(self.budget.end):
                raise too_small(self.spec, self.budget, "the export", "export") from failure
            raise

    def _case(self, export: Outcome) -> Case:
        structure = export.data["structure"]
        return Case(
            spec=self.spec,
            ops=structure["ops"],
            kind=structure["kind"],
            quantized=bool(structure.get("quantized")),
            size_bytes=export.outputs["model"].size_bytes,
            isa=self.hardware.get("isa", ()),
            cores=int(self.hardware.get("cores") or 1),
            hardware=self.hardware,
            arithmetic=structure["arithmetic"],
            random=not export.data["checks"]["repeats_itself"]["passed"],
            kinds=tuple(ref.kind for ref in export.outputs.values() if ref.kind is not None),
            has_calibration=self.data.calibration is not None,
            same_data=self.data.same,
            device=self.device,
        )


def _weight(stage: str) -> float:
    return kernel.stages()[stage].weight


def device_of(spec: OptimizationSpec, backends: Sequence[kernel.BackendInfo]) -> str:
    """Where the job's engines run: what it asks for, else the preferred one of this worker that the job may use."""
    if spec.target.device != "auto":
        return spec.target.device
    usable = [b for b in backends if spec.target.backends is None or b.name in spec.target.backends]
    return devices.preferred({d for b in usable for d in b.devices}).name
