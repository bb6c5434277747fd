"""The full method for the finalists: their accuracy on samples that nobody chose by, everybody timed side by side with
the original, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import OptimizationSpec
from workers.pipeline.budget import Budget
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.checking import confidence_of_each, confirm
from workers.pipeline.checks import Check, accuracy_checks
from workers.pipeline.evaluate import Evaluator
from workers.pipeline.pairs import together
from workers.pipeline.select import Tried, Verdict, judge, undecided
from workers.pipeline.shape_checks import ShapeChecks
from workers.pipeline.stage_calls import Outcome
from workers.search.crew import Crew
from workers.search.driver import Found
from workers.search.limits import NO_MEMORY
from workers.search.objective import BASELINE
from workers.search.requests import Ahead, Answer, Confirm, Request, subjects_of
from workers.search.sparing import spared

_WARM_UP_S = 1.0  # per engine and batch size, about
_START_S = 2.0  # per engine: two processes, cold start
_LONGER, _MORE_ROUNDS = 3, 25  # of a measurement that has to tell a small gain from noise
_LONGEST_MIN_S = 600.0
_NO_ROOM = "not measured: the worker's memory does not hold it beside the others"
_LOOK_SHARE = 0.1  # of the time left, that a look at the confirming samples may take where that hardly holds the rest


@dataclass(frozen=True)
class Judged:
    """`benchmark`: the measurement that the verdict goes by."""

    benchmark: Outcome
    baseline: Tried
    verdict: Verdict


class Finals:
    """Of one job."""

    def __init__(self, evaluator: Evaluator, found: Found, crew: Crew | None = None) -> None:
        """`crew`: whom what does not measure is shared with; it is over when the first measurement begins."""
        self.evaluator = evaluator
        self.crew = crew
        self.spec = evaluator.spec
        self.budget = evaluator.budget
        self.found = found
        self._sure = 1.0  # of each look at the samples that confirm
        self._pairs: list[CandidateRun] = []
        self._spared: list[CandidateRun] = []  # finalists that need no full measurement, so far

    def judged(self) -> Judged:
        found = self.found
        first = self._shortly() if found.out_of_reach else self._measured()
        done = self._verdict(first, [*found.finalists, *self._pairs])
        if _nothing_ships(done) and self._spared and done.verdict.unclaimed is None:
            runs, timed = self._after_all()
            done = self._verdict(timed, runs) if timed is not None else done
        everybody = [*found.finalists, *self._pairs]
        wider = [r for r in everybody if undecided(self.spec, r.tried, done.verdict.primary_batch)]
        claims = done.verdict.unclaimed is None or _mostly_quiet(done.benchmark)  # else longer does not help
        if _nothing_ships(done) and wider and claims and self._time_for_more(done.benchmark, len(wider)):
            timed = self._longer(wider)
            done = self._verdict(timed, wider) if timed is not None else done
        return done

    def _verdict(self, benchmark: Outcome, measured: Sequence[CandidateRun]) -> Judged:
        figures = benchmark.data["engines"]
        baseline = Tried(BASELINE, "fp32", True, figures=figures[BASELINE])
        for run in measured:
            run.tried.figures = figures.get(run.plan.id)
        tried, told = [r.tried for r in self.found.runs], benchmark.data["disturbance"]
        return Judged(benchmark, baseline, judge(self.spec, baseline, tried, benchmark.data["aa"], told))

    def _measured(self) -> Outcome:
        """Full validation of the finalists, then baseline and all that passed it side by side."""
        finalists, until, judged_until = self.found.finalists, self.budget.final_until(), self.budget.judged_until()
        hurried = self.budget.left(until) < self.budget.final_seconds
        spare = _LOOK_SHARE * self.budget.left(until) if hurried else math.inf
        self._sure = confidence_of_each(self.spec, finalists)
        for i, run in enumerate(finalists):
            if run not in self._spared:
                self._confirm([r for r in finalists[i:] if r not in self._spared], judged_until, spare)
                self._spared = self._spared or self._who_is_spared(run)
        measured = [r for r in finalists if r not in self._spared]
        self._in_every_order(measured, judged_until)
        if all(r.tried.failed for r in measured):
            measured += self._taken_back(judged_until)
        measured = self._keeping(measured)
        measured += self._together()
        ready = self._ready(measured)
        self._nothing_is_out()
        while True:
            try:
                seconds = self.spec.benchmark.min_seconds
                return self.evaluator.time(ready, until, min_seconds=seconds, screening=False, every_shape=True)
            except StageFailure as failure:
                if failure.code in NO_MEMORY and ready:
                    ready.pop().drop("final", _NO_ROOM)  # the last one: activations count, and are not known before
                elif failure.code == "timed_out" and self.budget.over(until):
                    raise too_small(self.spec, self.budget, "the measurement of the original", "benchmark") from failure
                else:
                    raise

    def _confirm(self, runs: Sequence[CandidateRun], until: float, spare: float) -> None:
        """The first of them. Others may look at the rest meanwhile, which may turn out to be for nothing."""
        if self.crew is None or spare < math.inf:
            confirm(self.spec, self.evaluator, runs[:1], until, self._sure, spare=spare)
            return
        by_id = {r.plan.id: r for r in runs}

        def look(request: Request) -> Answer:
            (subject,) = subjects_of(request)
            confirm(self.spec, self.evaluator, [by_id[subject.id]], until, self._sure)
            return {}

        asked = [Confirm(self.found.subject(r), self._sure, self.evaluator.apart, until) for r in runs]
        self.crew.answer(asked[0], [Ahead(a, sure=False) for a in asked], self.budget.elapsed, look)

    def _nothing_is_out(self) -> None:
        if self.crew is not None:
            self.crew.over()

    def _together(self) -> list[CandidateRun]:
        """Two of them in one bundle, where the search found that to gain; timed beside them as what it would ship as.
        It is nobody's further look at the samples that confirm: each of the two was looked at."""
        if self.found.pair is None:
            return []
        both = together(self.evaluator, self.found.pair, self.found.finalists)
        if both is None:
            return []
        self._in_every_order([both], self.budget.judged_until())
        self._pairs = [both]
        self.found.runs.append(both)
        return self._pairs

    def _keeping(self, runs: Sequence[CandidateRun]) -> list[CandidateRun]:
        """Those that keep the limit of accuracy: what does not never ships, however fast it is. Where nobody keeps it,
        all of them: their figures tell what a looser limit would buy. All, too, where everything is to be measured."""
        if self.spec.search.strategy == "exhaustive":
            return [*runs]
        missed = {r.plan.id: self._missed(r) for r in runs}
        keeping = [r for r in runs if r.tried.failed is None and missed[r.plan.id] is None]
        if not keeping:
            return [*runs]
        for run in runs:
            check = missed[run.plan.id]
            if run.tried.failed is None and check is not None:
                run.tried.missed = check
                run.drop("final", f"{check.reason}; not measured in full: {keeping[0].plan.id} keeps the limit")
        return keeping

    def _missed(self, run: CandidateRun) -> Check | None:
        """What the verdict would hold against its accuracy."""
        tried = run.tried
        checks = accuracy_checks(self.spec, tried.accuracy, lossless=tried.lossless, narrows=tried.narrows)
        return next((c for c in checks if not c.passed), None)

    def _in_every_order(self, runs: Sequence[CandidateRun], until: float) -> None:
        shapes = ShapeChecks(self.evaluator)
        for run in [r for r in runs if r.tried.failed is None]:
            shapes.every_order(run, until)

    def _ready(self, runs: Sequence[CandidateRun]) -> list[CandidateRun]:
        """Those that are sound, and that memory holds side by side."""
        sound = [r for r in runs if r.tried.failed is None]
        sound = [r for r in sound if not (r.tried.accuracy or {"broken": True}).get("broken")]
        groups, too_large = self.evaluator.groups_that_fit(sound)
        for run in [*too_large, *(r for group in groups[1:] for r in group)]:
            run.drop("final", _NO_ROOM)
        return groups[0] if groups else []

    # Those that need no full measurement

    def _who_is_spared(self, leader: CandidateRun) -> list[CandidateRun]:
        """After this one was confirmed, as long as there is time to make up for it."""
        found = self.found
        twice = 2 * final_seconds(self.spec, len(found.finalists))
        enough = twice < self.budget.left(self.budget.final_until())
        if found.facts is None or found.state is None or leader.confirmed is None or not enough:
            return []
        known = found.state.candidates
        others = [known[r.plan.id] for r in found.finalists[found.finalists.index(leader) + 1 :]]
        why = spared(found.facts, known[leader.plan.id], leader.confirmed.data, others)
        answering = found.pair and (found.pair.small, found.pair.large)
        runs = [r for r in found.finalists if r.plan.id in why and r.plan.id not in (answering or ())]
        for run in runs:
            run.drop("final", f"{why[run.plan.id]}; that one keeps the limit on the confirming samples")
        return runs

    def _taken_back(self, until: float) -> list[CandidateRun]:
        """Those that were spared for one that does not ship are finalists again."""
        taken, self._spared = self._spared, []
        for run in taken:
            run.tried.failed = None
            run.note("final", "measured after all", "the faster one does not ship")
        confirm(self.spec, self.evaluator, taken, until, self._sure)
        self._in_every_order(taken, until)
        return taken

    def _after_all(self) -> tuple[list[CandidateRun], Outcome | None]:
        """The full method for those that were spared; None where the time did not hold it."""
        runs = self._ready(self._taken_back(self.budget.judged_until()))
        timed = self._once_more(runs, self.spec.benchmark.min_seconds) if runs else None
        if timed is None:
            for run in runs:
                run.drop("final", "the time left did not hold its full measurement")
        return runs, timed

    # Again

    def _time_for_more(self, benchmark: Outcome, engines: int) -> bool:
        expected = _LONGER * max(benchmark.seconds, final_seconds(self.spec, engines))
        return expected < self.budget.left(self.budget.final_until())

    def _longer(self, runs: Sequence[CandidateRun]) -> Outcome | None:
        """Once more, and longer, for those whose gain could not be told from noise. What was seen before does not
        count: to look again until something shines would find a gain where there is none."""
        for run in runs:
            run.note("final", "measured again", "its gain could not be told from noise")
        seconds = min(_LONGER * self.spec.benchmark.min_seconds, _LONGEST_MIN_S)
        return self._once_more(runs, seconds, rounds=_MORE_ROUNDS)

    def _once_more(self, runs: Sequence[CandidateRun], seconds: float, *, rounds: int = 10) -> Outcome | None:
        until = self.budget.final_until()
        try:
            return self.evaluator.time(
                runs, until, min_seconds=seconds, screening=False, rounds=rounds, every_shape=True
            )
        except StageFailure as failure:
            if failure.code != "timed_out":
                raise
            return None

    def _shortly(self) -> Outcome:
        """The short timing that showed that nothing meets the constraints; or one of the original, where sizes did."""
        self._nothing_is_out()
        if self.found.timing is not None:
            return self.found.timing
        seconds = min(self.spec.benchmark.min_seconds, 1.0)
        return self.evaluator.time([], self.budget.final_until(), min_seconds=seconds, screening=True)


def _nothing_ships(done: Judged) -> bool:
    """But the original, if that."""
    return done.verdict.picked in (None, BASELINE)


def _mostly_quiet(benchmark: Outcome) -> bool:
    """Whether little of it was disturbed: what it does not claim is for want of rounds, not for company."""
    told = benchmark.data["disturbance"]
    return bool(told["clean_windows"] > 4 * told["dropped_windows"])


def final_seconds(spec: OptimizationSpec, engines: int) -> float:
    """What the last benchmark takes as the user asked for it: measuring, warming up and starting."""
    batches = len(spec.benchmark.batch_sizes)
    return (engines + 2) * (batches * (spec.benchmark.min_seconds * 1.2 + _WARM_UP_S) + _START_S)


def too_small(spec: OptimizationSpec, budget: Budget, what: str, stage: str) -> StageFailure:
    needs = int(2 * max(budget.elapsed(), spec.budget_seconds)) + int(final_seconds(spec, 2))
    return StageFailure(
        "budget_too_small",
        f"The budget of {spec.budget_seconds} s ended during {what}: nothing could be compared.",
        FailureKind.REQUEST,
        stage,
        remedy=f"Give budget_seconds of {needs} or more, or a smaller benchmark.min_seconds.",
        cacheable=False,
    )
