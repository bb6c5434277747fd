"""What the demo shows at its end: the downloaded engine beside the original, and whether the job said the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

DIGITS = Path(__file__).resolve().parents[2] / "examples/digits"


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The modules `demo` and `beside`, which import each other as the scripts that they are."""
    monkeypatch.syspath_prepend(str(DIGITS))
    for name in ("beside", "demo", "service", "view"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import beside
    import demo

    return demo, beside


def test_both_speed_ups_stand_beside_each_other(digits: tuple[Any, Any]) -> None:
    demo, _ = digits
    told = {"1": {"ratio": 2.2, "low": 2.1, "high": 2.3}, "8": {"ratio": 3.0, "low": 2.9, "high": 3.1}}
    near = {"1": {"speedup": 2.25, "low": 2.2, "high": 2.35}, "8": {"speedup": 3.05, "low": 3.0, "high": 3.2}}
    far = {**near, "1": {"speedup": 1.47, "low": 1.4, "high": 1.5}}
    assert demo.agreement(near, told).startswith("The job and this run agree")
    assert "differ at batch size 1 by up to 50 %" in demo.agreement(far, told)
    beside_it = {**near, "8": {"speedup": 3.2, "low": 3.17, "high": 3.3}}
    assert "agree within 2.3 %" in demo.agreement(beside_it, told)
    assert "no speed-up to compare" in demo.agreement(near, {})
    report = {"picked": "a", "candidates": [{"id": "a", "batches": {"1": {"speedup": told["1"]}}}, {"id": "b"}]}
    assert demo.shipped_speedups(report) == {"1": told["1"]}
    assert demo.shipped_speedups({**report, "picked": "baseline"}) == {}


def test_each_runs_in_a_process_of_its_own(digits: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, beside = digits
    monkeypatch.setattr(beside, "ROUNDS", 3)
    monkeypatch.setattr(beside, "WINDOW_S", 0.005)
    processes = [beside.Process(DIGITS / "model.onnx") for _ in range(2)]
    try:
        judged = processes[0].ask(accuracy=True)
        assert (judged["samples"], round(judged["accuracy"], 2)) == (797, 98.49)
        found = beside.beside(*processes, 4)
        assert 0 < found.low <= found.speedup <= found.high
        assert min(found.p50_ms) > 0
        with pytest.raises(beside.EngineFailed, match="Error"):
            processes[1].ask(batch="x", seconds=0.0)
        processes[0]._process.kill()
        with pytest.raises(beside.EngineFailed, match="ended with -9"):
            processes[0].ask(accuracy=True)
    finally:
        for process in processes:
            process.close()


def test_a_machine_that_is_too_busy_gets_more_time(digits: tuple[Any, Any]) -> None:
    demo, _ = digits
    asked, said = [], []

    class Busy:
        def submit(self, spec: dict[str, Any]) -> dict[str, Any]:
            asked.append(spec["budget_seconds"])
            return {"id": str(len(asked))}

        def wait(self, job_id: str, **_: Any) -> dict[str, Any]:
            if asked[-1] < 60:
                error = {"code": "budget_too_small", "detail": "It ended.", "remedy": None, "stage": None}
                raise demo.JobFailed({"id": job_id, "status": "failed", "error": error})
            return {"id": job_id}

    class Screen:
        line = said.append

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    assert demo.within(Screen(), Busy(), {}, *demo.BUDGETS_S) == {"id": "2"}
    assert asked == [14, 60]
    assert "14 s are too few" in said[0]
    with pytest.raises(demo.JobFailed):
        demo.within(Screen(), Busy(), {}, 14)
