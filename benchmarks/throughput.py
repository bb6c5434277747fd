"""10,000 queued jobs with nothing to do, and 1, 2 and 4 real workers: what lies between two jobs, and whether more
workers do more.

    python benchmarks/throughput.py                     # 10,000 jobs; about five minutes
    python benchmarks/throughput.py --jobs 2000 --seconds 10
    python benchmarks/throughput.py --work 0            # what this machine gives at most

A durable PostgreSQL, Redis with a message for each job, and workers as `python -m workers` runs them, but for the
stages: each job waits for 50 ms (`_trivial_worker.py`). "Between" is measured in the worker, from the end of one job's
work to the beginning of the next one's: the end in the database, the claim, the lease, the workspace. The jobs belong
to twenty tenants. A round counts from when every worker has begun its first job; at last, four workers take what is
left to the end, and each job has to have ended once.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _common import HERE, CannotMeasure, Server, environment, execute, free_port, parser, say, scratch, server, table
from dispatch import QUEUE, fill
from growth import postgres
from sqlalchemy import Engine, text

from app.db.base import make_engine
from app.db.migrate import upgrade
from app.db.orm import Job
from app.queue.producer import make_dispatch
from app.settings import Settings
from tests.servers import redis_server

GOAL_MS, LINEAR = 20.0, 0.9
_START_S = 60.0


@dataclass(frozen=True)
class Round:
    """`between_ms`: of each two jobs of one worker, in order. `busy`: share of the machine's CPU time that was used, by
    whomever; `cpu_ms`: of the workers, per job."""

    workers: int
    per_second: float
    between_ms: list[float]
    busy: float
    cpu_ms: float

    def at(self, part: float) -> float:
        return self.between_ms[min(len(self.between_ms) - 1, int(part * len(self.between_ms)))]


def notes(folder: Path) -> list[list[tuple[float, float]]]:
    """By worker: when the work of each job began and ended."""
    found = []
    for path in sorted(folder.iterdir()):
        lines = [line.split() for line in path.read_text().splitlines()]
        found.append([(float(line[0]), float(line[1])) for line in lines if len(line) == 2])
    return found


@contextlib.contextmanager
def at_work(count: int, folder: Path, env: dict[str, str], work_s: float) -> Iterator[tuple[Path, list[Server]]]:
    """So many workers, once each has begun a job; and where they write."""
    told = folder / f"notes-{count}-{time.monotonic_ns()}"
    told.mkdir()
    with contextlib.ExitStack() as running:
        workers = []
        for number in range(count):
            name = f"w{number}"
            command = [str(HERE / "_trivial_worker.py"), str(told), str(work_s)]
            log = folder / f"{name}.log"
            workers.append(running.enter_context(server(command, {**env, "WORKER_NAME": name}, 0, log)))
        deadline = time.monotonic() + _START_S
        while sum(1 for done in notes(told) if done) < count:
            if time.monotonic() > deadline or any(worker.process.poll() is not None for worker in workers):
                raise CannotMeasure("a worker did not start:\n" + workers[-1].log.read_text()[-3000:])
            time.sleep(0.1)
        yield told, workers


def round_of(count: int, folder: Path, env: dict[str, str], work_s: float, seconds: float) -> Round:
    with at_work(count, folder, env, work_s) as (told, workers):
        began, before, used = time.monotonic(), psutil.cpu_times(), cpu_of(workers)
        time.sleep(seconds)
        ended, after, used = time.monotonic(), psutil.cpu_times(), cpu_of(workers) - used
    busy = (sum(after) - after.idle - after.iowait) - (sum(before) - before.idle - before.iowait)
    jobs, between = 0, list[float]()
    for done in notes(told):
        inside = [(start, end) for start, end in done if began <= start <= ended]
        jobs += len(inside)
        between += [1000 * (inside[i + 1][0] - inside[i][1]) for i in range(len(inside) - 1)]
    if not between:
        raise CannotMeasure("no job was left")
    elapsed = ended - began
    cpus = psutil.cpu_count() or 1
    return Round(count, jobs / elapsed, sorted(between), busy / elapsed / cpus, 1000 * used / jobs)


def cpu_of(workers: list[Server]) -> float:
    return sum(sum(psutil.Process(worker.pid).cpu_times()[:2]) for worker in workers)


def rest(engine: Engine, folder: Path, env: dict[str, str], work_s: float) -> tuple[int, float]:
    """Four workers take what is left: how many jobs, and in how many seconds."""
    left = count_of(engine, "queued")
    with at_work(4, folder, env, work_s):
        began, first = time.monotonic(), count_of(engine, "queued")
        while count_of(engine, "queued") or count_of(engine, "running"):
            if time.monotonic() - began > 60 + left * (work_s + 0.2):
                raise CannotMeasure(f"{count_of(engine, 'queued')} jobs wait still")
            time.sleep(0.5)
        return first, time.monotonic() - began


def count_of(engine: Engine, status: str) -> int:
    with engine.connect() as connection:
        query = text("SELECT count(*) FROM jobs WHERE status = :status AND queue = :queue")
        return int(connection.scalar(query, {"status": status, "queue": QUEUE}) or 0)


def ended_once(engine: Engine, jobs: int) -> None:
    """Every job has ended, by one event that says so."""
    query = text("SELECT count(*), count(DISTINCT job_id) FROM job_events WHERE data ->> 'status' = 'failed'")
    with engine.connect() as connection:
        events, distinct = connection.execute(query).one()
    if (events, distinct) != (jobs, jobs):
        raise CannotMeasure(f"{jobs} jobs, {distinct} of them ended, by {events} events")


def ring(broker: str, jobs: int) -> None:
    """A message for each job, as the API sends it."""
    dispatch = make_dispatch(Settings(BROKER_URL=broker))
    for number in range(jobs):
        if not dispatch(Job(id=f"job_q{number + 1:012d}", queue=QUEUE)):
            raise CannotMeasure("Redis took no message")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with scratch(arguments.folder) as folder, postgres() as url, redis_server() as broker:
        extra = {"DATABASE_URL": url, "BROKER_URL": broker, "WORKER_LOCK_DIR": str(folder)}
        extra["ANNEAL_LOG_LEVEL"] = "WARNING"
        env = environment(folder / "home", free_port(), extra)
        database = Settings(DATABASE_URL=url).database
        upgrade(database)
        engine = make_engine(database, silence_s=3600)
        try:
            fill(engine, arguments.jobs, arguments.ended)
            ring(broker, arguments.jobs)
            rounds = []
            for count in (1, 2, 4):
                rounds.append(round_of(count, folder, env, arguments.work, arguments.seconds))
                say(f"  {count} workers: {rounds[-1].per_second:.1f} jobs/s, {rounds[-1].at(0.5):.1f} ms between")
            left, seconds = rest(engine, folder, env, arguments.work)
            ended_once(engine, arguments.jobs)
        finally:
            engine.dispose()
    show(rounds, arguments)
    print(f"\nThe last {left:,} of {arguments.jobs:,} jobs: {seconds:.0f} s on 4 workers. Each job ended once.")
    told = [{**vars(r), "p50_ms": statistics.median(r.between_ms)} for r in rounds]
    return {"rounds": told, "rest": {"jobs": left, "seconds": seconds}}


def show(rounds: list[Round], arguments: argparse.Namespace) -> None:
    print(
        f"{arguments.jobs:,} queued jobs, {1000 * arguments.work:g} ms each, {arguments.ended:,} ended ones; "
        f"rounds of {arguments.seconds:g} s\n"
    )
    alone = rounds[0].per_second
    head = (
        "workers", "jobs/s", "× one worker", f"≥ {LINEAR:g} × workers", "between two jobs, ms (median, p99)",
        f"≤ {GOAL_MS:g} ms", "CPU in use", "CPU ms of the worker per job",
    )  # fmt: skip
    rows = [
        (
            str(r.workers),
            f"{r.per_second:.1f}",
            f"{r.per_second / alone:.2f}",
            "met" if r.per_second >= LINEAR * r.workers * alone else "**missed**",
            f"{r.at(0.5):.1f}, {r.at(0.99):.1f}",
            "met" if r.at(0.5) <= GOAL_MS else "**missed**",
            f"{100 * r.busy:.0f} %",
            f"{r.cpu_ms:.1f}",
        )
        for r in rounds
    ]
    print(table(head, rows))


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=10_000)
    options.add_argument("--ended", type=int, default=0, help="jobs that have ended already")
    options.add_argument("--work", type=float, default=0.05, help="seconds that each job waits (0.05)")
    options.add_argument("--seconds", type=float, default=30, help="of each round (30)")
    execute(measure, options.parse_args())
