"""One job on several workers: eight candidates, each of which takes `--seconds` to make and no processor time (what
machines of one kind do for each other, on one that has not so many), on one worker and on three, and on three of which
one is killed in mid-candidate. On PostgreSQL and Redis, with the settings that a service has by default.

    python benchmarks/together.py               # about five minutes
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _common import CannotMeasure, execute, parser, say, scratch, spread, table, verdict
from sqlalchemy import select

from app.db.sharing import SharedCall
from app.db.uow import Database
from tests import servers
from tests.factories import deployment as factory
from tests.factories.eight_toys_installed import SPEC, installed
from tests.integration.test_plugin import sum_of_constants

_SETTINGS = {"WORKER_LEASE_S": "15", "WORKER_HEARTBEAT_S": "2", "WORKER_SWEEP_S": "3", "WORKER_REDISPATCH_S": "15"}
_GOAL = 0.5


def kill_a_helper(db: Database, job_id: str) -> None:
    """The first that is seen at a call."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with db.read() as session:
            at_work = (SharedCall.job_id == job_id, SharedCall.begun_at.is_not(None), SharedCall.ended_at.is_(None))
            owner = session.scalar(select(SharedCall.lease_owner).where(*at_work).limit(1))
        if owner:
            os.kill(int(owner.rpartition("-")[2]), signal.SIGKILL)
            return
        time.sleep(0.05)
    raise CannotMeasure("nobody helps")


def run_job(url: str, redis_url: str, folder: Path, workers: int, arguments: argparse.Namespace, *, kill: bool) -> Any:
    """Seconds of the job, and of building its candidates, as its report tells; who made them."""
    extra = {**_SETTINGS, "BROKER_URL": redis_url, "DATABASE_URL": url, "TOY_SECONDS": str(arguments.seconds)}
    with factory.deployment(folder / "home", {**extra, "PYTHONPATH": str(installed(folder / "site"))}) as deployed:
        for _ in range(workers):
            deployed.start_worker()
        with deployed.client() as client:
            deployed.wait_for(lambda: len(client.capabilities()["workers"]) == workers, 60)
            time.sleep(3)  # they are idle, and listen
            model = client.upload_model(sum_of_constants(folder / "sum.onnx"), "sum")
            spec = {**SPEC, "budget_seconds": int(40 * arguments.seconds) + 60}
            began = time.monotonic()
            job_id = client.submit({"model_id": model["id"], **spec})["id"]
            if kill:
                db = deployed.database()
                kill_a_helper(db, job_id)
                db.close()
            client.wait(job_id)
            seconds = time.monotonic() - began
            report = client.report(job_id)
    made = Counter(c["made_by"] for c in report["candidates"] if c["id"].startswith("toy-"))
    if sum(made.values()) != 8 or None in made:
        raise CannotMeasure(f"not all were made: {made}")
    building = next(p["seconds"] for p in report["search"]["phases"] if p["name"] == "building")
    return {"seconds": seconds, "building": building, "made": sorted(made.values(), reverse=True)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    setups = {"1 worker": (1, False), "3 workers": (3, False), "3 workers, one killed": (3, True)}
    found: dict[str, list[Any]] = {name: [] for name in setups}
    with scratch(arguments.folder) as folder, servers.postgres() as url, servers.redis_server() as redis_url:
        for number in range(arguments.rounds):
            for name, (workers, kill) in setups.items():
                place = folder / f"{number}-{workers}-{kill}"
                place.mkdir()
                with servers.new_database(url) as database:
                    got = run_job(database, redis_url, place, workers, arguments, kill=kill)
                found[name].append(got)
                say(f"  {name}: {got['seconds']:.1f} s, candidates {got['building']:.1f} s, made {got['made']}")
    alone = statistics.median(r["seconds"] for r in found["1 worker"])
    rows = []
    for name, runs in found.items():
        share = statistics.median(r["seconds"] for r in runs) / alone
        goal = verdict(share <= _GOAL) if name == "3 workers" else ""
        made = ", ".join("+".join(map(str, r["made"])) for r in runs)
        seconds, building = ([r[key] for r in runs] for key in ("seconds", "building"))
        rows.append([name, spread(seconds, 1, " s"), f"{share:.2f}", spread(building, 1, " s"), made, goal])
    head = ["", "the job", "over one worker's", "its candidates", "made, by worker", f"goal ≤ {_GOAL:g}"]
    print(table(head, rows))
    return {"seconds_each": arguments.seconds, "runs": found}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--seconds", type=float, default=8.0, help="that each candidate takes to make")
    execute(measure, options.parse_args())
