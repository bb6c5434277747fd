"""How long a job waits for another worker when its own dies: real workers, killed (SIGKILL; seen by the idle one beside
them, and as if they were on a machine of their own) and told to end (SIGTERM), on PostgreSQL and Redis, with the
settings that a service has by default.

    python benchmarks/recovery.py               # 5 of each: about seven minutes
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _common import CannotMeasure, execute, parser, say, scratch, spread, table

from app.db.uow import Database
from tests import servers
from tests.factories import deployment as factory

GOALS_S = {"SIGKILL": 20.0, "SIGKILL, on another machine": 20.0, "SIGTERM": 5.0}
_SETTINGS = {"WORKER_LEASE_S": "15", "WORKER_HEARTBEAT_S": "2", "WORKER_SWEEP_S": "3", "WORKER_REDISPATCH_S": "15"}


def recovery(deployed: factory.Deployment, db: Database, folder: Path, how: str, seed: int) -> float:
    """Seconds from the signal to another worker's claim. Leaves one worker idle."""
    with deployed.client() as client:
        ids = {p.pid for p in deployed.processes if p.poll() is None and "workers" in " ".join(map(str, p.args))}
        job_id = factory.submit_case(client, folder, seed, benchmark={"batch_sizes": [1], "min_seconds": 3})["id"]
        if factory.wait_for_stage(db, job_id, {"benchmark"}) is None:
            raise CannotMeasure("the job ended too early")
        first = factory.job_row(db, job_id).lease_owner
        assert first is not None
        pid = int(first.rpartition("-")[2])
        if pid not in ids:
            raise CannotMeasure(f"no process is {first}")
        if "another machine" in how:
            hide_lock(pid)
        began = time.monotonic()
        os.kill(pid, signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        while (now := factory.job_row(db, job_id).lease_owner) in (None, first):
            if time.monotonic() - began > 120:
                raise CannotMeasure(f"nobody took it: {now}")
            time.sleep(0.02)
        seconds = time.monotonic() - began
        client.cancel(job_id)
        client.wait(job_id, check=False)
    return seconds


def hide_lock(pid: int) -> None:
    """Remove the file by which other workers of this machine see that this one is dead."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = link.readlink()
            if target.name.startswith("anneal-alive-"):
                target.unlink()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    with scratch(arguments.folder) as folder, servers.postgres() as url, servers.redis_server() as redis_url:
        extra = {**_SETTINGS, "BROKER_URL": redis_url}
        with (
            servers.new_database(url) as database,
            factory.deployment(folder / "home", {**extra, "DATABASE_URL": database}) as deployed,
        ):
            db = deployed.database()
            deployed.start_worker()
            for number in range(len(GOALS_S) * arguments.rounds):
                how = [*GOALS_S][number % len(GOALS_S)]
                deployed.start_worker()
                with deployed.client() as client:
                    deployed.wait_for(lambda: len(client.capabilities()["workers"]) >= 2, 60)
                time.sleep(3)  # it is idle, and listens
                seconds = recovery(deployed, db, folder, how, 100 + number)
                found.setdefault(how, []).append(seconds)
                say(f"  {how}: {seconds:.1f} s")
                time.sleep(11)  # who died is not live any more
            db.close()
    rows = [[how, spread(found[how], 1, " s"), f"{goal:g} s"] for how, goal in GOALS_S.items()]
    print(table(["what", "until another worker has the job, median (min–max)", "goal"], rows))
    return {"seconds": found}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5, help="of each")
    execute(measure, options.parse_args())
