"""The search: which candidates are built, timed shortly, checked on a few samples, mended and tuned, until those are
left that are worth the full method. The decisions are in `halving`; here is their order, and the budget."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.domain.failures import StageFailure
from workers.candidates import Case
from workers.kernel import Backend
from workers.measure.plan import expected_seconds
from workers.measure.shape_timing import SHARE
from workers.pipeline import halving
from workers.pipeline.budget import Budget
from workers.pipeline.checking import Checker, broken
from workers.pipeline.evaluate import NO_MEMORY, NO_ROOM, CandidateRun, Evaluator
from workers.pipeline.halving import Speed
from workers.pipeline.planner import Plan
from workers.pipeline.reach import out_of_reach, over_size
from workers.pipeline.runner import Outcome
from workers.pipeline.select import BASELINE, primary_batch
from workers.pipeline.shape_checks import ShapeChecks
from workers.pipeline.winback import WinBack, is_quantized, quantization

_SHORT = 0.25  # of the budget: where less is left to the search after the first timing, time is short
_CHECK_SHARE = 0.15  # of the time left to the search, beyond which a check is only made of what is faster
_SCREEN_SECONDS = 0.4  # per engine and batch size, or a sixth of what the full measurement takes
_TUNE_SECONDS = 0.6
_MENDING = 2.0  # of what making an engine took: equalizing its graph and quantizing that
_MENDED = 0.95  # of the speed of the engine that it was made from, about, is what a mended one keeps
_KEEPING = 0.5  # likewise, where keeping nodes in higher precision takes no new calibration
_OUT_OF_TIME = "the budget of {} s left no time for it"


@dataclass
class Found:
    """What the search leaves: everybody who was considered, in the order they were tried, and the finalists."""

    runs: list[CandidateRun]
    finalists: list[CandidateRun]
    phases: list[dict[str, float | str | int]] = field(default_factory=list)
    exhausted: bool = False
    out_of_reach: bool = False  # nobody, the original included, can meet the constraints
    timing: Outcome | None = None  # the last short timing


class Search:
    """Of one job."""

    def __init__(
        self, case: Case, plan: Plan, backends: dict[str, Backend], evaluator: Evaluator, budget: Budget
    ) -> None:
        self.case = case
        self.spec = case.spec
        self.plan = plan
        self.backends = backends
        self.evaluator = evaluator
        self.budget = budget
        self.found = Found([CandidateRun.of(c) for c in plan.candidates], [])
        self.primary = int(primary_batch(self.spec, [str(b) for b in self.spec.benchmark.batch_sizes]))
        self._checker = Checker(self.spec, evaluator, budget)
        self._speeds: dict[str, Speed] = {}
        self._tuned_of: dict[str, str] = {}  # with other runtime options: id → that of the engine as built
        self._passed_over: dict[str, tuple[str, str]] = {}  # not checked: phase and reason, which holds while others do
        self._late: set[str] = set()  # what the time did not hold
        self._expected: dict[str, Speed] = {}  # of what was mended, by the engine it was made from
        self._in_vain: dict[tuple[str, str], str] = {}  # graphs that could not be mended, and whose they were
        self._mended: set[str] = set()  # whom mending was tried for
        self._seconds_each = 0.0  # that the last short timing took per engine
        self._original: dict[str, Any] | None = None  # the baseline's figures of the last short timing
        self._sample_ms = 0.0  # what the original takes, once it is known
        self._begun = budget.elapsed()

    def run(self) -> Found:
        if self.spec.search.strategy == "exhaustive":
            return self._everything()
        self._make(self.found.runs)
        if self._nothing_is_small_enough():
            return self.found
        # At the batch size that counts; the others are timed later, for those that can still win. A large one may be
        # more than the original itself takes: then it is not timed alone.
        self._screen(self._alive(), _SCREEN_SECONDS, "short timing", batch_sizes=self._first_batch_sizes())
        if self._nothing_is_fast_enough():
            return self.found
        self._keep_time_for_the_final()
        accurate = self._check_while_they_can_win()
        accurate += self._win_back(accurate)
        accurate += self._tune(accurate)
        while self._passed_over and not any(r.tried.failed is None for r in accurate):
            # Those that were the fastest at the batch size that counts turned out to be slower at another one.
            accurate = self._check_while_they_can_win()
            accurate += self._win_back(accurate)
            accurate += self._tune(accurate)
        self._choose(accurate)
        return self.found

    def _nothing_is_small_enough(self) -> bool:
        """Known once everybody is built: what quantizes further, or computes otherwise, is no smaller."""
        if over_size(self.spec.constraints, self.evaluator.export.outputs["model"].size_bytes) is None:
            return False
        self.found.out_of_reach = not self._alive() and any(r.tried.missed is not None for r in self.found.runs)
        return self.found.out_of_reach

    def _nothing_is_fast_enough(self) -> bool:
        """By the short timing, with all that other runtime options may bring."""
        limits, alive = self.spec.constraints, self._alive()
        if self._original is None or out_of_reach(limits, self._original, self.primary) is None:
            return False
        misses = {r.plan.id: out_of_reach(limits, r.screened, self.primary, self._tuning_gain(r)) for r in alive}
        if not all(misses.values()):
            return False
        for run in alive:
            miss = misses[run.plan.id]
            assert miss is not None
            run.miss("short timing", miss)
        self.found.out_of_reach = True
        return True

    def _everything(self) -> Found:
        """The full method for every configuration: what the search is measured against."""
        runs = self.found.runs
        self._make(runs)
        for run in [r for r in runs if r.build is not None]:
            runs += [CandidateRun.of(v) for v in self.backends[run.plan.backend].variants(self.case, run.plan)]
        self._make([r for r in runs if r.build is None and r.tried.failed is None])
        for run in self._alive():
            if self.evaluator.check(run, self.spec.validation.max_samples, self.budget.search_until):
                self.found.finalists.append(run)
            elif run.tried.failed is None:
                run.drop("check", broken(run))
        self._phase("everything built and checked", len(runs))
        return self.found

    # Building and short timings

    def _make(self, runs: Sequence[CandidateRun]) -> None:
        # What calibrates comes last: on a large model it takes most of the time, at least as long as all the rest. It
        # is not begun where that would leave none to measure what there is.
        # Nor, where half of the time is gone, a second engine that computes as the original does: it seldom gains much.
        begun, rest = self.budget.elapsed(), 0.0
        half, safe = self.budget.left(self.budget.make_until) / 2, False
        for run in sorted(runs, key=_calibrates):
            left = self.budget.left(self.budget.make_until)
            short = left < rest if _calibrates(run) else left < half and safe and run.plan.lossless
            if self._too_late(run, 0.0 if short else self.budget.make_until, "make"):
                continue
            until = self.budget.make_until if _calibrates(run) else self.budget.search_until
            if self.evaluator.make(run, until):
                built = [r for r in self._alive() if r is not run]
                twin = self.evaluator.same_engine(run, built)
                if twin is not None:
                    run.drop("make", f"the engine of {twin.plan.name}, byte for byte")
                    continue
                run.note("make", "built")
                too_large = over_size(self.spec.constraints, run.engine.size_bytes)
                if too_large is not None:
                    run.miss("make", too_large)
                    continue
                safe |= run.plan.lossless
            if not _calibrates(run):
                rest = self.budget.elapsed() - begun
        self._phase("building", len(runs))

    def _screen(
        self, runs: Sequence[CandidateRun], seconds: float, phase: str, *, batch_sizes: Sequence[int] | None = None
    ) -> None:
        """A short timing of these side by side; in groups where memory does not hold them all."""
        seconds = min(seconds, self.spec.benchmark.min_seconds / 6)
        groups, too_large = self.evaluator.groups_that_fit(runs, baselines=1)
        for run in too_large:
            run.drop("timing", NO_ROOM)
        while groups:
            group = groups.pop(0)
            if self.budget.over(self.budget.search_until):
                self.found.exhausted = True
                for run in group:
                    self._not_timed(run, phase, _OUT_OF_TIME.format(self.spec.budget_seconds))
                continue
            begun = self.budget.elapsed()
            try:
                timed = self.evaluator.time(
                    group, self.budget.search_until, min_seconds=seconds, screening=True, batch_sizes=batch_sizes
                )
            except StageFailure as failure:
                if failure.code not in ("timed_out", *NO_MEMORY):
                    raise  # the original itself fails, or the machine
                self.found.exhausted |= failure.code == "timed_out"
                if failure.code in NO_MEMORY and len(group) > 1:
                    groups[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]  # what calls take counts, too
                    continue
                for run in group:
                    self._not_timed(run, phase, f"not measured: {failure.detail}")
                continue
            sizes = max(len(timed.data.get("batch_sizes", ())), 1)
            self._seconds_each = (self.budget.elapsed() - begun) / (len(group) + 1) / sizes  # the original beside them
            self._original = timed.data["engines"].get(BASELINE)
            self.found.timing = timed
            for run in group:
                self._timed(run, timed.data["engines"].get(run.plan.id), phase)
                run.screened_at = timed.made.get("at")
        self._phase(phase, len(runs))

    def _keep_time_for_the_final(self) -> None:
        """Now that it is known what a call takes."""
        fastest = [r.screened for r in self._by_speed(self._alive())[: halving.MOST_FINALISTS]]
        figures = {BASELINE: self._original, **{str(i): f for i, f in enumerate(fastest)}}
        p50_ms = {
            name: {int(batch): _call_ms(at) for batch, at in (found or {}).get("batches", {}).items()}
            for name, found in figures.items()
        }
        for at in p50_ms.values():  # a batch size that the short timing left out takes as long per sample
            least = min(at, default=1)
            at |= {b: at[least] * b / least for b in self._batch_sizes() if at and b not in at}
        if p50_ms[BASELINE]:
            self._sample_ms = min(ms / batch for batch, ms in p50_ms[BASELINE].items())
            self._checker.expect(self._sample_ms)
            wants_p99 = self.spec.constraints.p99_latency_ms is not None
            seconds = expected_seconds(p50_ms, min_seconds=self.spec.benchmark.min_seconds, want_p99=wants_p99)
            if ShapeChecks(self.evaluator).free:
                seconds /= 1 - SHARE
            self.budget.keep_for_final(seconds)

    def _timed(self, run: CandidateRun, figures: dict[str, object] | None, phase: str) -> None:
        speed = halving.speed_of(self.spec, figures)
        if figures is None or speed is None:
            failure = StageFailure.from_json(figures["failed"]) if figures and "failed" in figures else None  # type: ignore[arg-type]
            if failure is not None and failure.code == "budget_exhausted":
                self._not_timed(run, phase, failure.detail)
                return
            run.failure = run.failure or failure
            run.drop(phase, failure.detail if failure else "it was not measured at the batch size that counts")
            return
        run.screened = figures
        self._speeds[run.plan.id] = speed
        run.note(phase, "timed", ratio=round(speed.ratio, 4), low=round(speed.low, 4), high=round(speed.high, 4))
        elsewhere = halving.slower_elsewhere(self.spec, figures)
        if elsewhere and not self._shall_shrink():
            run.drop(phase, elsewhere)

    def _shall_shrink(self) -> bool:
        """Whether an engine may be asked for because it is smaller than the original, though no faster."""
        limits = self.spec.constraints
        return limits.max_size_mb is not None or limits.max_memory_mb is not None

    def _not_timed(self, run: CandidateRun, phase: str, why: str) -> None:
        """For want of time or memory. What was timed before, beside fewer others, keeps that."""
        if run.plan.id in self._speeds:
            run.note(phase, "not timed again", why)
        else:
            self._late.add(run.plan.id)
            run.drop(phase, why)

    # Accuracy

    def _check_while_they_can_win(self) -> list[CandidateRun]:
        """A small accuracy check in the order of speed, until no faster one is left that could win. Answers those that
        keep the limit as far as so few samples can tell."""
        accurate: list[CandidateRun] = []
        took, self._passed_over = 0.0, {}
        for run in [r for r in self._in_order_of_checking() if r.validate is None]:
            speed, best = self._speeds[run.plan.id], self._best(accurate)
            dear = took > _CHECK_SHARE * self.budget.left(self.budget.search_until)
            if best is not None and dear and speed.ratio <= best[1].ratio:
                self.found.exhausted = True
                reason = f"not faster than {best[0].plan.name}, and the time left hardly holds its check"
                self._passed_over[run.plan.id] = ("check", reason)
            elif best is not None and not halving.can_win(speed, best[1].low, gain=self._tuning_gain(run)):
                reason = halving.dropped_as_slow(speed, best[0].plan.name, best[1])
                self._passed_over[run.plan.id] = ("short timing", reason)
            elif not self._too_late(run, self.budget.search_until, "check"):
                begun = self.budget.elapsed()
                accurate += [run] if self._checker.check(run) else []
                took = self.budget.elapsed() - begun
        self._phase("accuracy of those that can win", len(accurate))
        return accurate

    def _tuning_gain(self, run: CandidateRun) -> float:
        """What other runtime options may still gain, at most; nothing where none would be tried."""
        variants = self.backends[run.plan.backend].variants(self.case, run.plan)
        return halving.TUNING_GAIN if any(v.unlikely is None for v in variants) else 1.0

    def _in_order_of_checking(self) -> list[CandidateRun]:
        """The fastest first. Where time is short, the fastest that is not quantized comes before: it seldom loses
        accuracy, and then there is something to ship."""
        runs = self._by_speed(self._alive())
        if self.budget.left(self.budget.search_until) > _SHORT * self.budget.seconds:
            return runs
        safe = next((r for r in runs if r.plan.precision != "int8"), None)
        return runs if safe is None else [safe, *(r for r in runs if r is not safe)]

    def _win_back(self, accurate: list[CandidateRun]) -> list[CandidateRun]:
        """Mend those that are faster than the best accurate one and lose too much."""
        best = self._best(accurate)
        reached = best[1].low if best else 0.0
        lost = [r for r in self._by_speed(self._alive()) if r.validate is not None and is_quantized(r.plan)]
        lost = [r for r in lost if halving.over_limit(self.spec, r.tried.accuracy or {})]
        mended: list[CandidateRun] = []
        for run in [r for r in lost if r.plan.id not in self._mended]:
            floor = reached * halving.WIN_BACK_GAIN if reached else 0.0 if self._shall_shrink() else 1.0
            if self._speeds[run.plan.id].high < floor or not self.spec.quantization.win_back:
                continue
            if self.budget.over(self.budget.search_until) or (run.tried.accuracy or {}).get("source") == "synthetic":
                continue
            assert run.graph is not None  # it was built
            graph = (run.graph.key, json.dumps(run.runtime, sort_keys=True))
            if graph in self._in_vain:
                why = f"it is the graph of {self._in_vain[graph]}, which could not be mended"
                run.note("win back", "not tried", why)
                continue
            index, step = quantization(run.plan)
            before = run.steps[index - 1] if index else self.evaluator.export
            share = _KEEPING if self.evaluator.quantized_before(step, before) else _MENDING
            if self.budget.left(self.budget.search_until) < share * sum(made.seconds for made in run.steps):
                self.found.exhausted = True
                run.note("win back", "not tried", "the time left does not hold making its graph once more")
                continue
            self._mended.add(run.plan.id)
            found = self._winback().mend(run)
            self.found.runs += found.tried
            if found.mended is not None:
                mended.append(found.mended)
                expected = self._speeds[run.plan.id].scaled(_MENDED)
                self._expected[found.mended.plan.id] = expected
                reached = max(reached, expected.ratio)
            else:
                self._in_vain[graph] = run.plan.id
        if mended:
            self._screen(mended, _SCREEN_SECONDS, "timing of the mended ones", batch_sizes=self._first_batch_sizes())
            self._untimed(mended)
        self._phase("winning accuracy back", len(mended))
        return [r for r in mended if r.tried.failed is None]

    def _winback(self) -> WinBack:
        """Until there is just the time left to time what it mends."""
        until = self.budget.search_until - 3 * self._seconds_each
        return WinBack(self.case, self.evaluator, self.budget, self._checker.check, self._sample_ms, until)

    def _untimed(self, mended: Sequence[CandidateRun]) -> None:
        """What the time did not hold a timing of, though it keeps the accuracy, goes by the speed of the engine that it
        was made from: the final measurement tells."""
        for run in mended:
            if run.plan.id in self._late and run.plan.id not in self._speeds:
                run.tried.failed = None
                self._speeds[run.plan.id] = self._expected[run.plan.id]
                ratio = round(self._speeds[run.plan.id].ratio, 4)
                run.note("timing of the mended ones", "expected", "by the engine it was made from", ratio=ratio)

    # Runtime options and the finalists

    def _tune(self, accurate: list[CandidateRun]) -> list[CandidateRun]:
        """Other runtime options for the best engines, and the other batch sizes for all that can still win. Options do
        not change the engine, so its accuracy is known, unless they change the arithmetic."""
        alive = self._by_speed([r for r in accurate if r.tried.failed is None])
        leaders, tuned = alive[: halving.MOST_TUNED], []
        for leader in leaders:
            for variant in self.backends[leader.plan.backend].variants(self.case, leader.plan):
                run = CandidateRun.of(variant)
                if not variant.other_values:
                    run.tried.accuracy, run.validate = leader.tried.accuracy, leader.validate
                    run.tried.shapes = leader.tried.shapes
                self._tuned_of[run.plan.id] = leader.plan.id
                self.found.runs.append(run)
                if variant.unlikely:
                    run.drop("tuning", f"not tried: {variant.unlikely}")
                else:
                    tuned.append(run)
        low = max((self._speeds[r.plan.id].low for r in leaders), default=0.0)
        others = [r for r in alive if r in leaders or halving.can_win(self._speeds[r.plan.id], low)]
        seconds = self._seconds_each * (len(others) + len(tuned) + 1) * len(self._batch_sizes())
        tuned = [r for r in tuned if not self._too_late(r, self.budget.search_until - seconds, "tuning")]
        tuned = [r for r in tuned if self.evaluator.make(r, self.budget.search_until)]
        timed = {b for r in others for b in (r.screened or {}).get("batches", ())}
        untimed = {str(b) for b in self._batch_sizes()} - timed
        if tuned or (untimed and others and self.budget.left(self.budget.search_until) > seconds):
            self._screen([*others, *tuned], _TUNE_SECONDS, "timing of runtime options")
        return [r for r in tuned if r.tried.failed is None and self._keeps_its_accuracy(r)]

    def _keeps_its_accuracy(self, run: CandidateRun) -> bool:
        """Of one with other runtime options: known from the engine as built, unless they change the arithmetic."""
        if not run.plan.other_values:
            return True
        leader = self._speeds.get(self._tuned_of[run.plan.id])
        if leader is not None and self._speeds[run.plan.id].ratio <= leader.ratio:
            run.drop("check", "not faster than the engine as built, and its accuracy would have to be judged anew")
            return False
        return not self._too_late(run, self.budget.search_until, "check") and self._checker.check(run)

    def _choose(self, accurate: list[CandidateRun]) -> None:
        timed = self._one_for_each_engine(accurate)
        ranked = [(r.plan.id, self._speeds[r.plan.id], self._checker.beyond_doubt(r)) for r in timed]
        over_all = {r.plan.id: halving.over_all_sizes(self.spec, r.screened) for r in timed}
        chosen, reasons = halving.finalists(ranked, over_all=over_all)
        self.found.finalists = sorted((r for r in timed if r.plan.id in chosen), key=lambda r: chosen.index(r.plan.id))
        for run in timed:
            if run.plan.id in reasons:
                run.drop("finalists", reasons[run.plan.id])
        for run in self._alive():
            if run not in self.found.finalists:
                run.drop(*self._passed_over.get(run.plan.id, ("check", self._checker.why_not(run))))
        if not self.found.finalists:
            self.found.finalists = self._unproven()

    def _one_for_each_engine(self, accurate: Sequence[CandidateRun]) -> list[CandidateRun]:
        """The fastest first; each engine with the best of its runtime options, which were timed side by side: of those
        that cannot be told apart at the batch size that counts, the one that is fastest over all."""
        engines: dict[str, list[CandidateRun]] = {}
        for run in self._by_speed([r for r in accurate if r.tried.failed is None]):
            engines.setdefault(self._tuned_of.get(run.plan.id, run.plan.id), []).append(run)
        kept = []
        for runs in engines.values():
            lead = self._speeds[runs[0].plan.id]
            tied = [r for r in runs if halving.can_win(self._speeds[r.plan.id], lead.low)]
            best = max(tied, key=lambda r: halving.over_all_sizes(self.spec, r.screened))
            kept.append(best)
            for run in [r for r in runs if r is not best]:
                ratios = [self._speeds[r.plan.id].ratio for r in (run, best)]
                why = f"the engine of {best.plan.name}, and not faster: {ratios[0]:.2f}x, {ratios[1]:.2f}x"
                run.drop("finalists", why)
        return self._by_speed(kept)

    def _unproven(self) -> list[CandidateRun]:
        """Nobody was timed and checked in time: the final measurement takes the most promising that were built, first
        the one that is the least likely to lose accuracy."""

        def expected(run: CandidateRun) -> float:
            known = self._speeds.get(run.plan.id)
            return run.plan.prior if known is None else 1 / known.ratio

        shown = self.evaluator.data.validation is not None
        late = [r for r in self.found.runs if r.build is not None and r.plan.id in self._late]
        late = sorted((r for r in late if shown or r.plan.lossless), key=expected)
        safe = sorted(late, key=lambda r: is_quantized(r.plan))[:1]
        chosen = [*safe, *(r for r in late if r not in safe)][: halving.MOST_FINALISTS]
        for run in chosen:
            run.tried.failed = None
            run.note("finalists", "unproven", "the time did not hold its check; the final measurement tells")
        return chosen

    # Small things

    def _first_batch_sizes(self) -> list[int] | None:
        """Of a first timing; None stands for all."""
        return [self.primary] if self.primary == min(self.spec.benchmark.batch_sizes) else None

    def _batch_sizes(self) -> list[int]:
        """Those of the job; the only one that a model with a fixed batch takes."""
        first = {spec["shape"][0] for spec in self.evaluator.export.data["inputs"] if spec["shape"]}
        fixed = first.pop() if len(first) == 1 else None
        return [fixed] if isinstance(fixed, int) else self.spec.benchmark.batch_sizes

    def _alive(self) -> list[CandidateRun]:
        return [r for r in self.found.runs if r.tried.failed is None and r.build is not None]

    def _by_speed(self, runs: Sequence[CandidateRun]) -> list[CandidateRun]:
        timed = [r for r in runs if r.plan.id in self._speeds]
        return sorted(timed, key=lambda r: -self._speeds[r.plan.id].ratio)

    def _best(self, accurate: Sequence[CandidateRun]) -> tuple[CandidateRun, Speed] | None:
        ranked = self._by_speed([r for r in accurate if not halving.over_limit(self.spec, r.tried.accuracy or {})])
        return (ranked[0], self._speeds[ranked[0].plan.id]) if ranked else None

    def _too_late(self, run: CandidateRun, until: float, phase: str) -> bool:
        if not self.budget.over(until):
            return False
        self.found.exhausted = True
        self._late.add(run.plan.id)
        run.drop(phase, _OUT_OF_TIME.format(self.spec.budget_seconds))
        return True

    def _phase(self, name: str, candidates: int) -> None:
        now = self.budget.elapsed()
        self.found.phases.append({"name": name, "seconds": round(now - self._begun, 2), "candidates": candidates})
        self._begun = now


def _call_ms(at: Mapping[str, Any]) -> float:
    """Of slow engines a short timing has too few calls for a median."""
    return float(at.get("p50_ms") or at.get("mean_ms") or 0.0)


def _calibrates(run: CandidateRun) -> bool:
    return any("calibration" in step.extra for step in run.plan.steps)
