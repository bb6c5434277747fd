"""The bundle is made again with what was found out of serving it; where it is not, the report says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from app.domain.failures import StageFailure
from app.domain.spec import OptimizationSpec
from workers.pipeline import packaging
from workers.pipeline.budget import Budget
from workers.pipeline.deployment import deployment_of
from workers.pipeline.outcome import Explanation

FIRST = SimpleNamespace(seconds=30.0)
SPEC = OptimizationSpec.model_validate({"model_id": "m", "traffic": {"slo": {"p99_latency_ms": 20}}})
PROOF = SimpleNamespace(spec=SPEC, backend="onnxruntime", precision="fp32", runtime={}, export=SimpleNamespace(data={}))


def completed(monkeypatch: pytest.MonkeyPatch, made: Any, spent: float = 0.0) -> tuple[Any, str | None]:
    def package(*_: Any, **__: Any) -> Any:
        if isinstance(made, Exception):
            raise made
        return made

    monkeypatch.setattr(packaging, "package", package)
    budget = Budget(600.0, spent=spent, clock=lambda: 0.0)
    return packaging.completed(None, PROOF, None, FIRST, None, budget)  # type: ignore[arg-type]  # handed on


def reasons(lacks: str | None, **told: str) -> dict[str, str]:
    explanation = Explanation(reasons=told, bundle_lacks=lacks)
    return deployment_of(PROOF, explanation).reasons  # type: ignore[arg-type]  # what it reads of a proof


def test_a_bundle_that_holds_the_settings_has_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    again = SimpleNamespace(seconds=30.0)
    assert completed(monkeypatch, again) == (again, None)
    assert reasons(None, traffic="the budget ended")["serving"] == "the budget ended"


def test_a_bundle_that_fails_with_the_settings_is_told_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    made, lacks = completed(monkeypatch, StageFailure("bundle_fails", "serve.py ended with exit code 1."))
    assert made is FIRST
    told = reasons(lacks, traffic="not measured")["serving"]
    assert told.startswith("not measured; the bundle was made before these settings were known")
    assert "(bundle_fails: serve.py ended with exit code 1.)" in told


def test_a_budget_that_has_ended_is_told_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    made, lacks = completed(monkeypatch, AssertionError("made all the same"), spent=590.0)
    assert made is FIRST
    assert "takes about 30 s, and the budget had " in (lacks or "")
