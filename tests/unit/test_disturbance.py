"""What else runs on the machine: read from the kernel beside real spinning processes, and what follows from it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_benchmark import mlp
from workers.measure import claim, disturbance
from workers.measure.disturbance import Disturbance, Reading, in_a_row, thread_waits, together, usual_cores
from workers.measure.engine_child import WarmUp
from workers.measure.engine_process import EngineProcess
from workers.measure.figures import comparison
from workers.measure.instances import Instances, Layout
from workers.measure.quiet import Quiet
from workers.measure.rounds import Timing, counting, measure
from workers.measure.stats import Interval

Array = np.ndarray[Any, Any]
pytestmark = pytest.mark.skipif(thread_waits() is None, reason="this kernel does not tell how long threads wait")


@contextlib.contextmanager
def spinning(count: int) -> Iterator[None]:
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def crowd() -> int:
    return 2 * len(usual_cores())


def engine(folder: Path, cores: list[int] | None = None) -> EngineProcess:
    x = np.ones((1, 16), np.float32)
    process = EngineProcess("x", "onnxruntime", mlp(folder), {}, {1: [{"x": x}] * 4}, cores)
    process.load()
    process.prepare(1)
    return process


def spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def test_a_thread_that_waits_for_a_core_is_seen() -> None:
    before = Reading.now(usual_cores())
    with spinning(crowd()):
        spin(0.5)
    seen = before.until(Reading.now(usual_cores()))
    assert seen.waited_share > disturbance.MOST_WAITED
    assert seen.others_share > disturbance.MOST_OTHERS
    assert seen.own > 0
    assert "for a core" in str(seen.disturbed)


def test_threads_that_begin_and_end_meanwhile() -> None:
    before = Reading.now(usual_cores())
    lasting = threading.Thread(target=spin, args=(0.4,))
    passing = threading.Thread(target=spin, args=(0.05,))
    for thread in (lasting, passing):
        thread.start()
    passing.join()
    during = before.until(Reading.now(usual_cores()))
    lasting.join()
    after = before.until(Reading.now(usual_cores()))
    assert during.waited is not None
    assert after.waited is not None
    assert after.seconds > during.seconds > 0


def test_a_kernel_that_tells_nothing_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbance, "_PROC", tmp_path)
    monkeypatch.setattr(disturbance, "_CGROUP", tmp_path / "none")
    seen = Reading.now({0, 1}).until(Reading.now({0, 1}))
    assert (seen.waited, seen.stolen, seen.others, seen.disturbed) == (None, None, None, None)
    assert disturbance.sources() == []
    (tmp_path / "pressure").mkdir()
    for total in (1_000_000, 1_400_000):
        (tmp_path / "pressure" / "cpu").write_text(f"some avg10=0.69 avg60=0.90 avg300=0.38 total={total}\n")
        if total == 1_000_000:
            before = Reading.now({0, 1})
    assert before.until(Reading.now({0, 1})).waited == pytest.approx(0.4)
    assert "pressure" in disturbance.sources()[0]


def test_what_a_container_may_not_use_is_no_company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbance, "_CGROUP", tmp_path)
    (tmp_path / "cpu.stat").write_text("usage_usec 5\nthrottled_usec 0\n")
    before = Reading.now(usual_cores())
    with spinning(crowd()):
        spin(0.3)
    (tmp_path / "cpu.stat").write_text("usage_usec 9\nthrottled_usec 90000000\n")
    assert before.until(Reading.now(usual_cores())).waited == 0.0


def test_stolen_time_and_other_processes() -> None:
    quiet = Disturbance(0.3, 2, waited=0.005, stolen=0.0, own=0.55, busy=0.57)
    assert quiet.disturbed is None
    assert "stolen" in str(Disturbance(0.3, 2, waited=0.0, stolen=0.06, own=0.5, busy=0.5).disturbed)
    assert "other processes" in str(Disturbance(0.3, 2, waited=0.0, stolen=0.0, own=0.3, busy=0.6).disturbed)
    one_tick = Disturbance(0.02, 2, waited=0.0, stolen=0.01, own=0.02, busy=0.04)
    assert one_tick.disturbed is None  # the kernel counts in ticks: one of them is no evidence
    assert "power cap" in str(Disturbance(0.3, 2, device="the GPU was slowed down (power cap)").disturbed)
    row = in_a_row([quiet, quiet])
    assert (row.seconds, row.waited, row.others) == pytest.approx((0.6, 0.01, 0.04))
    beside = together([Disturbance(0.3, 2, 0.01, 0.0, 0.25, 0.56), Disturbance(0.3, 2, 0.02, 0.0, 0.25, 0.55)])
    assert (beside.waited, beside.others) == pytest.approx((0.03, 0.06))


def test_windows_beside_spinning_processes_are_known_as_such(tmp_path: Path) -> None:
    process = engine(tmp_path / "m")
    with spinning(crowd()):
        seen = [process.window(0.1, 3, 1e5).disturbance for _ in range(5)]
    assert sum(d.disturbed is not None for d in seen) >= 4
    process.close()


def test_instances_that_share_the_cores_are_not_each_others_company(tmp_path: Path) -> None:
    cores = sorted(usual_cores())
    x = np.ones((1, 16), np.float32)
    layout = Layout(instances=2, threads=max(1, len(cores) // 2))
    folder = mlp(tmp_path / "m", width=512)
    with Instances(
        "x", "onnxruntime", folder, {"intra_op_num_threads": layout.threads}, layout, {1: [{"x": x}]}
    ) as both:
        both.load()
        both.prepare(1)
        p50 = both.warm_up(0.3, 20)
        driven = both.drive(0.3, p50)
        alone = driven.disturbance.others
        with spinning(crowd()):
            crowded = both.drive(0.3, p50).disturbance
    assert alone is not None
    assert driven.disturbance.own > 0
    assert crowded.disturbed is not None


def test_a_measurement_beside_spinning_processes_claims_nothing(tmp_path: Path) -> None:
    both = {name: engine(tmp_path / "m") for name in ("baseline", "baseline (again)")}
    told: list[float] = []
    quiet = Quiet(lambda: told.append(time.monotonic()))
    with spinning(crowd()):
        found = measure(
            both,
            1,
            min_seconds=0.5,
            rounds=5,
            want_p99=False,
            seed=0,
            progress=lambda _: None,
            always=tuple(both),
            quiet=quiet,
        )
    assert 0 < quiet.waited <= quiet.patience + 10  # a bounded while, as long again as it measures; looks are coarse
    assert told
    timings = [*found.timings.values()]
    objections = claim.objections(1, timings[0], timings[1], Interval(1.0, 0.99, 1.01))
    assert "undisturbed" in objections[0]
    data = claim.disturbance(found.windows, objections, quiet.waited)
    assert data["claim"] is False
    assert data["dropped_windows"] > data["clean_windows"]
    assert data["waited_share"] > disturbance.MOST_WAITED
    assert data["waited_seconds"] > 0
    for process in both.values():
        process.close()


def test_waiting_ends_when_the_machine_is_quiet() -> None:
    quiet = Quiet(cpus={max(usual_cores())})
    assert quiet.wait(5) is False  # nothing was granted
    quiet.grant(600)
    assert quiet.patience == 30  # a bounded while
    assert quiet.wait(0.1) is False  # no time


def timing(medians: list[float], disturbed: dict[int, str] | None = None) -> Timing:
    rounds = [np.full(20, int(m * 1e6), np.int64) for m in medians]
    return Timing(WarmUp(50, 1.0, True, 1e6), [], rounds, disturbed=disturbed or {})


def test_a_pair_counts_where_both_sides_were_undisturbed() -> None:
    slowed = timing([2.0, 2.0, 9.0, 2.0, 2.0, 2.0, 2.0], {2: "spinning"})
    engine = timing([1.0, 1.0, 1.0, 1.0, 7.0, 1.0, 1.0], {4: "spinning"})
    assert counting(slowed, engine) == ([0, 1, 3, 5, 6], True)
    found = comparison(slowed, slowed, engine, 0)
    assert found["undisturbed"] is True
    assert found["speedup"] == {"ratio": 2.0, "low": pytest.approx(2.0 / 1.02, abs=1e-3), "high": 2.04}
    assert len(slowed.all()) == 6 * 20
    few = timing([1.0] * 7, dict.fromkeys(range(3), "spinning"))
    assert counting(few, engine) == ([*range(7)], False)
    assert comparison(slowed, slowed, few, 0)["undisturbed"] is False


def test_what_stops_a_claim() -> None:
    steady = timing([1.0] * 10)
    assert claim.objections(1, steady, steady, Interval(1.02, 1.01, 1.03)) == []  # two processes differ by a little
    assert "does not hold 1.0" in claim.objections(1, steady, steady, Interval(1.3, 1.2, 1.4))[0]
    assert "too wide" in claim.objections(1, steady, steady, Interval(1.0, 0.23, 4.48))[0]
    drifting = timing([1.0] * 4 + [2.0] * 6)
    assert "drifted" in claim.objections(1, drifting, steady, Interval(1.0, 0.99, 1.01))[0]
    busy = timing([1.0] * 10, dict.fromkeys(range(6), "other processes took 40 % of the cores' time"))
    (words,) = claim.objections(8, busy, steady, Interval(1.0, 0.99, 1.01))
    assert (
        words
        == "batch 8: 4 of 10 rounds of the original were undisturbed (other processes took 40 % of the cores' time)"
    )


def test_what_no_window_tells_by_itself_stops_a_claim_together() -> None:
    """In 20 ms an engine of one thread may not wait at all, with the cores full: the scheduler owed it a turn."""
    steady = timing([1.0] * 10)

    def met(each: Disturbance) -> list[str]:
        assert each.disturbed is None
        steady.meanwhile[:] = [each] * 10
        return claim.objections(1, steady, steady, Interval(1.0, 0.99, 1.01), windows=[each] * 20)

    assert met(Disturbance(0.02, 2, 0.001, 0.0, 0.02, 0.02)) == []
    assert "waited 0.2 s for a core" in met(Disturbance(0.02, 2, 0.004, 0.0, 0.02, 0.02))[0]
    assert "other processes took 50 %" in met(Disturbance(0.02, 2, 0.001, 0.0, 0.02, 0.04))[0]
    assert "stolen" in met(Disturbance(0.02, 2, 0.001, 0.01, 0.02, 0.02))[0]
    lucky = Disturbance(0.1, 2, 0.0, 0.0, 0.1, 0.1)
    steady.meanwhile[:] = [lucky] * 10
    windows = [*[lucky] * 20, *[Disturbance(0.1, 2, 0.05, 0.0, 0.1, 0.1)] * 21]
    assert claim.objections(1, steady, steady, Interval(1.0, 0.99, 1.01), windows=windows) == [
        "batch 1: 21 of 41 windows had company"
    ]


def test_own_counters_exist_for_other_processes_too() -> None:
    assert thread_waits(os.getpid()) is not None
    assert thread_waits(2**22 + 7) is None


def test_company_on_the_device_counts_against_the_whole_round(tmp_path: Path) -> None:
    both = {name: engine(tmp_path / "m") for name in ("baseline", "baseline (again)")}
    reasons = iter(["other processes took 40 % of the GPU's time"] * 4)
    found = measure(
        both,
        1,
        min_seconds=0.05,
        rounds=5,
        want_p99=False,
        seed=0,
        progress=lambda _: None,
        always=tuple(both),
        company=lambda: next(reasons, None),
    )
    for timing in found.timings.values():
        assert {*range(4)} <= {*timing.disturbed}
    for process in both.values():
        process.close()
