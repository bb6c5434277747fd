"""API processes that share a listening socket, as systemd's socket units give it to them, and clients that try nothing
twice."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.servers import HOST, launched

# Runs between fork and exec: the socket becomes descriptor 3 of a process that finds its own id in LISTEN_PID.
_HANDS_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[2], sys.argv[2:])
"""
_READY_S = 60


@dataclass
class SharedApi:
    """Any number of processes behind one socket, which this process keeps open."""

    listening: socket.socket
    environment: Mapping[str, str]
    logs: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _started: int = 0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.listening.getsockname()[1]}"

    def start(self) -> subprocess.Popen[bytes]:
        """One more; it serves when this returns."""
        self._started += 1
        log = self.logs / f"api-{self._started}.log"
        number = self.listening.fileno()
        handed = [sys.executable, "-I", "-S", "-c", _HANDS_OVER, str(number), sys.executable, "-m", "app", "api"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*launched(), *handed], env=dict(self.environment), stdout=output, stderr=output, pass_fds=[number]
            )
        self.processes.append(process)
        deadline = time.monotonic() + _READY_S
        while "startup complete" not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.05)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        self.processes.remove(process)


@contextlib.contextmanager
def shared_api(environment: Mapping[str, str], logs: Path) -> Iterator[SharedApi]:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, 0))
        listening.listen(2048)
        found = SharedApi(listening, environment, logs)
        try:
            yield found
        finally:
            for process in found.processes:
                process.kill()
                process.wait()


Answers = Callable[[httpx.Client], int]  # the status; one request


@dataclass
class Load:
    """Clients, each with one thing that it does again and again over connections of its own. What is not answered as it
    should be is a problem; nobody tries again."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    keep_alive: bool = True
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def client(self) -> httpx.Client:
        limits = httpx.Limits(max_keepalive_connections=4 if self.keep_alive else 0)
        return httpx.Client(base_url=self.url, headers=dict(self.headers), timeout=60, limits=limits)

    def keep_doing(self, name: str, call: Callable[[httpx.Client], object], pause_s: float = 0.02) -> None:
        def run() -> None:
            with self.client() as client:
                while not self._over.wait(pause_s):
                    try:
                        call(client)
                        self.done[name] += 1
                    except Exception as error:  # whatever it is: the test tells it
                        at = time.strftime("%H:%M:%S")
                        self.problems.append(f"{at} {name}: {type(error).__name__}: {str(error)[:500]}")

        thread = threading.Thread(target=run, name=name)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """Nothing more is begun."""
        self._over.set()

    def end(self) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()

    @property
    def over(self) -> bool:
        return self._over.is_set()


def expect(response: httpx.Response, *statuses: int) -> httpx.Response:
    assert response.status_code in statuses, f"{response.request.method} {response.url}: {response.status_code} " + (
        response.text[:300] if response.is_stream_consumed else ""
    )
    return response


def plain_environment(home: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """That of a deployment which is told nothing but `extra`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ANNEAL_", "WORKER_", "STORAGE_", "LISTEN_"))}
    return {**kept, "ANNEAL_HOME": str(home), "ANNEAL_LOG_JSON": "true", **extra}
