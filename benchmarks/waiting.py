"""200 long polls and 200 event streams at one API process: its memory, how late they hear of a change, and what other
requests notice of them.

    python benchmarks/waiting.py                      # about two minutes
    python benchmarks/waiting.py --waiters 1000       # of each kind

One API process on a durable PostgreSQL, 200 running jobs, each with a long poll and an event stream (`_waiters.py`, a
process of its own); jobs change as workers change them, so many a second. Delays count from the commit of the change to
the client's having it. "Others" are polls and lists of a third client, one after the other, fifty a second at most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _common import HERE, MIB, CannotMeasure, Server, api, execute, parser, say, scratch, table, verdict
from dispatch import QUEUE, ROWS, SPEC
from growth import postgres

from app.blobs.content import ContentStore
from app.db.base import make_engine
from app.db.orm import LOCAL_TENANT
from app.db.uow import Database
from app.jobs.ledger import Claim, JobLedger
from app.jobs.schedule import Offer
from app.settings import Settings, WorkerSettings
from app.storage.local import LocalStore
from app.tenants import create_key
from tests.factories import filled

JOBS = 200
DELAY_GOAL_MS, OTHERS_GOAL_MS, MEMORY_GOAL_KIB = 500.0, 50.0, 256.0
_EVERY_S = 0.02  # of the other requests


@dataclass
class Phase:
    """So many changes a second; what came of it, in ms."""

    changes_s: float
    waiters: bool
    others: list[float]
    streams: list[float] = field(default_factory=list)
    polls: list[float] = field(default_factory=list)
    missed: int = 0
    cpu: float = 0.0


class Changer:
    """Changes jobs in turns, as their workers do; knows when each change was committed."""

    def __init__(self, ledger: JobLedger, claims: list[Claim]) -> None:
        self._ledger, self._claims = ledger, claims
        self.jobs = [claim.job_id for claim in claims]
        self.committed: dict[int, float] = {}

    def run(self, per_second: float, seconds: float) -> range:
        """The numbers of the changes that were made."""
        first = number = len(self.committed) + 1
        began = time.monotonic()
        while per_second and time.monotonic() - began < seconds:
            claim = self._claims[number % len(self._claims)]
            self._ledger.progress(claim, {"progress": number / 1e6}, "progress", {"n": number})
            self.committed[number] = time.monotonic()
            number += 1
            time.sleep(max(0.0, began + (number - first) / per_second - time.monotonic()))
        return range(first, number)


def others(client: httpx.Client, jobs: list[str], until: threading.Event, found: list[float]) -> None:
    number = 0
    while not until.wait(_EVERY_S):
        number += 1
        path = f"/v1/jobs/{jobs[number % len(jobs)]}" if number % 4 else "/v1/jobs?limit=5"
        began = time.perf_counter()
        if client.get(path).status_code != httpx.codes.OK:
            raise CannotMeasure(f"GET {path} failed")
        found.append(1000 * (time.perf_counter() - began))


@contextlib.contextmanager
def waiting(server: Server, key: str, jobs: list[str], each: int) -> Iterator[dict[str, Any]]:
    """The waiters; what they saw stands in the dictionary afterwards."""
    asked = {"port": server.port, "key": key, "jobs": jobs, "polls": each, "streams": each}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, str(HERE / "_waiters.py")], **pipes)
    seen: dict[str, Any] = {}
    try:
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        if process.stdout.readline() != "ready\n":
            raise CannotMeasure("the waiters were not let in")
        yield seen
        process.stdin.write("end\n")
        process.stdin.flush()
        seen |= json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def phase(
    changer: Changer, server: Server, client: httpx.Client, jobs: list[str], per_second: float, seconds: float
) -> tuple[Phase, range]:
    over, found, process = threading.Event(), list[float](), psutil.Process(server.pid)
    thread = threading.Thread(target=others, args=(client, jobs, over, found))
    before = sum(process.cpu_times()[:2])
    thread.start()
    began = time.monotonic()
    made = changer.run(per_second, seconds)
    time.sleep(max(0.0, began + seconds - time.monotonic()) + 1)
    over.set()
    thread.join()
    used = sum(process.cpu_times()[:2]) - before
    return Phase(per_second, False, sorted(found), cpu=used / (time.monotonic() - began)), made


def note_delays(found: Phase, made: range, changer: Changer, seen: dict[str, Any]) -> None:
    """A poll tells the newest change only: what it did not tell was overtaken, unless it heard of nothing later."""
    found.waiters = True
    heard = {(job, number): at for job, number, at in seen["streams"]}
    by_number: dict[int, list[float]] = {}
    for (_, number), at in heard.items():
        by_number.setdefault(number, []).append(at)
    for number in made:
        told = by_number.get(number, [])
        found.missed += not told
        found.streams += [1000 * (at - changer.committed[number]) for at in told]
    found.polls = [1000 * (at - changer.committed[n]) for _, n, at in seen["polls"] if n in made]
    found.streams.sort()
    found.polls.sort()


def at(values: list[float], part: float) -> float:
    return values[min(len(values) - 1, int(part * len(values)))] if values else float("nan")


def make_jobs(db: Database, ledger: JobLedger) -> list[Claim]:
    filled.fill_with_jobs(db.engine, filled.JOBS_OF_A_MODEL)
    rows = {"model": filled.model_id(1), "spec": SPEC, "status": "queued", "finished": "NULL", "kind": "q"}
    with db.engine.begin() as connection:
        connection.exec_driver_sql(ROWS.format(**rows, tenant=f"'{LOCAL_TENANT}'", queue=QUEUE, count=JOBS))
    filled.analyze(db.engine)
    claims = [ledger.claim(Offer(f"w{i}", (QUEUE,))) for i in range(JOBS)]
    return [claim for claim in claims if claim is not None]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    # The benchmark is no worker: nobody renews its leases.
    extra = {"LIMIT_WAITING_PER_TENANT": "100000", "LIMIT_CONNECTIONS_PER_ADDRESS": "0", "ANNEAL_LOG_LEVEL": "WARNING"}
    with (
        scratch(arguments.folder) as folder,
        postgres() as url,
        api(folder / "home", {"DATABASE_URL": url, **extra}) as server,
        contextlib.closing(Database(make_engine(Settings(DATABASE_URL=url).database))) as db,
    ):
        ledger = JobLedger(db, ContentStore(LocalStore(folder)), lambda _: True, WorkerSettings(lease_s=3600))
        claims, key = make_jobs(db, ledger), create_key(db, "local", "benchmark")
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=server.url, headers=headers, trust_env=False, timeout=60) as client:
            return compare(server, client, key, Changer(ledger, claims), arguments)


def compare(
    server: Server, client: httpx.Client, key: str, changer: Changer, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Nobody waits; then all do."""
    rates = [float(rate) for rate in arguments.changes.split(",")]
    process = psutil.Process(server.pid)

    def run(rate: float) -> tuple[Phase, range]:
        return phase(changer, server, client, changer.jobs, rate, arguments.seconds)

    run(rates[-1])  # warm-up
    phases = [run(rate)[0] for rate in rates]
    idle = process.memory_info().rss
    with waiting(server, key, changer.jobs, arguments.waiters) as seen:
        held = process.memory_info().rss
        say(f"  {2 * arguments.waiters} wait, with {(held - idle) / MIB:.1f} MiB")
        made = [run(rate) for rate in rates]
        most, threads = process.memory_info().rss, process.num_threads()
    for found, numbers in made:
        note_delays(found, numbers, changer, seen)
    phases += [found for found, _ in made]
    memory = {"idle": idle, "waiting": held, "afterwards": most, "threads": threads}
    show(phases, memory, seen["lost"], arguments)
    return {"phases": [vars(found) for found in phases], "memory": memory, "lost": seen["lost"]}


