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
from collections.abc import Mapping, Sequence
from datetime import datetime
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
_HANDED_OUT = ("building", "accuracy of those that can win")  # phases of the search, as its report calls them
_ELSE = "between: queue, rows, report"


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


def parts(job: Mapping[str, Any], report: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Seconds of the job by what its own worker did: the search's phases; its stages until there is a bundle; those
    that explain it; and what is left of them all."""
    stages = [(s["name"], *(_at(s[key]) for key in ("started_at", "finished_at"))) for s in job["stages"]]
    phases: dict[str, float] = {}
    for phase in report["search"]["phases"]:
        phases[f"search: {phase['name']}"] = phases.get(f"search: {phase['name']}", 0.0) + phase["seconds"]
    found = {"export": stages[0][2] - stages[0][1], **phases}
    searched, explained = stages[0][2] + sum(phases.values()), False
    for name, begun, ended in stages[1:]:
        if (begun + ended) / 2 > searched:
            part = f"{'explanation' if explained else 'proof'}: {name}"
            found[part] = found.get(part, 0.0) + ended - begun
            explained |= name == "package"
    return {**found, _ELSE: seconds - sum(found.values())}


def _at(told: str) -> float:
    return datetime.fromisoformat(told.replace("Z", "+00:00")).timestamp()


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
            report, job = client.report(job_id), client.job(job_id)
    made = Counter(c["made_by"] for c in report["candidates"] if c["id"].startswith("toy-"))
    if sum(made.values()) != 8 or None in made:
        raise CannotMeasure(f"not all were made: {made}")
    told = parts(job, report, seconds)
    building = told[f"search: {_HANDED_OUT[0]}"]
    return {"seconds": seconds, "building": building, "made": sorted(made.values(), reverse=True), "parts": told}


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
    print()
    print(table(["seconds", *found, "others have a part"], _by_part(found)))
    return {"seconds_each": arguments.seconds, "runs": found}


def _by_part(found: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    """Medians; what lasted a tenth of a second somewhere."""
    names = dict.fromkeys(name for runs in found.values() for run in runs for name in run["parts"])
    at = {n: [statistics.median(r["parts"].get(n, 0.0) for r in runs) for runs in found.values()] for n in names}
    shared = {f"search: {phase}" for phase in _HANDED_OUT}
    rows = [[n, *(f"{v:.1f}" for v in at[n]), "yes" if n in shared else ""] for n in names if max(at[n]) >= 0.1]
    alone = [sum(values) for values in zip(*(at[n] for n in names if n not in shared), strict=True)]
    return [*rows, ["**all that is not shared**", *(f"{v:.1f}" for v in alone), ""]]


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--seconds", type=float, default=8.0, help="that each candidate takes to make")
    execute(measure, options.parse_args())
