"""The machine's lock between real processes: many compute or one measures, whoever they run as and however they end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from app.domain.failures import FailureKind, StageFailure
from workers.pipeline.isolated import Interrupted
from workers.pipeline.machine import MachineLock, Place

ROOT = Path(__file__).parents[2]
ALONE, SHARE = Place(alone=True), Place(alone=False)

# Takes the place over and over for so many seconds, and writes when it came and went. `os.setuid` comes after the
# imports: what another user may not read of this installation is then loaded.
WORKER = """
import os, sys, time
from pathlib import Path
from workers.pipeline.machine import MachineLock, Place
folder, alone, hold_s, until_s, uid = sys.argv[1], sys.argv[2] == "alone", *map(float, sys.argv[3:])
if uid:
    os.setuid(int(uid))
os.umask(0o077)
print("ready", flush=True)
sys.stdin.readline()
until = time.monotonic() + until_s
while time.monotonic() < until:
    with MachineLock(Path(folder), 60).hold(Place(alone), lambda: False, lambda: None):
        came = time.monotonic()
        print("came", came, flush=True)
        time.sleep(hold_s)
        print("was", alone, came, time.monotonic(), flush=True)
"""


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One as that for temporary files: anybody's, and each may remove only what is theirs."""
    found = tmp_path_factory.mktemp("machine")
    for parent in (found, *found.parents[:2]):
        parent.chmod(0o1777)
    return found


@contextlib.contextmanager
def started(folder: Path, *workers: tuple[str, float, float, int]) -> Iterator[list[subprocess.Popen[str]]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), *map(str, worker)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for worker in workers
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def held(processes: list[subprocess.Popen[str]]) -> list[list[tuple[bool, float, float]]]:
    """By process: alone?, from, to."""
    texts = [process.communicate(timeout=60)[0] for process in processes]
    assert not any(process.returncode for process in processes)
    lines = [[line.split()[1:] for line in text.splitlines() if line.startswith("was")] for text in texts]
    return [[(alone == "True", float(a), float(b)) for alone, a, b in found] for found in lines]


def hold(folder: Path, place: Place, *, limit_s: float = 60, stop: bool = False) -> float:
    with MachineLock(folder, limit_s).hold(place, lambda: stop, lambda: None) as waited:
        return waited


def test_nothing_runs_beside_a_measurement_and_nobody_starves(folder: Path) -> None:
    """Three that build without a pause and two that measure without one, two of them under another user."""
    other = 65534 if os.getuid() == 0 else 0
    workers = [("share", 0.1, 4.0, uid) for uid in (0, 0, other)] + [("alone", 0.1, 4.0, uid) for uid in (0, other)]
    with started(folder, *workers) as processes:
        by_process = held(processes)
    spans = sorted((came, went, alone) for found in by_process for alone, came, went in found)
    for number, (_came, went, alone) in enumerate(spans):
        later = [other for other in spans[number + 1 :] if other[0] < went]
        assert not [o for o in later if alone or o[2]]
    assert [o for n, o in enumerate(spans) if not o[2] and n and not spans[n - 1][2] and spans[n - 1][1] > o[0]]
    assert all(len(found) >= 2 for found in by_process), [len(found) for found in by_process]


def test_who_dies_holds_nothing(folder: Path) -> None:
    with started(folder, ("alone", 600, 600, 0)) as (process,):
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(StageFailure) as caught:
            hold(folder, SHARE, limit_s=0.2)
        assert (caught.value.code, caught.value.kind) == ("machine_busy", FailureKind.INFRASTRUCTURE)
        assert not caught.value.cacheable
        with pytest.raises(Interrupted):
            hold(folder, ALONE, stop=True)
        process.kill()
        hold(folder, ALONE, limit_s=5)


def test_a_wait_is_told_once_and_counted(folder: Path) -> None:
    told: list[float] = []
    lock = MachineLock(folder, 60)
    ready = threading.Event()

    def measure() -> None:
        with lock.hold(ALONE, lambda: False, lambda: None):
            ready.set()
            time.sleep(1.2)

    thread = threading.Thread(target=measure)
    thread.start()
    ready.wait()
    with lock.hold(SHARE, lambda: False, lambda: told.append(time.monotonic())) as waited:
        assert 1 < waited < 10
    thread.join()
    assert len(told) == 1
    assert hold(folder, SHARE) == 0


def test_a_gpu_is_one_workers_and_the_rest_is_shared(folder: Path) -> None:
    lock = MachineLock(folder, 0.2)
    with lock.hold(Place(alone=False, gpu="GPU-1"), lambda: False, lambda: None):
        with lock.hold(Place(alone=False, gpu="GPU-2"), lambda: False, lambda: None):
            pass
        for place in (Place(alone=False, gpu="GPU-1"), ALONE):
            with pytest.raises(StageFailure, match="not free"):
                hold(folder, place, limit_s=0.2)
    hold(folder, ALONE, limit_s=0.2)


@pytest.mark.parametrize("trick", ["link", "link to nothing", "folder", "pipe"])
def test_no_trick_with_the_file_makes_a_worker_touch_or_wait_for_another(
    folder: Path, trick: Literal["link", "link to nothing", "folder", "pipe"]
) -> None:
    path, secret = folder / "anneal-machine.lock", folder / "secret"
    secret.write_text("precious")
    if trick.startswith("link"):
        path.symlink_to(secret if trick == "link" else folder / "nothing")
    elif trick == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(StageFailure) as caught:
        hold(folder, ALONE, limit_s=2)
    assert caught.value.kind is FailureKind.INFRASTRUCTURE
    assert "no plain file" in caught.value.detail
    assert "WORKER_LOCK_DIR" in (caught.value.remedy or "")
    assert secret.read_text() == "precious"
    assert not (folder / "nothing").exists()


def test_a_file_removed_by_a_cleaner_is_noticed_by_who_waits(folder: Path) -> None:
    """Who waited for the removed one takes that which those after it will take."""
    hold(folder, ALONE)
    path = folder / "anneal-machine.lock"
    with path.open() as removed:
        fcntl.flock(removed, fcntl.LOCK_EX)
        threading.Timer(0.3, lambda: (path.unlink(), fcntl.flock(removed, fcntl.LOCK_UN))).start()
        with (
            MachineLock(folder, 10).hold(ALONE, lambda: False, lambda: None),
            pytest.raises(StageFailure, match="not free"),
        ):
            hold(folder, SHARE, limit_s=0.2)
