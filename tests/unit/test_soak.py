"""What the soak counts: its faults over time, and its figures of several runs (`benchmarks/soak`)."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from benchmarks.soak import faults
from benchmarks.soak.faults import Injector
from benchmarks.soak.recoveries import Recoveries, Running, Struck, Times, table
from benchmarks.soak.verdict import together, verdict


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_LEAST_PAUSE_S", 0.01)


def _injector(**kinds: Any) -> Injector:
    return Injector(kinds, Recoveries(None, lambda: True), random.Random(1))  # type: ignore[arg-type]  # nothing is looked at


def test_faults_that_take_longer_than_their_minutes_are_made_after_them() -> None:
    injector = _injector(first=lambda: Struck(time.monotonic()), second=lambda: Struck(time.monotonic()))
    injector.run(until=time.monotonic() - 1, count=6, latest=time.monotonic() + 60)
    assert injector.done == {"first": 3, "second": 3}
    assert [line.split()[1] for line in injector.story].count("first") == 3


def test_no_fault_is_made_after_the_last_moment() -> None:
    injector = _injector(kind=lambda: Struck(time.monotonic()))
    injector.run(until=time.monotonic() - 2, count=6, latest=time.monotonic() - 1)
    assert not injector.done


def test_a_run_that_is_asked_to_end_strikes_no_more() -> None:
    def strike() -> Struck:
        injector.over.set()
        return Struck(time.monotonic())

    injector = _injector(kind=strike)
    injector.run(until=time.monotonic() + 600, count=100, latest=time.monotonic() + 600)
    assert injector.done.total() == 1


class _Seen:
    """A job that is taken from its worker after a moment, waits, and is taken up again."""

    def __init__(self) -> None:
        self.looks = 0

    def row(self, _: str) -> tuple[str, int, int, list[Any]]:
        self.looks += 1
        return (
            ("running", 1, 5, [])
            if self.looks < 3
            else ("queued", 1, 6, [])
            if self.looks < 9
            else ("running", 2, 7, [])
        )


@pytest.mark.parametrize("free", [False, True])
def test_what_a_job_waits_for_a_free_worker_is_not_the_services_own_part(free: bool) -> None:
    recoveries = Recoveries(_Seen(), lambda: free)  # type: ignore[arg-type]  # no more is looked at
    struck = Struck(time.monotonic(), [Running("job_1", "worker0", 1, 5, "build")])
    recoveries.watch("kind", struck).join()
    (taken,), (own,), (on,) = (getattr(recoveries.times["kind"], name) for name in ("queued", "own", "goes_on"))
    assert 0 < taken < on
    assert own == pytest.approx(on, abs=0.02) if free else own == taken


def _result(seconds: list[float], **more: Any) -> dict[str, Any]:
    times = Times(goes_on=seconds)
    zero = ("lost_jobs", "lost_models", "ended_twice", "never_ended", "engines_twice", "without_engine")
    return {
        "whole": True,
        "minutes": 3.0,
        "faults": {"Redis flushed": len(seconds)},
        "recovery": {"Redis flushed": times.to_json()},
        **dict.fromkeys((*zero, "stuck", "same_key_twice"), 0),
        **{"trouble": [], "failures": {}, "jobs": 2, "status": {"succeeded": 2}},
        "stages": {"more_than_one_a_fault": {}, "begun": 9, "done_again": 1, "taken": 1, "tried_again": 0},
        "storage": {"orphans": [], "open_uploads": [], "blobs": 4, "bytes": 0},
        "left": {"processes": [], "files": []},
        **more,
    }


def test_several_runs_are_told_as_one() -> None:
    found = together([_result([1.0, 5.0]), _result([3.0])])
    assert (found["minutes"], found["jobs"], found["status"], found["blobs"]) == (6.0, 4, {"succeeded": 4}, 8)
    assert found["stages"] == {"begun": 18, "done_again": 2, "taken": 2, "tried_again": 0}
    assert table(found["recovery"], found["faults"]).splitlines()[-1] == "| Redis flushed | 3 |  |  | 3 / 5 |  |"


def test_a_run_that_was_cut_vouches_for_nothing() -> None:
    cut = {name: _result([2.0])[name] for name in ("minutes", "faults", "recovery")} | {"whole": False}
    assert not verdict(_result([1.0]))
    assert verdict(cut)
    found = together([_result([1.0]), cut])
    assert (found["faults"], found["jobs"]) == ({"Redis flushed": 2}, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lost_jobs": ["job_1"]},
        {"stuck": 1},
        {"trouble": ["user0: GET /v1/jobs: 500"]},
        {"left": {"processes": ["7 anneal-stage"], "files": []}},
        {"storage": {"orphans": ["tenants/x"], "open_uploads": [], "blobs": 4, "bytes": 5}},
    ],
)
def test_anything_but_nothing_is_wrong(wrong: dict[str, Any]) -> None:
    assert len(verdict(_result([1.0], **wrong))) == 1
