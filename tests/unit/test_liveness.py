"""Workers of one machine see one another die, and nothing else: real processes, killed and stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import launched
from workers import liveness
from workers.liveness import Liveness

ROOT = Path(__file__).parents[2]

WORKER = """
import sys, time
from pathlib import Path
from workers.liveness import Liveness
own = Liveness(Path(sys.argv[1]))
own.hold()
print(own.name, flush=True)
sys.stdin.readline()
own.release()
"""


@contextlib.contextmanager
def _worker(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that holds a lock, and its name."""
    command = [*launched(), sys.executable, "-c", WORKER, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_one_that_is_killed_is_seen_and_one_that_stands_still_is_not(tmp_path: Path) -> None:
    own = Liveness(tmp_path)
    own.hold()
    with _worker(tmp_path) as (stopped, _), _worker(tmp_path) as (killed, name):
        assert [*own.dead()] == []
        stopped.send_signal(signal.SIGSTOP)
        killed.kill()
        killed.wait()
        assert [*own.dead()] == [name]
        assert [*Liveness(tmp_path).dead()] == [name], "whoever looks"
        own.forget(name)
        assert [*own.dead()] == []
    own.release()


def test_one_that_ends_in_order_leaves_nothing(tmp_path: Path) -> None:
    with _worker(tmp_path) as (process, name):
        assert [path.name for path in tmp_path.iterdir()] == [f"anneal-alive-{name}"]
        process.communicate("\n")
        assert process.returncode == 0
    assert [*tmp_path.iterdir()] == []


def test_nobody_is_dead_whose_lock_this_kernel_cannot_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Liveness(tmp_path)
    (tmp_path / f"anneal-alive-{'0' * 32}-abc").touch()  # of another machine, on a shared folder
    (tmp_path / "anneal-machine.lock").touch()
    os.mkfifo(tmp_path / f"anneal-alive-{own._kernel}-pipe")
    (tmp_path / f"anneal-alive-{own._kernel}-link").symlink_to(tmp_path / "anneal-machine.lock")
    assert {*own.dead()} <= {f"{own._kernel}-pipe"}
    monkeypatch.setattr(liveness, "_BOOT_ID", tmp_path / "nothing")
    blind = Liveness(tmp_path)
    blind.hold()
    assert (blind.name, [*blind.dead()]) == (None, [])
    blind.release()


def test_a_folder_that_nothing_can_be_made_in_is_no_reason_not_to_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    own = Liveness(tmp_path / "file")
    own.hold()
    assert own.name is None
    own.release()


def test_locks_are_held_though_others_look_all_the_time(tmp_path: Path) -> None:
    """Who looks holds a lock for a moment, and removes what it finds free."""
    over, mistaken = threading.Event(), list[str]()

    def look() -> None:
        looker = Liveness(tmp_path)
        while not over.is_set():
            for name in looker.dead():
                mistaken.append(name)
                looker.forget(name)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    held = [Liveness(tmp_path) for _ in range(100)]
    try:
        for own in held:
            own.hold()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    names = {path.name.removeprefix("anneal-alive-") for path in tmp_path.iterdir()}
    assert {own.name for own in held} == names
    assert mistaken == []
    for own in held:
        own.release()


def test_the_dead_are_buried_once_and_again_where_that_failed(tmp_path: Path) -> None:
    shutdown, asked = threading.Event(), list[str]()

    def bury(name: str) -> int:
        asked.append(name)
        if len(asked) == 1:
            raise OSError("the database is away")
        return 1

    with _worker(tmp_path) as (process, name):
        process.kill()
        process.wait()
        thread = threading.Thread(target=Liveness(tmp_path).watch, args=(shutdown, bury))
        thread.start()
        deadline = time.monotonic() + 20
        while len(asked) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.2)
        shutdown.set()
        thread.join()
    assert asked == [name, name]
    assert [*tmp_path.iterdir()] == []
