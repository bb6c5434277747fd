"""A bundle's own processes as its user starts them: its server, and what both are told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SERVER = "serve.py"
_ENDS_S = 3.0  # a server that is asked to


def server_command(*arguments: str) -> list[str]:
    """To be run in the bundle's folder; the server chooses its port."""
    return [sys.executable, SERVER, "--port", "0", *arguments]


def environment() -> dict[str, str]:
    """This process's own, without what it was told of Python: the bundle needs nothing of this package."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def port_of(told: bytes) -> int | None:
    """That a server listens on, by the line that it prints once it is ready; None for every other."""
    found = re.search(rb"http://\S+:(\d+)", told)
    return None if found is None else int(found[1])


@contextmanager
def process(folder: Path, log: Path, command: list[str], *, reads: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """Nothing of it and of what it starts is left afterwards; all stays in this process's group, which ends with the
    stage. `log`: what it writes. `reads`: but its standard output, which is read here."""
    with log.open("wb") as out:
        started = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if reads else out,
            stderr=out,
        )
    try:
        yield started
    finally:
        below = _below(started.pid)
        started.terminate()
        with suppress(subprocess.TimeoutExpired):
            started.wait(timeout=_ENDS_S)
        started.kill()
        started.wait()
        for left in below:
            with suppress(psutil.Error):
                left.kill()
        if started.stdout is not None:
            started.stdout.close()


def _below(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
        return found
    return []
