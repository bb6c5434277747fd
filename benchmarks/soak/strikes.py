"""What the faults of the soak have in common."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak.gate import Gate
from benchmarks.soak.recoveries import Eyes, Running, Struck, ready
from benchmarks.soak.users import User
from tests import servers
from tests.cluster.cluster import Cluster, Managed

LEASE_S = 15.0  # the default, which the soak runs with
Strike = Callable[[], Struck | None]  # None: there was nothing to strike


@dataclass
class Field:
    """Where faults strike. `key`: of the tenant in whose name uploads are interrupted. `struck`: a user of that tenant,
    who asks for what a fault needs. `clock`: what makes a process's clock be off, None where there is no compiler for
    it. `disk`: the home of the worker whose disk can be filled."""

    cluster: Cluster
    eyes: Eyes
    gate: Gate
    key: str
    struck: User
    draw: random.Random
    clock: Path | None
    disk: Path | None

    def worker_of(self, job: Running) -> Managed | None:
        return next((w for w in self.cluster.workers if w.name == job.owner and not w.down()), None)

    def of(self, worker: Managed) -> list[Running]:
        return [job for job in self.eyes.running() if job.owner == worker.name]

    def busy_worker(self, seconds: float = 20.0) -> tuple[Managed | None, list[Running]]:
        """One that has a job, and what it has."""
        job = self.eyes.wait_for(lambda found: self.worker_of(found) is not None, seconds)
        worker = None if job is None else self.worker_of(job)
        return worker, [] if job is None else [job]

    def a_worker_is_free(self) -> bool:
        """Whether one lives that has signed on and has no job."""
        up = {w.name: w.started for w in self.cluster.workers if not w.held and not w.down()}
        return self.eyes.idle(up)

    def all_ready(self) -> bool:
        return all(ready(url) for url in self.cluster.urls)

    def restart(self, managed: Managed, away_s: float, number: signal.Signals = signal.SIGINT) -> float:
        """When it was there again (`time.monotonic()`)."""
        managed.held = True
        try:
            managed.signal(number)
            assert managed.process is not None
            managed.process.wait(30)
            time.sleep(away_s)
            return self.start_again(managed)
        finally:
            managed.held = False

    def start_again(self, managed: Managed) -> float:
        """What is down. When it was there again."""
        managed.stop()
        for attempt in range(5):
            try:
                managed.start()
                break
            except servers.ServerFailed:
                if attempt == 4:
                    raise
                time.sleep(1)
        return time.monotonic()


def clock_shim(folder: Path) -> Path | None:
    """Built from source; None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    target = folder / "clock_off.so"
    source = Path(__file__).with_name("clock_off.c")
    subprocess.run([compiler, "-O1", "-fPIC", "-shared", "-o", target, source, "-ldl"], check=True)
    return target
