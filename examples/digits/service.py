"""Starts the service for the demo on a free port and a fresh folder, and leaves no process behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0
STOP_S = 20.0
PR_SET_CHILD_SUBREAPER = 36


class ServiceFailed(Exception):
    """The service did not start, or did not stop by itself."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def readable(line: str) -> str:
    """A JSON log line as time, level, event and other fields, with the trace below; any other line as it is."""
    try:
        fields = json.loads(line)
        head = [str(fields.pop("timestamp", "")), str(fields.pop("level", "")), str(fields.pop("event"))]
    except (ValueError, AttributeError, KeyError):
        return line
    trace = fields.pop("exception", None)
    rest = [f"{name}={value}" for name, value in fields.items()]
    return " ".join([*head, *rest]) + (f"\n{trace}" if trace else "")


class Service:
    """`python -m app serve` in a process group of its own; a context manager. `url` is where it listens."""

    def __init__(self, home: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = home / "service.log"
        self._home = home
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Service:
        # Processes whose parent died become ours (Linux), so that none of the service's can hide.
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        settings = {"ANNEAL_HOME": str(self._home), "ANNEAL_HOST": "127.0.0.1", "ANNEAL_PORT": str(self._port)}
        unset = ("DATABASE_URL", "BROKER_URL", "STORAGE_URL")  # the embedded default, whatever the shell has
        environment = {k: v for k, v in os.environ.items() if k not in unset} | settings | {"PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app", "serve"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = self._stop()
        if left and kind is None:
            raise ServiceFailed(f"the service left processes behind, which were killed: {'; '.join(left)}")

    def tail(self, lines: int = 20) -> str:
        """The errors near the end of its log, and the last lines. Log lines in JSON come as text."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 256 * 1024))
            found = file.read().decode(errors="replace").splitlines()
        errors = [line for line in found[:-lines] if '"level": "error"' in line or '"level": "critical"' in line]
        return "\n".join(readable(line) for line in [*errors[-3:], *found[-lines:]])

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_S
        answer = "no answer"
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServiceFailed(f"the service ended at start with exit status {self._process.returncode}")
            try:
                response = httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False)
                if response.status_code == httpx.codes.OK and response.json()["status"] == "ready":
                    return
                answer = f"{response.status_code} {response.text[:300]}"
            except httpx.TransportError as error:
                answer = str(error)
            time.sleep(0.1)
        raise ServiceFailed(f"the service was not ready within {START_S:.0f} s: {answer}")

    def ask_to_stop(self) -> None:
        """It ends while something else is done; leaving the block waits for it."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def _stop(self) -> list[str]:
        """Ask it to stop, wait for its whole process tree, kill what is left; answers what had to be killed."""
        process = self._process
        if process is None:
            return []
        self.ask_to_stop()
        deadline = time.monotonic() + STOP_S
        while (process.poll() is None or _descendants()) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = _descendants()
        names = [f"{p.pid} {_command(p)}" for p in left]
        while left:
            for p in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    p.kill()
            psutil.wait_procs(left, timeout=5)
            left = _descendants()
        process.wait()
        return names


def _descendants() -> list[psutil.Process]:
    """Every living process that this one, or one of its children, started. Ended orphans are reaped on the way."""
    found = []
    for p in psutil.Process().children(recursive=True):
        try:
            if p.status() != psutil.STATUS_ZOMBIE:
                found.append(p)
            elif p.ppid() == os.getpid():
                p.wait(0)
        except (psutil.NoSuchProcess, psutil.TimeoutExpired):
            continue
    return found


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return "?"