def show(phases: list[Phase], memory: dict[str, int], lost: list[str], arguments: argparse.Namespace) -> None:
    print(
        f"{arguments.waiters} long polls and {arguments.waiters} streams of {JOBS} jobs, {arguments.seconds:g} s each\n"
    )
    rows = []
    for found in phases:
        late = [f"{at(v, 0.5):.0f}, {at(v, 0.99):.0f}" if v else "–" for v in (found.streams, found.polls)]
        good = at(found.streams, 0.99) <= DELAY_GOAL_MS if found.streams else None
        rows.append(
            (
                str(2 * arguments.waiters if found.waiters else 0),
                f"{found.changes_s:g}",
                *late,
                "–" if good is None else verdict(good and not found.missed),
                f"{at(found.others, 0.5):.1f}, {at(found.others, 0.99):.1f}",
                verdict(at(found.others, 0.99) <= OTHERS_GOAL_MS),
                f"{100 * found.cpu:.0f} %",
            )
        )
    head = (
        "who waits", "changes/s", "streams late, ms (p50, p99)", "polls late, ms (p50, p99)",
        f"p99 ≤ {DELAY_GOAL_MS:g} ms", "other requests, ms (p50, p99)", f"p99 ≤ {OTHERS_GOAL_MS:g} ms",
        "CPU of the API",
    )  # fmt: skip
    print(table(head, rows))
    each = [(memory[name] - memory["idle"]) / 1024 / (2 * arguments.waiters) for name in ("waiting", "afterwards")]
    print(
        f"\nMemory: {memory['idle'] / MIB:.0f} MiB before, {memory['waiting'] / MIB:.0f} with all waiting, "
        f"{memory['afterwards'] / MIB:.0f} after the changes: {each[0]:.0f} and {each[1]:.0f} KiB each "
        f"(goal ≤ {MEMORY_GOAL_KIB:g}: {verdict(each[1] <= MEMORY_GOAL_KIB)}). {memory['threads']} threads. "
        f"{sum(found.missed for found in phases)} changes were never told; {len(lost)} connections were lost."
    )


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--waiters", type=int, default=200, help="of each kind (200)")
    options.add_argument("--changes", default="0,20,100", help="a second, of each phase (0,20,100)")
    options.add_argument("--seconds", type=float, default=15, help="of each phase (15)")
    execute(measure, options.parse_args())
