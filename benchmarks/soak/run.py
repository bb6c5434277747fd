"""A soak: PostgreSQL, Redis, S3, two API processes and three workers under real faults, with users at work meanwhile.

    python benchmarks/soak/run.py                              # 200 faults in 45 minutes; nothing else may run here
    python benchmarks/soak/run.py --minutes 8 --faults 35      # about one of each kind
    python benchmarks/soak/run.py --minutes 3 --only 'S3'      # kinds whose names match a regular expression

It ends with every job that could succeed having succeeded; lost, twice, stuck, orphans, leaked bytes, leftover
processes and folders, and stages repeated more than once a fault are counted, and have to be 0: else it exits with 1.
Recovery times by kind are printed as a table, and stand in result.json with everything else. Leases, heartbeats, sweeps
and pauses are the defaults; what keeps files until a clean-up is shorter, so that the run sees the clean-up.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from checks import check_jobs, check_leftovers, check_stages, check_storage, open_database, wait_for_the_end
from faults import Injector
from gate import Gate, gate
from recoveries import Eyes, Recoveries, table
from strikes import Field, clock_shim, small_disk
from strikes_api import ApiStrikes
from strikes_servers import ServerStrikes
from strikes_workers import WorkerStrikes
from users import Accepted, User

from tests.cluster.cluster import Cluster, cluster

_LAST_JOBS_S = 900.0
_ZERO = ("lost_jobs", "lost_models", "ended_twice", "never_ended", "engines_twice", "without_engine")
_SETTINGS = {
    "WORKER_STAGE_TIMEOUT_S": "60",
    "WORKER_MAX_ATTEMPTS": "50",  # a job here is struck more often than any in a year
    "LIMIT_UPLOAD_EXPIRES_S": "90",
    "COLLECT_EVERY_S": "15",
    "COLLECT_GRACE_S": "90",
    "ANNEAL_LOG_JSON": "true",
}
_SMALL_DISK_MB = 1024


class Soak:
    """`key`: of the tenant in whose name uploads are interrupted."""

    def __init__(self, found: Cluster, before_s3: Gate, disk: Path | None, options: argparse.Namespace) -> None:
        self.found, self.options = found, options
        self.db = open_database(found)
        self.accepted = Accepted()
        keys = [found.run("app", "create-key", "--tenant", f"tenant{i}") for i in range(options.users + 1)]
        self.people = [self._user(i, keys[i]) for i in range(options.users)]
        eyes, draw = Eyes(self.db), random.Random(options.seed)
        field = Field(found, eyes, before_s3, keys[-1], draw, clock_shim(found.folder), disk)
        self.apis = ApiStrikes(field, self.db)
        kinds = {**WorkerStrikes(field).kinds(), **ServerStrikes(field).kinds(), **self.apis.kinds()}
        kinds = {kind: strike for kind, strike in kinds.items() if re.search(options.only, kind)}
        self.injector = Injector(kinds, Recoveries(eyes), draw)

    def _user(self, number: int, key: str) -> User:
        return User(f"user{number}", key, self.found.urls, self.accepted, self.options.seed + number)

    def run(self) -> dict[str, Any]:
        until = time.monotonic() + 60 * self.options.minutes
        threads = [threading.Thread(target=user.work, args=(until,), daemon=True) for user in self.people]
        strikes = threading.Thread(target=self.injector.run, args=(until - 5, self.options.faults), daemon=True)
        for thread in (*threads, strikes):
            thread.start()
        while any(t.is_alive() for t in (*threads, strikes)):
            time.sleep(15)
            done, taken, ended = self.injector.done.total(), len(self.accepted.jobs), len(self.accepted.ended)
            print(f"  {done} faults, {taken} jobs taken, {ended} seen to end; {self.injector.now}", flush=True)
        stuck = wait_for_the_end(self.db, _LAST_JOBS_S)
        self.injector.recoveries.join()
        return {
            "minutes": self.options.minutes,
            "faults": dict(sorted(self.injector.done.items())),
            "in_vain": dict(self.injector.in_vain),
            "recovery": self.injector.recoveries.to_json(),
            "stuck": stuck,
            "trouble": [*self.accepted.trouble, *self.apis.broken],
            "faults_that_failed": self.injector.failed,
            **check_jobs(self.db, self.accepted),
            "stages": check_stages(self.found, self.db),
            "storage": check_storage(self.found, self.db),
            "starts": {m.name: m.starts for m in self.found.everything()},
        }


def verdict(result: dict[str, Any]) -> list[str]:
    """What is wrong, in words; empty where all is well."""
    wrong = [f"{name}: {result[name]}" for name in _ZERO if result[name]]
    wrong += [f"{name}: {result[name]}" for name in ("stuck", "same_key_twice", "trouble") if result[name]]
    wrong += [f"failed: {result['failures']} {result['failed_details']}"] if result["failures"] else []
    again = result["stages"]["more_than_one_a_fault"]
    short = {job: {k: v for k, v in told.items() if k != "story"} for job, told in again.items()}
    wrong += [f"more than one stage repeated a fault: {short}"] if again else []
    never = {kind: times["never"] for kind, times in result["recovery"].items() if times["never"]}
    wrong += [f"not recovered within three minutes: {never}"] if never else []
    storage, left = result["storage"], result["left"]
    wrong += [f"orphans: {storage['orphans'][:5]}, {storage['bytes']} bytes"] if storage["orphans"] else []
    wrong += [f"uploads left open: {storage['open_uploads'][:5]}"] if storage["open_uploads"] else []
    return wrong + [f"left over: {name} {left[name][:5]}" for name in ("processes", "files") if left[name]]


def soak(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    gates: list[Gate] = []
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(folder / "worker0", _SMALL_DISK_MB))

        def before_s3(url: str) -> str:
            gates.append(stack.enter_context(gate(url)))
            return gates[0].url

        with cluster(folder, workers=options.workers, settings=_SETTINGS, before_s3=before_s3) as found:
            running = Soak(found, gates[0], disk, options)
            try:
                result = running.run()
            finally:
                running.db.close()
        time.sleep(2)
        result["left"] = check_leftovers(found)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--users", type=int, default=2, help="each has one job at a time: fewer than workers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="a regular expression")
    parser.add_argument("--keep", type=Path, help="a folder for the logs and result.json")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="anneal-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    result = soak(folder, options)
    (folder / "result.json").write_text(json.dumps(result, indent=2, default=str))
    print(f"\n{sum(result['faults'].values())} faults in {options.minutes:g} minutes, {options.workers} workers\n")
    print(table(result["recovery"], result["faults"]))
    print("\nSeconds, median / maximum; those of servers from when they were there again.\n")
    print(f"{result['jobs']} jobs: {result['status']}; {result['storage']['blobs']} blobs; starts: {result['starts']}")
    print(f"stages: { ({k: v for k, v in result['stages'].items() if k != 'more_than_one_a_fault'}) }")
    for line in result["faults_that_failed"]:
        print(f"a fault could not be made: {line[:500]}")
    if result["in_vain"]:
        print(f"nothing to strike: {result['in_vain']}")
    wrong = verdict(result)
    for line in wrong:
        print(f"WRONG  {line}")
    zero = "lost 0, twice 0, stuck 0, orphans 0, leaked bytes 0, leftover processes 0, leftover folders 0"
    print(f"Logs and result.json: {folder}" if wrong else f"{zero}, more than one stage repeated a fault 0")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
