"""What a job found: first what is proven (`Proof`), then what explains it (`Explanation`), then both as one value that
the report and the manifest are made from. Each is built once and frozen: who explains cannot change what was proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from app.db.orm import Job, SourceModel
from app.domain.artifact_key import ArtifactRef
from app.domain.spec import OptimizationSpec
from workers.candidates import Case
from workers.pipeline.ablation import Part
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.pairs import PairRun
from workers.pipeline.planner import RANDOM, Plan
from workers.pipeline.select import Tried, Verdict
from workers.pipeline.stage_calls import Outcome
from workers.search.driver import Found


@dataclass(frozen=True)
class Ablated:
    """One part of the shipped engine. `figures`: of the engine without it, compared with the shipped one in the same
    run. `accuracy`: of the engine without it. `reason`: why there are no figures."""

    part: Part
    run: CandidateRun | None = None
    figures: Mapping[str, Any] | None = None
    accuracy: Mapping[str, Any] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Proof:
    """What ships, and the evidence for it. `models`: the job's, or those of its chain, with the call that made one of
    them (`chain`). `verdict_seconds`: of the budget, until it was known."""

    job: Job
    models: Sequence[SourceModel]
    spec: OptimizationSpec
    chain: Outcome | None
    case: Case
    hardware: Mapping[str, Any]
    export: Outcome
    plan: Plan
    baseline: Tried
    baseline_backend: str
    search: Found
    benchmark: Outcome
    verdict: Verdict
    verdict_seconds: float

    @property
    def model(self) -> SourceModel:
        """The first one."""
        return self.models[0]

    @property
    def name(self) -> str:
        """Of the model, or of all of the chain."""
        return " then ".join(model.name for model in self.models)

    @property
    def runs(self) -> list[CandidateRun]:
        """Everybody who was considered, in the order of trying."""
        return self.search.runs

    @property
    def picked(self) -> CandidateRun | None:
        """The winning candidate; None where the baseline (or nothing) ships."""
        return next((r for r in self.runs if r.plan.id == self.verdict.picked), None)

    @property
    def explained(self) -> CandidateRun | None:
        """The candidate whose parts are told: of two engines in one bundle the one that answers at the batch size that
        counts."""
        if isinstance(self.picked, PairRun):
            return self.picked.answers(int(self.verdict.primary_batch)).run
        return self.picked

    @property
    def warnings(self) -> list[str]:
        """What makes figures of this job worthless: company on the machine; and of the data, seen by whoever was judged
        on them."""
        seen = [(r.tried.accuracy or {}).get("warnings") or r.selected.get("warnings") or [] for r in self.runs]
        own = [f"Nothing was tried, and the original ships: {RANDOM}. Export it in evaluation mode."]
        told = [*(own if self.case.random else []), *self._unclaimed()]
        return list(dict.fromkeys([*told, *(warning for warnings in seen for warning in warnings)]))

    def _unclaimed(self) -> list[str]:
        if self.verdict.picked is None or self.verdict.unclaimed is None:
            return []
        ships = "the original ships" if self.picked is None else f"{self.picked.plan.name} ships unproven"
        instead = ", or let `benchmark.allow_noisy` ship what looks the fastest" if self.picked is None else ""
        why = self.verdict.unclaimed
        return [f"No speed-up is claimed, {ships}: {why}. Submit the job again on a quiet machine{instead}."]

    @property
    def engine(self) -> ArtifactRef:
        """The files that ship."""
        return self.picked.engine if self.picked else self.export.outputs["model"]

    @property
    def judged_digest(self) -> str:
        """Of the files whose accuracy was judged, as the stage saw them; the original is right by itself."""
        return self.picked.judged_digest if self.picked else self.engine.digest

    @property
    def runtime(self) -> dict[str, Any]:
        """What they are loaded with."""
        return self.picked.runtime if self.picked else {}

    @property
    def backend(self) -> str:
        return self.picked.plan.backend if self.picked else self.baseline_backend

    @property
    def precision(self) -> str:
        return self.picked.plan.precision if self.picked else self.original_precision

    @property
    def original_precision(self) -> str:
        return "int8" if self.export.data["structure"].get("quantized") else "fp32"


@dataclass(frozen=True)
class Explanation:
    """What each part of the engine gained, how to run it, and where its time goes; `load`: how it serves the job's
    traffic; `cold`: how long it takes to its first answer there. `reasons`: why a part of this is missing, by its name
    (`ablation`, `deployment`, `profile`, `traffic`, `cold_start`). `bundle_lacks`: why the bundle that ships does not
    hold the deployment that was found; None where it does."""

    ablation: tuple[Ablated, ...] = ()
    deployment: Outcome | None = None
    profile: Outcome | None = None
    load: Outcome | None = None
    cold: Outcome | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    bundle_lacks: str | None = None


@dataclass(frozen=True)
class Optimization(Proof):
    """All of it. `package`: the engine's file and its bundle; None where nothing ships. `spent_seconds`: of the
    budget. `compatibility`: `workers.pipeline.compatibility`."""

    explanation: Explanation
    package: Outcome | None
    spent_seconds: float
    compatibility: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(
        cls,
        proof: Proof,
        *,
        explanation: Explanation,
        package: Outcome | None,
        spent_seconds: float,
        compatibility: Sequence[Mapping[str, Any]] = (),
    ) -> Optimization:
        proven = {f.name: getattr(proof, f.name) for f in fields(proof)}
        return cls(
            **proven,
            explanation=explanation,
            package=package,
            spent_seconds=spent_seconds,
            compatibility=compatibility,
        )


def nodes_kept(run: CandidateRun | None) -> list[str]:
    """Names of the nodes that the quantization left in higher precision because they were asked or found to be kept."""
    if run is None:
        return []
    steps = (s for part in run.parts for s in part.plan.steps)
    return sorted({str(n) for s in steps for n in s.options.get("exclude_nodes", ())})
