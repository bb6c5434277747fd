"""Who is measured in full: not a safe finalist that cannot reach one that ships; and it is where that one does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import OptimizationSpec
from tests.factories.search_world import World, candidate
from workers.pipeline.budget import Budget
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.finals import Finals, Judged
from workers.search.driver import Found
from workers.search.halving import Speed
from workers.search.limits import CLEARLY_FASTER
from workers.search.requests import Ahead, Done, subjects_of
from workers.search.state import CandidateState, Phase, SearchState


def at(gain: float) -> dict[str, Any]:
    ratio = {"ratio": gain, "low": 0.97 * gain, "high": 1.03 * gain}
    ms = 10 / gain
    return {"speedup": ratio, "throughput_ratio": ratio, "p50_ms": ms, "mean_ms": ms, "throughput_qps": 100 * gain}


def figures(gain: float) -> dict[str, Any]:
    return {"batches": {"1": at(gain), "8": at(gain)}, "size_bytes": 1000, "peak_memory_mb": 1.0}


class Asked:
    """A crew that leaves everything to the job's own worker. `told`: whom each look was for, and whom others might look
    at meanwhile."""

    def __init__(self) -> None:
        self.told: list[tuple[str, list[str]]] = []
        self.is_over = False

    def answer(self, request: Any, ahead: Sequence[Ahead], _: Any, answer: Callable[[Any], Any]) -> None:
        assert not any(a.sure for a in ahead)
        others = [subjects_of(a.request)[0].id for a in ahead if a.request != request]
        self.told.append((request.subject.id, others))
        answer(request)

    def over(self) -> None:
        self.is_over = True


class Stages:
    """What the finals ask of an `Evaluator`. `gains`: in full, `losses`: on the samples that confirm."""

    def __init__(self, spec: OptimizationSpec, gains: Mapping[str, float], losses: Mapping[str, float]) -> None:
        self.spec, self.gains, self.losses = spec, gains, losses
        self.budget = Budget(float(spec.budget_seconds), lambda: 0.0)
        self.export = SimpleNamespace(data={"inputs": []}, outputs={"model": "m"})
        self.confirmed: list[str] = []
        self.timed: list[list[str]] = []
        self.apart, self.crew = True, Asked()

    def expected_check_seconds(self, *_: Any) -> float:
        return 0.0

    def confirm(self, run: CandidateRun, confidence: float, until: float) -> bool:
        self.confirmed.append(run.plan.id)
        loss = self.losses.get(run.plan.id, 0.0)
        accuracy = {"loss_percent": loss, "bound_percent": loss, "samples": 600, "part": "confirm", "source": "dataset"}
        run.confirmed = SimpleNamespace(data=accuracy)  # type: ignore[assignment]
        run.tried.accuracy = accuracy
        return True

    def selection(self, *_: Any) -> dict[str, Any]:
        return {}

    def call(self, stage: str, *_: Any, **__: Any) -> Any:
        raise StageFailure("not_run", "The original does not get through it.", FailureKind.MODEL)

    def groups_that_fit(self, runs: Sequence[CandidateRun]) -> tuple[list[list[CandidateRun]], list[CandidateRun]]:
        return ([list(runs)] if runs else []), []

    def time(self, runs: Sequence[CandidateRun], until: float, **_: Any) -> Any:
        assert self.crew.is_over, "nobody computes beside a measurement"
        self.timed.append([r.plan.id for r in runs])
        engines = {"baseline": figures(1.0), **{r.plan.id: figures(self.gains[r.plan.id]) for r in runs}}
        told = {"claim": True, "reason": None, "clean_windows": 100, "dropped_windows": 0}
        return SimpleNamespace(data={"engines": engines, "aa": {}, "disturbance": told}, seconds=10.0)


def spec(**changes: Any) -> OptimizationSpec:
    return OptimizationSpec.model_validate({"model_id": "m", "calibration": {"dataset_id": "d"}, **changes})


@pytest.fixture
def judged() -> Callable[..., tuple[Judged, Stages, Found]]:
    def run(
        screened: Mapping[str, float],
        *,
        gains: Mapping[str, float] | None = None,
        losses: Mapping[str, float] | None = None,
        free_axes: bool = False,
        bases: Mapping[str, str] | None = None,
        **changes: Any,
    ) -> tuple[Judged, Stages, Found]:
        """`screened`: the finalists, and what a short timing said of their speed. `bases`: what they were mended
        from."""
        stages = Stages(spec(**changes), gains or screened, losses or {})
        states = {
            cid: CandidateState(
                candidate(cid),
                base=(bases or {}).get(cid),
                speed=Speed(gain, 0.97 * gain, 1.03 * gain),
                figures=figures(gain),
                finalist=True,
            )
            for cid, gain in screened.items()
        }
        world = World({}, stages.spec, free_axes=free_axes)
        state = SearchState(states, world.deadlines(), Phase.OVER, few=96)
        runs = [CandidateRun.of(found.plan) for found in states.values()]
        found = Found(runs, [*runs], facts=world.facts(), state=state)
        done = Finals(stages, found, stages.crew).judged()  # type: ignore[arg-type]  # what it needs of each
        return done, stages, found

    return run


def test_a_safe_finalist_is_not_measured_where_the_fastest_ships(judged: Any) -> None:
    done, stages, found = judged({"int8": 3.0, "fp32": 1.2})
    assert done.verdict.picked == "int8"
    assert stages.timed == [["int8"]]
    assert stages.confirmed == ["int8"], "nor looked at on the samples that confirm"
    assert "cannot reach int8" in found.runs[1].tried.failed
    assert stages.crew.told == [("int8", ["fp32"])], "on another machine it may be, meanwhile"


@pytest.mark.parametrize(
    ("screened", "changes"),
    [
        ({"int8": 3.0, "bf16": 2.95}, {}),  # it may win
        ({"int8": CLEARLY_FASTER, "fp32": 1.01}, {}),  # the full measurement may tell otherwise
        ({"int8": 3.0, "fp32": 1.2}, {"constraints": {"p99_latency_ms": 50.0}}),
        ({"int8": 3.0, "fp32": 1.2}, {"constraints": {"max_memory_mb": 50.0}}),
        ({"int8": 3.0, "fp32": 1.2}, {"free_axes": True}),  # other shapes are measured in full only
        ({"int8": 3.0, "fp32": 1.2}, {"budget_seconds": 60}),  # no time to make up for it
    ],
)
def test_all_finalists_are_measured_where_the_fastest_may_not_ship(
    judged: Any, screened: Mapping[str, float], changes: dict[str, Any]
) -> None:
    _, stages, _ = judged(screened, **changes)
    assert stages.timed[0] == [*screened]
    assert stages.confirmed == [*screened]
    if "budget_seconds" not in changes:
        first, second = screened
        assert stages.crew.told == [(first, [second]), (second, [])]


def test_what_loses_too_much_is_not_measured_where_another_keeps_the_limit(judged: Any) -> None:
    done, stages, found = judged({"int8": 3.0, "fp32": 1.2}, losses={"int8": 2.0})
    assert stages.confirmed == ["int8", "fp32"]
    assert stages.timed == [["fp32"]]
    assert done.verdict.picked == "fp32"
    assert found.runs[0].tried.missed is not None
    assert found.runs[0].tried.failed == (
        "accuracy loss 2.000 %, over the limit of 1.0 %; not measured in full: fp32 keeps the limit"
    )


def test_all_that_lose_too_much_are_measured_where_nobody_keeps_the_limit(judged: Any) -> None:
    """Their figures tell what a looser limit would buy."""
    done, stages, _ = judged({"int8": 3.0, "bf16": 2.0}, losses={"int8": 2.0, "bf16": 1.5})
    assert stages.timed == [["int8", "bf16"]]
    assert done.verdict.picked == "baseline"


def test_who_was_spared_is_measured_after_all_where_the_fastest_does_not_ship(judged: Any) -> None:
    done, stages, found = judged({"int8": 3.0, "fp32": 1.3}, gains={"int8": 0.8, "fp32": 1.3})
    assert stages.timed[:2] == [["int8"], ["fp32"]]
    assert stages.confirmed == ["int8", "fp32"]
    assert done.verdict.picked == "fp32"
    assert [note["decision"] for note in found.runs[1].history][-2:] == ["dropped", "measured after all"]


MENDED = {"int8.keep1": "int8"}


@pytest.mark.parametrize(
    ("screened", "losses", "timed"),
    [
        ({"int8": 3.0, "int8.keep1": 2.95, "fp32": 1.2}, {}, ["int8"]),
        ({"int8.keep1": 3.0, "int8": 2.98, "fp32": 1.2}, {}, ["int8.keep1"]),  # by chance the faster one
        ({"int8": 3.0, "int8.keep1": 2.95, "fp32": 1.2}, {"int8": 2.0}, ["int8.keep1"]),
        ({"int8": 3.0, "int8.keep1": 3.2, "fp32": 1.2}, {}, ["int8", "int8.keep1"]),  # it is clearly faster
        ({"int8": 3.0, "bf16": 2.95}, {}, ["int8", "bf16"]),  # another engine, which may win
    ],
)
def test_what_was_mended_in_case_the_fastest_loses_too_much_is_measured_only_where_it_does(
    judged: Any, screened: Mapping[str, float], losses: Mapping[str, float], timed: list[str]
) -> None:
    done, stages, _ = judged(screened, losses=losses, bases=MENDED)
    assert stages.timed == [timed]
    assert done.verdict.picked in timed
    assert not losses.get(str(done.verdict.picked))


def test_what_was_mended_is_measured_after_all_where_the_fastest_turns_out_slow(judged: Any) -> None:
    screened = {"int8": 3.0, "int8.keep1": 2.95}
    done, stages, found = judged(screened, gains={"int8": 0.8, "int8.keep1": 2.0}, bases=MENDED)
    assert stages.timed[:2] == [["int8"], ["int8.keep1"]]
    assert done.verdict.picked == "int8.keep1"
    assert "in case int8 loses too much" in str([note.get("reason") for note in found.runs[1].history])


def test_what_the_search_hands_over_is_done() -> None:
    done, state = World({}, spec()).run()
    assert done == Done((), False, False)
    assert state.phase is Phase.OVER
