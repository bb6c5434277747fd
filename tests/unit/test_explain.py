"""What explains an engine answers values: failures become reasons, and what was proven is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import OptimizationSpec
from app.jobs.ledger import LeaseLost
from workers.candidates import Candidate, Step
from workers.pipeline.budget import Budget
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.explain import Explainer
from workers.pipeline.isolated import Interrupted
from workers.pipeline.outcome import Explanation, Proof
from workers.pipeline.select import Tried, Verdict
from workers.search.driver import Found
from workers.search.requests import Ahead, Answer, Judge, Request

SPEC = OptimizationSpec.model_validate({"model_id": "m"})
PICKED = Candidate("ort-int8", "int8", "onnxruntime", "int8", (Step("simplify", {}), Step("quantize", {"recipe": "x"})))


def failure(code: str, kind: FailureKind = FailureKind.REQUEST) -> StageFailure:
    return StageFailure(code, f"it ended: {code}", kind)


class Evaluator:
    """Every stage call raises `error`."""

    def __init__(self, error: Exception | None, *, at: str = "call", fits: bool = True) -> None:
        self.error, self.at, self.fits = error, at, fits
        self.data, self.apart = SimpleNamespace(validation=None, shapes=None), True

    def _raise(self, at: str) -> None:
        if self.error is not None and self.at in (at, "everywhere"):
            raise self.error

    def make(self, run: CandidateRun, until: float) -> bool:
        self._raise("make")
        return True

    def check(self, run: CandidateRun, samples: int, until: float) -> bool:
        self._raise("check")
        return True

    def groups_that_fit(self, runs: list[CandidateRun]) -> tuple[list[list[CandidateRun]], list[CandidateRun]]:
        return ([list(runs)], []) if self.fits else ([], list(runs))

    def time(self, runs: list[CandidateRun], *_: Any, **__: Any) -> Any:
        self._raise("time")
        return SimpleNamespace(data={"engines": {r.plan.id: {"batches": {}} for r in runs}})

    def call(self, stage: str, *_: Any) -> Any:
        self._raise("call")
        return SimpleNamespace(stage=stage, data={})


def proof() -> Proof:
    run = CandidateRun.of(PICKED)
    engine = SimpleNamespace(size_bytes=1)
    run.build = SimpleNamespace(data={"runtime": {}}, outputs={"engine": engine})  # type: ignore[assignment]
    found = Found([run], [run])
    unused: Any = SimpleNamespace(data={}, outputs={"model": engine})
    return Proof(
        job=unused,
        models=[unused],
        spec=SPEC,
        chain=None,
        case=unused,
        hardware={},
        export=unused,
        plan=unused,
        baseline=Tried("baseline", "fp32", True),
        baseline_backend="onnxruntime",
        search=found,
        benchmark=unused,
        verdict=Verdict("ort-int8", "1"),
        verdict_seconds=1.0,
    )


def explain(evaluator: Evaluator, proven: Proof | None = None, seconds: float = 600.0) -> Explanation:
    backends: Any = {"onnxruntime": SimpleNamespace(plain_runtime={})}
    return Explainer(proven or proof(), evaluator, backends, Budget(seconds)).explain()  # type: ignore[arg-type]


@pytest.mark.parametrize("at", ["make", "check", "time", "call", "everywhere"])
@pytest.mark.parametrize(
    "error",
    [
        failure("gpu_out_of_memory"),
        failure("engine_timeout"),
        failure("child_lost", FailureKind.INFRASTRUCTURE),
        failure("crashed", FailureKind.MODEL),
        failure("metric_undefined", FailureKind.DATA),
        KeyError("a fault of ours"),
    ],
    ids=lambda e: getattr(e, "code", "ours"),
)
def test_whatever_happens_becomes_a_reason(error: Exception, at: str) -> None:
    found = explain(Evaluator(error, at=at))
    if at in ("call", "everywhere"):
        assert found.deployment is None
        assert found.profile is None
        assert set(found.reasons) >= {"deployment", "profile"}
    if isinstance(error, StageFailure) and at != "call":
        assert [item.reason for item in found.ablation]
        assert all(error.detail in str(item.reason) for item in found.ablation)
    elif at in ("make", "check", "time", "everywhere"):
        assert "ablation" in found.reasons


@pytest.mark.parametrize("error", [failure("engine_does_not_serve"), KeyError("ours")], ids=["theirs", "ours"])
def test_traffic_that_cannot_be_measured_is_a_reason(error: Exception) -> None:
    told = OptimizationSpec.model_validate({"model_id": "m", "traffic": {"slo": {"p99_latency_ms": 20}}})
    engine = SimpleNamespace(size_bytes=1)
    made: Any = SimpleNamespace(outputs={"bundle": engine})
    proven = replace(proof(), spec=told, export=SimpleNamespace(data={}, outputs={"model": engine}))  # type: ignore[arg-type]
    backends: Any = {"onnxruntime": SimpleNamespace(plain_runtime={})}
    evaluator: Any = Evaluator(error)
    found = Explainer(proven, evaluator, backends, Budget(600.0), made).explain()
    assert found.load is None
    assert found.reasons["traffic"].startswith("not measured")
    # Without traffic nothing is asked, and nothing missing.
    assert "traffic" not in Explainer(proof(), evaluator, backends, Budget(600.0), made).explain().reasons


@pytest.mark.parametrize("error", [LeaseLost("job"), Interrupted(), OperationalError("s", {}, Exception())])
def test_a_job_that_is_no_longer_ours_ends_here(error: Exception) -> None:
    with pytest.raises(type(error)):
        explain(Evaluator(error))


@pytest.mark.parametrize("evaluator", [Evaluator(None), Evaluator(None, fits=False), Evaluator(failure("timed_out"))])
def test_what_was_proven_stays_as_it_was(evaluator: Evaluator) -> None:
    proven = proof()
    before = copy.deepcopy((proven.runs[0].tried, proven.runs[0].history, proven.search.finalists[0].plan))
    explain(evaluator, proven)
    assert (proven.runs[0].tried, proven.runs[0].history, proven.search.finalists[0].plan) == before
    with pytest.raises(FrozenInstanceError):
        proven.verdict = Verdict("another", "1")  # type: ignore[misc]


def test_no_time_left_is_said() -> None:
    found = explain(Evaluator(None), seconds=0.0)
    assert "budget of 900 s" in found.reasons["deployment"]
    assert all("budget" in str(item.reason) for item in found.ablation)


def test_what_is_compared_with_may_be_made_by_others() -> None:
    """And is told in the order of the parts, whoever made it and when."""
    asked: list[Judge] = []

    class Crew:
        def answer_all(
            self, wanted: list[Ahead], now: Callable[[], float], answer: Callable[[Request], Answer]
        ) -> None:
            assert all(a.sure for a in wanted)
            asked.extend(a.request for a in wanted if isinstance(a.request, Judge))
            for a in reversed(wanted):
                answer(a.request)

    backends, crew, evaluator = {"onnxruntime": SimpleNamespace(plain_runtime={})}, Crew(), Evaluator(None)
    shared = Explainer(proof(), evaluator, backends, Budget(600.0), crew=crew).explain()  # type: ignore[arg-type]
    assert [r.subject.id for r in asked] == ["without-2", "without-1"], "the most important first"
    assert shared.ablation == explain(evaluator).ablation
    asked.clear()
    hurried = Explainer(proof(), evaluator, backends, Budget(0.0), crew=crew).explain()  # type: ignore[arg-type]
    assert not asked
    assert all("budget" in str(item.reason) for item in hurried.ablation)
