"""What happens to workers: killed in each stage, seen by their neighbours or not, told to end, stopped, without disk,
with a clock that is off."""

from __future__ import annotations

import contextlib
import signal
import time
from functools import partial
from pathlib import Path

import psutil

from app.queue.producer import make_dispatch
from app.settings import Settings
from benchmarks.soak.recoveries import Running, Struck
from benchmarks.soak.strikes import LEASE_S, Field, Strike
from tests.factories.every_stage import ROUTE_OF
from tests.factories.small_disk import fill

_OF_MOST = ROUTE_OF["export"].stages  # of the jobs that users submit
_OF_ITS_OWN_S = 100.0
_OFF_S = 300
_FULL_S = 6.0
_ENOUGH_S = 8.0  # that a worker with a wrong clock works, once it is there


class WorkerStrikes:
    def __init__(self, field: Field) -> None:
        self.field = field
        self._dispatch = make_dispatch(Settings(BROKER_URL=field.cluster.environment["BROKER_URL"]))

    def kinds(self) -> dict[str, Strike]:
        return {
            **{f"worker killed in {stage}": partial(self.killed_in, stage) for stage in sorted(ROUTE_OF)},
            "worker killed, unseen by its neighbours": self.lost_machine,
            "worker told to end (SIGTERM)": self.told_to_end,
            "all workers killed": self.all_killed,
            "worker stopped beyond its lease": self.stopped,
            "stage's process killed": lambda: self.child_killed("anneal-stage"),
            "zygote killed": lambda: self.child_killed("anneal-zygote"),
            "worker's disk full": self.disk_full,
            "worker's clock 5 minutes ahead": lambda: self.clock_off(_OFF_S),
            "worker's clock 5 minutes behind": lambda: self.clock_off(-_OFF_S),
            "a message for several workers": self.doubled_message,
        }

    def killed_in(self, stage: str) -> Struck | None:
        """Counted as what it was: by the time of the kill, another stage may have begun. Stages that few jobs go
        through have one of their own."""
        field, seconds, own = self.field, 25.0, None
        if stage not in _OF_MOST:
            seconds, own = _OF_ITS_OWN_S, field.struck.ask(ROUTE_OF[stage])

        def in_it(found: Running) -> bool:
            return found.stage == stage and own in (None, found.job_id) and field.worker_of(found) is not None

        job = field.eyes.wait_for(in_it, seconds)
        worker = None if job is None else field.worker_of(job)
        if job is None or worker is None:
            return None
        began = time.monotonic()
        worker.kill()
        row = field.eyes.row(job.job_id)  # nobody writes to it now, for a moment
        if row is None or row[0] != "running" or row[1] != job.token or not row[3]:
            return Struck(began, [], kind="worker killed between jobs")
        now = row[3][-1]
        found = now["name"] if now["status"] == "running" and now["name"] in ROUTE_OF else None
        kind = f"worker killed in {found}" if found else "worker killed between stages"
        return Struck(began, [job], kind=kind)

    def lost_machine(self) -> Struck | None:
        """As if its machine were gone: nobody sees its lock, and it does not come back before its lease is over."""
        worker, jobs = self.field.busy_worker()
        if worker is None or worker.process is None:
            return None
        worker.held = True
        began = time.monotonic()
        try:
            _hide_lock(worker.process.pid)
            worker.kill()
        except BaseException:
            worker.held = False
            raise

        def back_later() -> None:
            time.sleep(LEASE_S + 4)
            worker.held = False

        return Struck(began, jobs, rest=back_later)

    def told_to_end(self) -> Struck | None:
        worker, jobs = self.field.busy_worker()
        if worker is None:
            return None
        began = time.monotonic()
        worker.signal(signal.SIGTERM)
        return Struck(began, jobs)

    def all_killed(self) -> Struck:
        jobs, began = self.field.eyes.running(), time.monotonic()
        for worker in self.field.cluster.workers:
            worker.kill()
        return Struck(began, jobs)

    def stopped(self) -> Struck | None:
        worker, jobs = self.field.busy_worker()
        if worker is None:
            return None
        worker.held = True
        worker.signal(signal.SIGSTOP, whole=True)
        began = time.monotonic()

        def goes_on() -> None:
            time.sleep(1.4 * LEASE_S)
            worker.signal(signal.SIGCONT, whole=True)
            worker.held = False

        return Struck(began, jobs, rest=goes_on)

    def child_killed(self, name: str) -> Struck | None:
        """Of any worker; looked for a while, as stages come and go."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for worker in self.field.draw.sample(self.field.cluster.workers, len(self.field.cluster.workers)):
                found = next((p for p in worker.family() if _named(p, name)), None)
                if found is None:
                    continue
                jobs, began = self.field.of(worker), time.monotonic()
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.kill()
                    return Struck(began, jobs, same_worker=True)
            time.sleep(0.02)
        return None

    def disk_full(self) -> Struck | None:
        """To the last byte, while that worker has a job."""
        field = self.field
        if field.disk is None:
            return None
        name, filler = field.disk.name, field.disk / "filler"
        field.eyes.wait_for(lambda found: found.owner == name, 20)
        fill(filler)
        jobs = [job for job in field.eyes.running() if job.owner == name]

        def has_room() -> None:
            time.sleep(_FULL_S)
            filler.unlink(missing_ok=True)

        return Struck(time.monotonic(), jobs, same_worker=True, rest=has_room)

    def clock_off(self, seconds: int) -> Struck | None:
        """For one worker, from its start to its end, a while after it took a job. Everybody's leases are hit by it."""
        field = self.field
        if field.clock is None:
            return None
        worker = field.draw.choice(field.cluster.workers)
        worker.told = {"LD_PRELOAD": str(field.clock), "CLOCK_OFF_S": str(seconds)}
        worker.signal(signal.SIGTERM)
        starts = worker.starts
        try:
            deadline = time.monotonic() + 30
            while (worker.starts == starts or not field.of(worker)) and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(_ENOUGH_S)
        finally:
            worker.told = {}
        jobs, began = field.of(worker), time.monotonic()
        worker.signal(signal.SIGTERM)
        return Struck(began, jobs)

    def doubled_message(self) -> Struck | None:
        """Everybody is told of the same job, twice."""
        job = self.field.eyes.any_job()
        if job is None:
            return None
        began = time.monotonic()
        for _ in range(2 * len(self.field.cluster.workers)):
            if not self._dispatch(job):
                return None
        return Struck(began)


def _named(process: psutil.Process, name: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name() == name
    return False


def _hide_lock(pid: int) -> None:
    """Remove the file by which the neighbours of this worker would see that it is dead."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = link.readlink()
            if target.name.startswith("anneal-alive-"):
                target.unlink()
