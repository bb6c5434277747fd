"""Runs a search: asks the policy, has its requests answered, and keeps what the job needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.domain.failures import StageFailure
from workers.candidates import Candidate, Case
from workers.kernel import Backend, TensorSpec
from workers.measure.axes import batch_axes
from workers.measure.plan import expected_seconds
from workers.measure.shape_timing import SHARE
from workers.pipeline import training
from workers.pipeline.budget import Budget
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.evaluate import Evaluator
from workers.pipeline.planner import Plan
from workers.pipeline.shape_checks import ShapeChecks
from workers.pipeline.stage_calls import Outcome
from workers.search.crew import Crew
from workers.search.desk import Desk
from workers.search.policy import Policy
from workers.search.recording import Recorder
from workers.search.requests import Answer, Done, Refer, Request, Stopped, Subject
from workers.search.standings import Standings
from workers.search.state import CandidateState, Deadlines, Facts, Pair, SearchState


@dataclass
class Found:
    """What the search leaves: everybody who was considered, in the order they were tried, and the finalists."""

    runs: list[CandidateRun]
    finalists: list[CandidateRun]
    phases: list[dict[str, float | str | int]] = field(default_factory=list)
    exhausted: bool = False
    out_of_reach: bool = False  # nobody, the original included, can meet the constraints
    timing: Outcome | None = None  # the last short timing
    facts: Facts | None = None
    state: SearchState | None = None  # as the search ended

    @property
    def pair(self) -> Pair | None:
        """Two engines that shall answer together."""
        return None if self.state is None else self.state.pair

    def subject(self, run: CandidateRun) -> Subject:
        """As others are asked about it."""
        known = self.state.candidates if self.state else {}
        base = known[run.plan.id].base if run.plan.id in known else None
        return Subject(run.plan, known[base].plan if base else None)


class Search:
    """Of one job. `answer`: who answers its requests, if not this worker by itself. `crew`: whom it shares them with;
    what is out at its end stays out, as the job goes on. `recorder`: writes them down. `tell`: told what changed in how
    the candidates stand."""

    def __init__(
        self,
        case: Case,
        plan: Plan,
        backends: Mapping[str, Backend],
        evaluator: Evaluator,
        budget: Budget,
        *,
        answer: Callable[[Request], Answer] | None = None,
        crew: Crew | None = None,
        recorder: Recorder | None = None,
        tell: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.case = case
        self.plan = plan
        self.backends = backends
        self.evaluator = evaluator
        self.budget = budget
        self.desk = Desk(evaluator)
        self.answer = answer or self.desk.answer
        self.crew = crew
        self.recorder = recorder
        self.tell, self.standings = tell, Standings()
        self.facts = facts_of(case, evaluator)
        self.policy = Policy(self.facts, self._variants, self._final_seconds)

    def run(self) -> Found:
        deadlines = Deadlines(self.budget.seconds, self.budget.end, self.budget.make_until, self.budget.search_until)
        began = self.budget.elapsed()
        if self.recorder is not None:
            self.recorder.begins(self.facts, self.plan.candidates, deadlines, began)
        state = self.policy.begin(self.plan.candidates, deadlines, began)
        if self.crew is not None and self.facts.has_data:
            self.crew.beside(Refer(deadlines.end), apart=True)
        while True:
            asked = self.budget.elapsed()
            state, request = self.policy.advance(state, asked)
            self._follow(state)
            if isinstance(request, Stopped):
                raise StageFailure.from_json(dict(request.failure))
            if isinstance(request, Done):
                return self._found(state, request, asked)
            for done, answer in self._answered(state, request, asked):
                told = self.budget.elapsed()
                if self.recorder is not None:
                    self.recorder.told(done, answer, asked, told)
                state = self.policy.take(state, done, answer, told)

    def _answered(self, state: SearchState, request: Request, asked: float) -> list[tuple[Request, Answer]]:
        """The answer; with those to other requests of the phase, where others have made them."""
        if self.crew is None:
            return [(request, self.answer(request))]
        return self.crew.answer(request, self.policy.ahead(state, asked), self.budget.elapsed, self.answer)

    def _variants(self, plan: Candidate) -> Sequence[Candidate]:
        found = self.backends[plan.backend].variants(self.case, plan)
        if self.recorder is not None:
            self.recorder.has_variants(plan, found)
        return found

    def _final_seconds(self, calls_ms: Mapping[str, Mapping[int, float | None]]) -> float:
        spec = self.case.spec
        wants_p99 = spec.constraints.p99_latency_ms is not None
        seconds = expected_seconds(calls_ms, min_seconds=spec.benchmark.min_seconds, want_p99=wants_p99)
        if self.facts.free_axes:
            seconds /= 1 - SHARE
        if self.recorder is not None:
            self.recorder.final_takes(seconds)
        return seconds

    def _follow(self, state: SearchState) -> None:
        """What was decided counts for the job's own view of it, too."""
        self.budget.search_until = state.deadlines.search_until
        self.budget.final_seconds = state.deadlines.final_seconds or self.budget.final_seconds
        self.evaluator.apart = state.apart
        for found in state.candidates.values():
            self._write_down(found)
        if self.tell is not None and (news := self.standings.news(state)) is not None:
            self.tell(news)

    def _write_down(self, found: CandidateState) -> None:
        run = self.desk.run_of(found.plan)
        run.tried.failed, run.tried.missed, run.tried.shapes = found.refused, found.missed, found.shapes
        run.screened, run.screened_at = found.figures, found.figures_at
        run.history = [dict(note) for note in found.history]
        if run.failure is None and found.failure is not None:
            run.failure = StageFailure.from_json(dict(found.failure))
        if run.validate is None and found.accuracy is not None and found.of is not None:
            run.validate = self.desk.runs[found.of].validate  # of the same engine
        if run.tried.accuracy is None:
            run.tried.accuracy = found.accuracy

    def _found(self, state: SearchState, done: Done, now: float) -> Found:
        if self.recorder is not None:
            self.recorder.ends(done, now)
        found = Found(
            [self.desk.runs[cid] for cid in state.candidates],
            [self.desk.runs[cid] for cid in done.finalists],
            [dict(phase) for phase in state.phases],
            done.exhausted,
            done.out_of_reach,
            self.desk.timing,
            self.facts,
            state,
        )
        for run in found.finalists:  # where another worker made them
            self.desk.held(found.subject(run), self.budget.end)
        return found


def facts_of(case: Case, evaluator: Evaluator) -> Facts:
    data, export = evaluator.data, evaluator.export
    axes = batch_axes([TensorSpec(i["name"], i["dtype"], tuple(i["shape"])) for i in export.data["inputs"]])
    first = {spec["shape"][0] for spec in export.data["inputs"] if spec["shape"]}
    fixed: Any = first.pop() if len(first) == 1 else None
    trained = training.plan(case)
    return Facts(
        spec=case.spec,
        products=bool(case.has("MatMul", "Gemm")),
        has_calibration=case.has_calibration,
        has_data=data.validation is not None,
        judging=data.judging,
        calibrating=data.calibrating,
        same_data=data.same,
        original_bytes=export.outputs["model"].size_bytes,
        fixed_batch=fixed if isinstance(fixed, int) else None,
        free_axes=ShapeChecks(evaluator).free,
        memory_bytes=evaluator.memory_bytes(),
        batched=any(axis is not None for axis in axes.values()),
        training=trained.steps,
        training_samples=data.training_samples,
        training_instead=trained.instead,
    )
