"""Every way a child process can end becomes a result or a typed failure, and nothing of it is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.domain.failures import FailureKind, StageFailure
from workers.pipeline.isolated import Interrupted, IsolatedRunner, StageOutcome
from workers.pipeline.protocol import Limits, StageRequest

LIMITS = Limits(20, 4 << 30, 8 << 20)


@pytest.fixture(scope="module")
def isolated() -> Iterator[IsolatedRunner]:
    os.environ["A_SECRET_OF_THE_WORKER"] = "hidden"
    runner = IsolatedRunner(["tests.factories.stages"])
    runner.start()
    yield runner
    runner.close()
    del os.environ["A_SECRET_OF_THE_WORKER"]


def _run(
    isolated: IsolatedRunner,
    tmp_path: Path,
    how: str,
    *,
    seconds: float = 20,
    memory_mb: int = 4096,
    stop_after: float = 1e9,
) -> StageOutcome:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    limits = Limits(seconds, memory_mb << 20, 8 << 20)
    request = StageRequest("misbehave", {"how": how}, {}, str(work), str(out), {}, limits)
    deadline = time.monotonic() + stop_after
    return isolated.run(request, on_progress=lambda *_: None, should_stop=lambda: time.monotonic() > deadline)


def _failure(isolated: IsolatedRunner, tmp_path: Path, how: str, **limits: float) -> StageFailure:
    with pytest.raises(StageFailure) as caught:
        _run(isolated, tmp_path, how, **limits)
    assert caught.value.stage == "misbehave"
    return caught.value


def test_a_good_stage_gives_outputs_and_data(isolated: IsolatedRunner, tmp_path: Path) -> None:
    outcome = _run(isolated, tmp_path, "well")
    assert outcome.outputs == ["file"]
    assert (tmp_path / "out" / "file" / "out.txt").read_text() == "fine"
    assert outcome.seconds > 0


def test_the_child_sees_no_secret_and_runs_in_its_workspace(isolated: IsolatedRunner, tmp_path: Path) -> None:
    data = _run(isolated, tmp_path, "environment").data
    assert "A_SECRET_OF_THE_WORKER" not in data["environment"]
    assert not [name for name in data["environment"] if "URL" in name or "KEY" in name or "SECRET" in name]
    assert data["cwd"] == str(tmp_path / "work")


def test_a_request_may_be_large(isolated: IsolatedRunner, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    inputs = {f"engine.{i:06d}": str(tmp_path) for i in range(20_000)}
    limits = Limits(20, 4 << 30, 8 << 20)
    request = StageRequest(
        "misbehave", {"how": "well"}, inputs, str(tmp_path / "work"), str(tmp_path / "out"), {}, limits
    )
    outcome = isolated.run(request, on_progress=lambda *_: None, should_stop=lambda: False)
    assert outcome.outputs == ["file"]


def test_a_crash_is_a_typed_failure_of_the_model(isolated: IsolatedRunner, tmp_path: Path) -> None:
    failure = _failure(isolated, tmp_path, "crash")
    assert (failure.code, failure.kind) == ("runtime_crashed", FailureKind.MODEL)
    assert "SIGSEGV" in failure.detail
    assert failure.remedy


def test_a_hang_ends_at_the_time_limit(isolated: IsolatedRunner, tmp_path: Path) -> None:
    started = time.monotonic()
    failure = _failure(isolated, tmp_path, "hang", seconds=0.5)
    assert failure.code == "timed_out"
    assert not failure.cacheable
    assert time.monotonic() - started < 5


def test_too_much_memory_is_a_typed_failure(isolated: IsolatedRunner, tmp_path: Path) -> None:
    failure = _failure(isolated, tmp_path, "memory", memory_mb=300)
    assert failure.code == "out_of_memory"


def test_a_kill_from_outside_is_infrastructure(isolated: IsolatedRunner, tmp_path: Path) -> None:
    failure = _failure(isolated, tmp_path, "killed")
    assert (failure.code, failure.kind) == ("child_lost", FailureKind.INFRASTRUCTURE)


def test_an_exit_without_result_is_infrastructure(isolated: IsolatedRunner, tmp_path: Path) -> None:
    assert _failure(isolated, tmp_path, "exit").code == "child_lost"


def test_an_unexpected_exception_is_typed_and_has_no_trace(isolated: IsolatedRunner, tmp_path: Path) -> None:
    failure = _failure(isolated, tmp_path, "raise")
    assert failure.code == "internal"
    assert "what a library might raise" in failure.detail
    assert "Traceback" not in str(failure.public())


def test_too_large_a_file_is_storage_full(isolated: IsolatedRunner, tmp_path: Path) -> None:
    assert _failure(isolated, tmp_path, "disk").code == "storage_full"


def test_an_interruption_takes_the_whole_tree_of_processes(isolated: IsolatedRunner, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        _run(isolated, tmp_path, "fork", stop_after=1.5)
    grandchild = int((tmp_path / "work" / "grandchild").read_text())
    _wait_until_gone(grandchild)


def test_the_runner_recovers_from_the_loss_of_its_zygote(tmp_path: Path) -> None:
    runner = IsolatedRunner(["tests.factories.stages"])
    runner.start()
    try:
        assert runner._zygote is not None
        victim = runner._zygote
        threading.Timer(0.5, victim.kill).start()
        failure = _failure(runner, tmp_path, "hang")
        assert (failure.code, failure.kind) == ("child_lost", FailureKind.INFRASTRUCTURE)
        (tmp_path / "again").mkdir()
        assert _run(runner, tmp_path / "again", "well").outputs == ["file"]
    finally:
        runner.close()


def test_what_leaves_its_process_group_ends_with_the_stage(isolated: IsolatedRunner, tmp_path: Path) -> None:
    assert _run(isolated, tmp_path, "daemon").outputs == ["file"]
    _wait_until_gone(int((tmp_path / "work" / "grandchild").read_text()))


def test_memory_that_processes_share_counts_once(isolated: IsolatedRunner, tmp_path: Path) -> None:
    assert _run(isolated, tmp_path, "shared", memory_mb=450).outputs == ["file"]


def test_no_exception_in_mid_call_reaches_the_next_one(tmp_path: Path) -> None:
    """The callbacks raise, and a signal's handler raises wherever the call just is."""
    command = [sys.executable, "-m", "tests.factories.interrupted_calls", str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_failed_write_of_progress_leaves_the_runner_well(isolated: IsolatedRunner, tmp_path: Path) -> None:
    """An OSError of the caller's is the caller's: no sign that the zygote is lost."""

    def throw(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    zygote = isolated._zygote
    (tmp_path / "a" / "work").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    request = StageRequest(
        "misbehave", {"how": "hang"}, {}, str(tmp_path / "a/work"), str(tmp_path / "out"), {}, LIMITS
    )
    with pytest.raises(OSError, match="full"):
        isolated.run(request, on_progress=throw, should_stop=lambda: False)
    assert _run(isolated, tmp_path / "b", "well").outputs == ["file"]
    assert isolated._zygote is zygote


def test_a_zygote_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.pipeline.isolated._END_S", 0.5)
    runner = IsolatedRunner(["tests.factories.stages"])
    runner.start()
    try:
        assert runner._zygote is not None
        threading.Timer(0.3, runner._zygote.send_signal, (signal.SIGSTOP,)).start()
        failure = _failure(runner, tmp_path, "hang", seconds=1)
        assert (failure.code, failure.kind) == ("child_lost", FailureKind.INFRASTRUCTURE)
        (tmp_path / "again").mkdir()
        assert _run(runner, tmp_path / "again", "well").outputs == ["file"]
    finally:
        runner.close()


OWNER = """
import sys, time
from pathlib import Path
from workers.pipeline.isolated import IsolatedRunner
from workers.pipeline.protocol import Limits, StageRequest
root = sys.argv[1]
request = StageRequest("misbehave", {"how": "fork"}, {}, root, root + "/out", {}, Limits(100, 4 << 30, 8 << 20))
runner = IsolatedRunner(["tests.factories.stages"])
runner.run(request, on_progress=lambda *_: None, should_stop=lambda: False)
"""


@pytest.mark.parametrize("victims", [("owner",), ("zygote",), ("owner", "zygote"), ("stopped zygote", "owner")])
def test_nothing_runs_on_without_worker_or_zygote(victims: tuple[str, ...], tmp_path: Path) -> None:
    """Killed by SIGKILL, one or both: the stage ends, and so does what it has started."""
    owner = psutil.Popen([sys.executable, "-c", OWNER, str(tmp_path)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (tmp_path / "grandchild").exists() or not (tmp_path / "grandchild").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = owner.children(recursive=True)
    (zygote,) = [p for p in family if p.name() == "anneal-zygote"]
    assert int((tmp_path / "grandchild").read_text()) in [p.pid for p in family]
    for victim in victims:
        if victim == "stopped zygote":
            zygote.suspend()
        else:
            {"owner": owner, "zygote": zygote}[victim].kill()
    owner.wait(timeout=10)  # where only the zygote went, it ends by itself, with the failure
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def _wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still there")
