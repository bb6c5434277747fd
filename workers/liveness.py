"""Which workers of this machine have died, seen at once by the others instead of after a lease.

Every worker process holds the lock of a file in WORKER_LOCK_DIR, by `flock`: the kernel lets go of it with the process,
however that ends, and keeps it for one that is stopped or slow. The file's name tells the kernel (its boot id) and is
never used again, so a worker that comes back under its old name is another one. A job's row holds the name
(`Job.lease_lock`). A lock that is free on this very kernel means that its process is gone. What cannot be seen (another
machine, another folder, a file that was removed) is nobody's death: there the lease decides.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.errors import AppError
from workers.background import Regularly
from workers.pipeline.machine import make_folder

log = structlog.get_logger(__name__)

_PREFIX = "anneal-alive-"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LOOK_S = 0.5
_TOUCH_S = 3600.0  # cleaners of temporary folders remove what is older than days


class Liveness:
    """Of one worker process. `name` is None where it has no lock: its jobs are given on when their lease ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kernel = _kernel()
        self._fd: int | None = None
        self.name: str | None = None

    def hold(self) -> None:
        """Take a lock of its own; before the first job."""
        if self._kernel is None:
            return
        name = f"{self._kernel}-{secrets.token_hex(8)}"
        try:
            self._fd = _locked(self._path(name))
        except OSError as error:
            log.warning("no_sign_of_life", folder=str(self._folder), error=str(error)[:200])
            return
        self.name = name

    def release(self) -> None:
        """At an orderly end."""
        name, self.name = self.name, None
        if name is not None:
            self.forget(name)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def dead(self) -> Iterator[str]:
        """The names of this machine's workers that are gone and not forgotten yet."""
        if self._kernel is None:
            return
        prefix = f"{_PREFIX}{self._kernel}-"
        with contextlib.suppress(OSError), os.scandir(self._folder) as found:
            names = [entry.name.removeprefix(_PREFIX) for entry in found if entry.name.startswith(prefix)]
            yield from (name for name in names if name != self.name and _is_free(self._path(name)))

    def forget(self, name: str) -> None:
        with contextlib.suppress(OSError):  # another user's: it stays, and tells nothing new
            self._path(name).unlink()

    def watch(self, shutdown: threading.Event, bury: Callable[[str], int]) -> None:
        """Until the shutdown: whoever is dead is given to `bury`, which answers how many jobs it had, and is then
        forgotten."""
        told = set[str]()  # of those whose file cannot be removed
        touch = Regularly(_TOUCH_S)
        while not shutdown.wait(_LOOK_S):
            if touch.due() and self.name is not None:
                with contextlib.suppress(OSError):
                    os.utime(self._path(self.name))
            for name in self.dead():
                if name in told:
                    continue
                try:
                    jobs = bury(name)
                except (SQLAlchemyError, AppError, OSError) as error:
                    log.warning("could_not_take_over", error=str(error)[:300])
                    break
                if jobs:
                    log.info("worker_died_here", jobs=jobs)
                told.add(name)
                self.forget(name)

    def _path(self, name: str) -> Path:
        return self._folder / f"{_PREFIX}{name}"


def _kernel() -> str | None:
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip().replace("-", "") or None
    return None


def _locked(path: Path) -> int:
    """A descriptor that holds the lock of this new file. It gets its name once it is locked: nobody who looks sees it
    free before."""
    make_folder(path.parent)
    unnamed = path.with_name(f"anneal-new-{path.name}")
    fd = os.open(unnamed, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444)
    try:
        os.fchmod(fd, 0o444)  # whatever the umask: others look at it by reading
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(path)
    except BaseException:
        os.close(fd)
        unnamed.unlink(missing_ok=True)
        raise
    return fd


def _is_free(path: Path) -> bool:
    """Whether nobody holds it. Shared, for a moment: those who look do not take one another for its owner."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
