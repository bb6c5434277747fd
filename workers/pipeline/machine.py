"""Who may compute on this machine: any number of workers at once, or one that measures and nobody else.

Locks are files in a folder that every worker of the machine reaches, whoever it runs as, held by `flock`: they go with
the process that holds them, however it ends. The machine's lock is a readers-writer lock of two files. Who comes passes
the gate first; a measurement that waits for the machine keeps the gate closed, so that no stream of builds starves it,
and builds that wait hold the gate open for themselves, so that no two measurements in turn starve them. A GPU has a
lock of its own, always taken before the machine's: in one order nobody waits in a circle.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.domain.failures import StageFailure, infrastructure_failure
from workers.pipeline.isolated import Interrupted

MACHINE_BUSY = "machine_busy"
_LOOK_S = 0.05
_TELL_AFTER_S = 0.5
_TRIES = 50


@dataclass(frozen=True)
class Place:
    """What a stage call needs of the machine: all of it, or a share; and a GPU to itself (by its lock's name)."""

    alone: bool
    gpu: str | None = None


class MachineLock:
    """The locks in `folder`. `limit_s`: the longest wait; longer than any stage may run, nobody waits in vain."""

    def __init__(self, folder: Path, limit_s: float) -> None:
        self._folder = folder
        self._limit_s = limit_s

    @contextmanager
    def hold(self, place: Place, should_stop: Callable[[], bool], on_wait: Callable[[], None]) -> Iterator[float]:
        """Hold the place inside; gives the seconds waited for it. `on_wait` is called once, where it takes a while.
        Raises `Interrupted`, and StageFailure (`machine_busy`, `io_error`)."""
        wait = _Wait(self._limit_s, should_stop, on_wait)
        with contextlib.ExitStack() as stack:
            if place.gpu is not None:
                stack.enter_context(self._locked(place.gpu, fcntl.LOCK_EX, wait))
            with self._locked("gate", fcntl.LOCK_EX if place.alone else fcntl.LOCK_SH, wait):
                stack.enter_context(self._locked("machine", fcntl.LOCK_EX if place.alone else fcntl.LOCK_SH, wait))
            yield wait.seconds

    @contextmanager
    def _locked(self, name: str, how: int, wait: _Wait) -> Iterator[None]:
        path = self._folder / f"anneal-{name}.lock"
        while True:
            fd = _open(path)
            try:
                while not _try(fd, how):
                    wait.a_moment()
                # Somebody may have removed the file (a cleaner of temporary folders): then others hold another one.
                if _same(fd, path):
                    with contextlib.suppress(OSError):
                        os.utime(fd)  # in use, says the owner's worker to such cleaners
                    yield
                    return
            finally:
                os.close(fd)
            wait.a_moment()


class _Wait:
    def __init__(self, limit_s: float, should_stop: Callable[[], bool], on_wait: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._should_stop = should_stop
        self._on_wait: Callable[[], None] | None = on_wait
        self._started = time.monotonic()
        self._waited = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started if self._waited else 0.0

    def a_moment(self) -> None:
        self._waited = True
        if self._should_stop():
            raise Interrupted
        if self.seconds > self._limit_s:
            raise infrastructure_failure(
                MACHINE_BUSY,
                f"The machine was not free within {self._limit_s:.0f} s: other workers on it build or measure.",
                remedy="Run fewer workers on this machine, or see who holds the files in WORKER_LOCK_DIR.",
            )
        if self._on_wait is not None and self.seconds > _TELL_AFTER_S:
            told, self._on_wait = self._on_wait, None
            told()
        time.sleep(_LOOK_S)


def _open(path: Path) -> int:
    """A descriptor to lock by; the file is made where there is none. In a folder that anybody may write to: so no link
    is followed, nothing is written, a pipe does not hold this up, and a file of another user's is as good."""
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # its maker is about to let others read it
            return _existing(path)
        with contextlib.suppress(FileExistsError):
            return _new(path)
        time.sleep(_LOOK_S / 10)
    raise _unusable(path, "it cannot be opened")


def _existing(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _unusable(path, "it is no plain file") from error
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise _unusable(path, "it is no plain file")


def make_folder(folder: Path) -> None:
    """Where there is none: as the folder for temporary files, workers of other users are to make theirs there."""
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)


def _new(path: Path) -> int:
    make_folder(path.parent)
    fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444)
    os.fchmod(fd, 0o444)  # whatever the umask: others lock by reading
    return fd


def _unusable(path: Path, why: str) -> StageFailure:
    return infrastructure_failure(
        "io_error",
        f"The worker cannot use the lock {str(path)!r}: {why}.",
        remedy="Remove it, or set WORKER_LOCK_DIR to a folder that only the workers of this machine write to.",
    )


def _try(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(fd: int, path: Path) -> bool:
    try:
        there, mine = path.lstat(), os.fstat(fd)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
