"""A soak: PostgreSQL, Redis, S3, two API processes and three workers under real faults, with users at work meanwhile.

    python benchmarks/soak/run.py                            # 30 minutes, 150 faults; nothing else may run here
    python benchmarks/soak/run.py --minutes 3 --faults 15    # a short one

It ends with every job that could succeed having succeeded; lost, twice, stuck, orphans, leaked bytes, leftover
processes and folders are counted, and have to be 0: else it exits with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from checks import check_jobs, check_leftovers, check_storage, open_database, wait_for_the_end
from faults import Injector
from users import Accepted, User

from tests.cluster.cluster import Cluster, cluster

_LAST_JOBS_S = 600.0
_ZERO = ("lost_jobs", "lost_models", "ended_twice", "never_ended", "engines_twice", "without_engine")


def soak(found: Cluster, minutes: float, faults: int, users: int, seed: int) -> dict[str, Any]:
    accepted = Accepted()
    until = time.monotonic() + 60 * minutes
    keys = [found.run("app", "create-key", "--tenant", f"tenant{i}") for i in range(users + 1)]
    people = [User(f"user{i}", keys[i], found.urls, accepted, seed + i) for i in range(users)]
    threads = [threading.Thread(target=user.work, args=(until,), daemon=True) for user in people]
    injector = Injector(found, keys[-1], seed)
    threads.append(threading.Thread(target=injector.run, args=(until - 5, faults), daemon=True))
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        time.sleep(15)
        ended = len(accepted.ended)
        print(
            f"  {sum(injector.done.values())} faults, {len(accepted.jobs)} jobs taken, {ended} seen to end", flush=True
        )
    db = open_database(found)
    try:
        stuck = wait_for_the_end(db, _LAST_JOBS_S)
        result = {
            "minutes": minutes,
            "faults": dict(sorted(injector.done.items())),
            "stuck": stuck,
            "trouble": accepted.trouble,
            "faults_that_failed": injector.failed,
            **check_jobs(db, accepted),
            "storage": check_storage(found, db),
            "starts": {m.name: m.starts for m in found.everything()},
        }
    finally:
        db.close()
    return result


def verdict(result: dict[str, Any]) -> list[str]:
    """What is wrong, in words; empty where all is well."""
    wrong = [f"{name}: {result[name]}" for name in _ZERO if result[name]]
    wrong += [f"{name}: {result[name]}" for name in ("stuck", "same_key_twice", "trouble") if result[name]]
    wrong += [f"failed: {result['failures']} {result['failed_details']}"] if result["failures"] else []
    storage, left = result["storage"], result["left"]
    wrong += [f"orphans: {storage['orphans'][:5]}, {storage['bytes']} bytes"] if storage["orphans"] else []
    wrong += [f"uploads left open: {storage['open_uploads'][:5]}"] if storage["open_uploads"] else []
    return wrong + [f"left over: {name} {left[name][:5]}" for name in ("processes", "files") if left[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--faults", type=int, default=160)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the logs and result.json")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="anneal-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    with cluster(folder, workers=arguments.workers) as found:
        result = soak(found, arguments.minutes, arguments.faults, arguments.users, arguments.seed)
    time.sleep(2)
    result["left"] = check_leftovers(found)
    (folder / "result.json").write_text(json.dumps(result, indent=2, default=str))
    print(f"\n{sum(result['faults'].values())} faults in {arguments.minutes:g} minutes, {arguments.workers} workers:")
    for kind, count in result["faults"].items():
        print(f"  {count:4d}  {kind}")
    print(f"{result['jobs']} jobs: {result['status']}; {result['storage']['blobs']} blobs; starts: {result['starts']}")
    for line in result["faults_that_failed"]:
        print(f"a fault could not be made: {line[:500]}")
    wrong = verdict(result)
    for line in wrong:
        print(f"WRONG  {line}")
    zero = "lost 0, twice 0, stuck 0, orphans 0, leaked bytes 0, leftover processes 0, leftover folders 0"
    print(f"Logs and result.json: {folder}" if wrong else zero)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
