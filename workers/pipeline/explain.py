"""After the engine is proven and packaged: how its bundle serves the job's traffic, where there is one; what each part
of it gained and cost (measured by leaving it out), how to run it (batch size, instances, threads), and where its time
goes. They use what is left of the budget.

Values come back, nothing that was proven is touched, and nothing that happens here fails the job: a profiler that
crashes, a GPU without memory, a child that is lost become reasons in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.domain.artifact_key import ArtifactRef
from app.domain.failures import StageFailure
from app.jobs.ledger import LeaseLost
from workers.kernel import Backend, stages
from workers.pipeline.ablation import Part, alone, parts
from workers.pipeline.budget import LEAST_EXPLAINED_S, Budget
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.evaluate import SEED, Evaluator
from workers.pipeline.isolated import Interrupted
from workers.pipeline.outcome import Ablated, Explanation, Proof
from workers.pipeline.stage_calls import Outcome
from workers.search.crew import Crew
from workers.search.requests import Ahead, Answer, Judge, Request, Subject, subjects_of

log = structlog.get_logger(__name__)

_ABLATION_SHARE = 0.5  # of what the budget leaves; the sweep gets the rest
_ABLATION_SECONDS = 1.0  # per engine, at the batch size of the final metrics
_TRAFFIC_SHARE = 0.75  # of what the budget leaves, where there is traffic
_COLD_SHARE = 0.5  # of what is left then, likewise
_MOST_COLD_S = 60.0
_SWEEP_SECONDS = 1.0  # per configuration
_BATCHES = (1, 2, 4, 8, 16, 32)
_OURS_TO_END = (LeaseLost, Interrupted, SQLAlchemyError)  # these say that the job is not ours to go on with

T = TypeVar("T")


class Explainer:
    """Of one proven job."""

    def __init__(
        self,
        proof: Proof,
        evaluator: Evaluator,
        backends: Mapping[str, Backend],
        budget: Budget,
        made: Outcome | None = None,
        crew: Crew | None = None,
    ) -> None:
        """`made`: the package of what ships. `crew`: whom the making of what is compared with is shared with."""
        self.made, self.crew = made, crew
        self.proof = proof
        self.evaluator = evaluator
        self.backends = backends
        self.budget = budget
        self._reasons: dict[str, str] = {}

    def explain(self) -> Explanation:
        load = self._try("traffic", self._load)
        cold = self._try("cold_start", lambda: self._cold_start(load))
        ablation = self._try("ablation", self._ablation) or ()
        deployment = self._try("deployment", self._sweep)
        profile = self._try("profile", self._profile)
        return Explanation(tuple(ablation), deployment, profile, load, cold, dict(self._reasons))

    def _try(self, name: str, work: Callable[[], T]) -> T | None:
        """Its result, or None with the reason kept."""
        try:
            return work()
        except _OURS_TO_END:
            raise
        except StageFailure as failure:
            log.warning("not_explained", part=name, code=failure.code, detail=failure.detail)
            self._reasons[name] = f"not measured: {failure.detail}"
        except Exception:  # a fault of ours, and the engine is proven all the same
            log.exception("not_explained", part=name)
            self._reasons[name] = "not measured: an internal error"
        return None

    def _no_time(self, name: str) -> bool:
        if self.budget.left(self.budget.end) >= LEAST_EXPLAINED_S:
            return False
        self._reasons[name] = f"not measured: the budget of {self.proof.spec.budget_seconds} s left no time for it"
        return True

    # How its bundle serves

    def _load(self) -> Outcome | None:
        """The job's traffic, on the bundle that ships and on the original."""
        traffic = self.proof.spec.traffic
        self.budget.give_back()
        if traffic is None or self.made is None or self._no_time("traffic"):
            return None
        inputs = {"bundle": self.made.outputs["bundle"], "original": self.proof.export.outputs["model"]}
        if self.evaluator.data.validation is not None:
            inputs["data"] = self.evaluator.data.validation
        options = {
            "traffic": traffic.model_dump(mode="json"),
            "backend": self.proof.backend,
            "runtime": self.proof.runtime,
            "baseline_backend": self.proof.baseline_backend,
            "shapes": self.evaluator.data.shapes,
            "seed": SEED,
        }
        until = self.budget.elapsed() + _TRAFFIC_SHARE * self.budget.left(self.budget.end)
        return self.evaluator.call("load_test", inputs, options, self.proof.verdict.picked, until)

    def _cold_start(self, load: Outcome | None) -> Outcome | None:
        """From nothing to the first answer, of a bundle that is to serve traffic."""
        if self.proof.spec.traffic is None or self.made is None or self._no_time("cold_start"):
            return None
        options = {
            "backend": self.proof.backend,
            "runtime": self.proof.runtime,
            "serving": None if load is None else load.data["serving"]["settings"],
        }
        until = self.budget.elapsed() + min(_COLD_SHARE * self.budget.left(self.budget.end), _MOST_COLD_S)
        inputs = {"bundle": self.made.outputs["bundle"]}
        return self.evaluator.call("cold_start", inputs, options, self.proof.verdict.picked, until)

    # What each part gained

    def _ablation(self) -> Sequence[Ablated]:
        """Each part of the picked candidate with the engine that lacks it, timed beside the picked one."""
        picked = self.proof.explained
        if picked is None:
            return ()
        until = self.budget.elapsed() + _ABLATION_SHARE * self.budget.left(self.budget.end)
        others = [r.plan for r in self.proof.runs if r.build is not None]
        defaults = dict(self.backends[alone(picked.plan).backend].plain_runtime)
        wanted = parts(picked.plan, others, defaults, self.proof.baseline_backend)
        tried = self._all_without(wanted, picked, until)
        made = [item.run for item in tried.values() if item.run is not None]
        if made:
            tried = dict(enumerate(self._timed(picked, [tried[i] for i in range(len(wanted))], made, until)))
        return [tried[i] for i in range(len(wanted))]

    def _all_without(self, wanted: Sequence[Part], picked: CandidateRun, until: float) -> dict[int, Ablated]:
        """By position; what matters the most is made first."""
        order = sorted(range(len(wanted)), key=lambda i: _urgency(wanted[i]))
        if self.crew is None or self.budget.left(until) < LEAST_EXPLAINED_S:
            return {i: self._without(wanted[i], until) for i in order}
        tried: dict[int, Ablated] = {}
        asked: list[Ahead] = []
        by_id: dict[str, int] = {}
        base, apart, samples = self.proof.search.subject(picked).base, self.evaluator.apart, self._samples()
        for i in order:
            plan = wanted[i].without
            if plan is None:
                tried[i] = self._without(wanted[i], until)
            else:
                by_id[plan.id] = i
                asked.append(Ahead(Judge(Subject(plan, base), samples, apart, until), sure=True))

        def make(request: Request) -> Answer:
            (subject,) = subjects_of(request)
            i = by_id[subject.id]
            tried[i] = self._without(wanted[i], until)
            return {}

        self.crew.answer_all(asked, self.budget.elapsed, make)
        return tried

    def _without(self, part: Part, until: float) -> Ablated:
        """The engine without this part, built and judged."""
        if part.without is None:
            return Ablated(part, reason=part.reason)
        run = CandidateRun.of(part.without)
        if self.budget.left(until) < LEAST_EXPLAINED_S:
            left = f"not measured: the budget of {self.proof.spec.budget_seconds} s left no time for it"
            return Ablated(part, reason=left)
        try:
            if not self.evaluator.make(run, until):
                return Ablated(part, reason=f"the engine without it could not be built: {run.tried.failed}")
            if not self.evaluator.check(run, self._samples(), until):
                why = run.tried.failed or "its outputs are broken"
                return Ablated(part, reason=f"the engine without it does not work: {why}")
        except StageFailure as failure:
            return Ablated(part, reason=f"not measured: {failure.detail}")
        return Ablated(part, run, accuracy=run.tried.accuracy)

    def _samples(self) -> int:
        """As many as judged the picked one: the difference is then between like and like."""
        picked = self.proof.explained
        validate = picked.validate if picked else None
        return int(validate.options["max_samples"]) if validate else self.proof.spec.validation.max_samples

    def _timed(
        self, picked: CandidateRun, items: Sequence[Ablated], made: Sequence[CandidateRun], until: float
    ) -> list[Ablated]:
        groups, _ = self.evaluator.groups_that_fit([picked, *made])
        side_by_side = groups[0] if groups and picked in groups[0] else [picked]
        try:
            timed = self.evaluator.time(
                side_by_side,
                until,
                min_seconds=min(_ABLATION_SECONDS, self.proof.spec.benchmark.min_seconds),
                screening=True,
                compare_to=picked.plan.id,
                batch_sizes=[int(self.proof.verdict.primary_batch)],
            )
        except StageFailure as failure:
            return [replace(i, reason=i.reason or f"not measured: {failure.detail}") for i in items]
        engines = timed.data["engines"]
        return [replace(i, figures=engines.get(i.run.plan.id)) if i.run is not None else i for i in items]

    # How to run it, and what it waits for

    def _sweep(self) -> Outcome | None:
        """Batch sizes × instances × threads of what ships."""
        if self._no_time("deployment"):
            return None
        spec, proof = self.proof.spec, self.proof
        # Who wants the lowest latency has named the batch sizes; throughput and cost may lie beyond them.
        more = _BATCHES if proof.export.data.get("dynamic_batch") and spec.objective != "latency" else ()
        options = {
            "backend": proof.backend,
            "runtime": proof.runtime,
            "batch_sizes": sorted({*spec.benchmark.batch_sizes, *more}),
            "min_seconds": min(_SWEEP_SECONDS, spec.benchmark.min_seconds),
            "p99_limit_ms": spec.constraints.p99_latency_ms,
            "min_throughput_qps": spec.constraints.min_throughput_qps,
            "max_memory_mb": spec.constraints.max_memory_mb,
            "batch": spec.benchmark.batch_sizes[0],
            "objective": spec.objective,
            "shapes": self.evaluator.data.shapes,
            "seed": SEED,
        }
        return self._of_what_ships("sweep", options)

    def _profile(self) -> Outcome | None:
        """Layer by layer, and against the machine's memory bandwidth."""
        if self._no_time("profile"):
            return None
        of = self.proof.explained
        options = {
            "backend": of.plan.backend if of else self.proof.backend,
            "runtime": of.runtime if of else self.proof.runtime,
            "batch": int(self.proof.verdict.primary_batch),
            "shapes": self.evaluator.data.shapes,
            "seed": SEED,
        }
        return self._of_what_ships("profile", options, of.engine if of else None)

    def _of_what_ships(self, stage: str, options: Mapping[str, object], engine: ArtifactRef | None = None) -> Outcome:
        """`engine`: one of two in the bundle."""
        inputs = {"engine": engine or self.proof.engine}
        if self.evaluator.data.validation is not None:
            inputs["data"] = self.evaluator.data.validation
        return self.evaluator.call(stage, inputs, options, self.proof.verdict.picked, self.budget.end)


def _urgency(part: Part) -> int:
    """Where the time does not hold all of them, what usually matters most is measured: it comes first."""
    if part.stage is None:  # the backend, its runtime options, nodes kept
        return 1
    return 0 if stages()[part.stage].rounds else 2
