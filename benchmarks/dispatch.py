"""What it costs to find out whose turn it is: many queued jobs, claimers that end at once what they claim, a real
PostgreSQL.

    python benchmarks/dispatch.py                            # 10,000 queued jobs, 1,000,000 ended ones
    python benchmarks/dispatch.py --ended 50000 --claims 200

A claimer is a process that does what a worker does around a job: look, claim (row, lease, event), end it (row, event).
The queued jobs belong to twenty tenants; half of the tenants have as many again that nobody here can run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _common import CannotMeasure, execute, parser, say, scratch, spread, table
from growth import postgres
from sqlalchemy import Engine, func, select

from app.blobs.content import ContentStore
from app.db.base import make_engine
from app.db.migrate import upgrade
from app.db.orm import LOCAL_TENANT, Job
from app.db.uow import Database
from app.jobs.ledger import JobLedger
from app.jobs.schedule import Offer
from app.settings import Settings, WorkerSettings
from app.storage.local import LocalStore
from tests.factories import filled

GOAL_MS = 20.0
QUEUE, TENANTS = "anneal.cpu", 20
_ENDED = {"code": "x", "detail": "y"}

ROWS = """
    INSERT INTO jobs
        (id, tenant_id, model_id, status, progress, spec, queue, stages, engine_ids, correlation_id, version, attempts,
         fencing_token, webhook_attempts, created_at, finished_at, told)
    SELECT 'job_{kind}' || lpad(n::text, 12, '0'), {tenant}, '{model}', '{status}', 0, '{spec}', '{queue}', '[]', '[]',
        'c', 1, 0, 0, 0, now(), {finished}, '{status}' = 'succeeded'
    FROM generate_series(1, {count}) n
"""
TENANTS_SQL = f"""
    INSERT INTO tenants (id, name, created_at)
    SELECT 'tnt_' || n, n::text, now() FROM generate_series(0, {TENANTS - 1}) n
"""
SPEC = '{"objective": "latency", "validation": {"metric": "auto"}, "benchmark": {"batch_sizes": [1, 8]}}'


def claimer(url: str, name: str, claims: int) -> dict[str, Any]:
    """One process: how long each claim took, and each with its end, in ms."""
    content = ContentStore(LocalStore(Path("/nonexistent")))
    ledger = JobLedger(Database(make_engine(url)), content, lambda _: True, WorkerSettings())
    offer = Offer(name, (QUEUE, "anneal.hw.cpu-x", f"{QUEUE}.pt2", "anneal.hw.cpu-x.pt2"))
    ledger.waiting(offer)  # connected, and every statement compiled
    claimed, whole = [], []
    sys.stdin.readline()
    for _ in range(claims):
        began = time.perf_counter()
        claim = ledger.claim(offer)
        if claim is None:
            raise CannotMeasure("no job is left")
        claimed.append(1000 * (time.perf_counter() - began))
        ledger.fail(claim, _ENDED, {})
        whole.append(1000 * (time.perf_counter() - began))
    ledger.db.close()
    return {"claim_ms": claimed, "whole_ms": whole}


def fill(engine: Engine, queued: int, ended: int) -> None:
    filled.fill(engine, filled.JOBS_OF_A_MODEL)
    common = {"model": filled.model_id(1), "spec": SPEC}
    waits = {**common, "status": "queued", "finished": "NULL"}
    rows = [
        {
            **common,
            "kind": "e",
            "tenant": f"'{LOCAL_TENANT}'",
            "status": "succeeded",
            "finished": "now()",
            "queue": QUEUE,
        },
        {**waits, "kind": "q", "tenant": f"'tnt_' || mod(n, {TENANTS})", "queue": QUEUE},
        {**waits, "kind": "n", "tenant": f"'tnt_' || mod(n, {TENANTS // 2})", "queue": "anneal.cuda"},
    ]
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql(TENANTS_SQL)
        for values, count in zip(rows, (ended, queued, queued), strict=True):
            connection.exec_driver_sql(ROWS.format(**values, count=count))
    filled.analyze(engine)


def round_of(url: str, count: int, claims: int) -> dict[str, Any]:
    """So many claimers at once."""
    command = [sys.executable, __file__, "--claimer", url, "--claims", str(claims // count)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, "--name", f"w{i}"], **pipes) for i in range(count)]
    time.sleep(3)
    began = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]
    seconds = time.perf_counter() - began
    if any(process.wait() for process in processes):
        raise CannotMeasure("a claimer failed")
    merged = {name: sorted(ms for one in found for ms in one[name]) for name in ("claim_ms", "whole_ms")}
    return {"claimers": count, "per_second": (claims // count) * count / seconds, **merged}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with scratch(arguments.folder), postgres() as url:
        database = Settings(DATABASE_URL=url).database
        say(f"filling it with {arguments.ended:,} ended and {2 * arguments.queued:,} queued jobs …")
        upgrade(database)
        engine = make_engine(database, silence_s=3600)
        try:
            fill(engine, arguments.queued, arguments.ended)
            rounds = [round_of(database, count, arguments.claims) for count in (1, 2, 4)]
            with engine.connect() as connection:
                left = connection.scalar(select(func.count()).select_from(Job).where(Job.status == "queued"))
        finally:
            engine.dispose()
    head = ["claimers", "claim, ms (median, min–max)", "claim and end, ms", "jobs/s", f"goal: ≤ {GOAL_MS:g} ms"]
    rows = [
        [
            str(r["claimers"]),
            spread(r["claim_ms"], 1),
            spread(r["whole_ms"], 1),
            f"{r['per_second']:.0f}",
            "met" if r["whole_ms"][len(r["whole_ms"]) // 2] <= GOAL_MS else "missed",
        ]
        for r in rounds
    ]
    print(table(head, rows))
    print(f"\n{left:,} jobs are still queued.")
    return {"rounds": rounds}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--queued", type=int, default=10_000)
    options.add_argument("--ended", type=int, default=1_000_000)
    options.add_argument("--claims", type=int, default=1000, help="in each round")
    options.add_argument("--claimer", help=argparse.SUPPRESS)
    options.add_argument("--name", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.claimer:
        sys.stdout.write(json.dumps(claimer(given.claimer, given.name, given.claims)) + "\n")
    else:
        execute(measure, given)
