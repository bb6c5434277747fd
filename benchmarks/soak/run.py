"""A soak: PostgreSQL, Redis, S3, two API processes and three workers under real faults, with users at work meanwhile.

    python benchmarks/soak/run.py                              # 200 faults in 45 minutes; nothing else may run here
    python benchmarks/soak/run.py --minutes 8 --faults 35      # about one of each kind
    python benchmarks/soak/run.py --minutes 3 --only 'S3'      # kinds whose names match a regular expression

It ends with every job that could succeed having succeeded; lost, twice, stuck, orphans, leaked bytes, leftover
processes and folders, and stages repeated more than once a fault are counted, and have to be 0: else it exits with 1.
Recovery times by kind are printed as a table, and stand in result.json with everything else (as far as it has come,
from the first minute on). Ctrl-C and SIGTERM end the faults, not the checks. Leases, heartbeats, sweeps and pauses are
the defaults; what keeps files until a clean-up is shorter, so that the run sees the clean-up.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.soak.checks import (
    check_jobs,
    check_leftovers,
    check_stages,
    check_storage,
    open_database,
    wait_for_the_end,
)
from benchmarks.soak.faults import Injector
from benchmarks.soak.gate import Gate, gate
from benchmarks.soak.recoveries import Eyes, Recoveries
from benchmarks.soak.strikes import Field, clock_shim
from benchmarks.soak.strikes_api import ApiStrikes
from benchmarks.soak.strikes_servers import ServerStrikes
from benchmarks.soak.strikes_workers import WorkerStrikes
from benchmarks.soak.users import Accepted, User
from benchmarks.soak.verdict import told, verdict
from tests.cluster.cluster import Cluster, cluster
from tests.factories import every_stage
from tests.factories.small_disk import small_disk

_LAST_JOBS_S = 900.0
_LATER = 1.5  # times its minutes a run may last, until its faults are made
_LOOK_S = 15.0
_SETTINGS = {
    "WORKER_STAGE_TIMEOUT_S": "60",
    "WORKER_MAX_ATTEMPTS": "50",  # a job here is struck more often than any in a year
    "LIMIT_UPLOAD_EXPIRES_S": "90",
    "COLLECT_EVERY_S": "15",
    "COLLECT_GRACE_S": "90",
    "ANNEAL_LOG_JSON": "true",
}
_SMALL_DISK_MB = 1024
_DISKS = {"postgres": 2048, "s3": 1024}


class Soak:
    """`key`: of the tenant in whose name uploads are interrupted."""

    def __init__(self, found: Cluster, before_s3: Gate, disk: Path | None, options: argparse.Namespace) -> None:
        self.found, self.options = found, options
        self.db = open_database(found)
        self.accepted = Accepted()
        keys = [found.run("app", "create-key", "--tenant", f"tenant{i}") for i in range(options.users + 1)]
        self.people = [self._user(i, keys[i]) for i in range(options.users)]
        eyes, draw = Eyes(self.db), random.Random(options.seed)
        struck = self._user(options.users, keys[-1])
        field = Field(found, eyes, before_s3, keys[-1], struck, draw, clock_shim(found.folder), disk)
        self.apis = ApiStrikes(field, self.db)
        kinds = {**WorkerStrikes(field).kinds(), **ServerStrikes(field).kinds(), **self.apis.kinds()}
        kinds = {kind: strike for kind, strike in kinds.items() if re.search(options.only, kind)}
        self.injector = Injector(kinds, Recoveries(eyes, field.a_worker_is_free), draw)

    def _user(self, number: int, key: str) -> User:
        return User(f"user{number}", key, self.found.urls, self.accepted, self.options.seed + number)

    def run(self) -> dict[str, Any]:
        began, minutes = time.monotonic(), self.options.minutes
        over, users_over = self.injector.over, threading.Event()
        users = [threading.Thread(target=user.work, args=(users_over,), daemon=True) for user in self.people]
        limits = (began + 60 * minutes, self.options.faults, began + 60 * _LATER * minutes)
        strikes = threading.Thread(target=self.injector.run, args=limits, daemon=True)
        with ended_by(over):
            for thread in (*users, strikes):
                thread.start()
            while strikes.is_alive():
                strikes.join(_LOOK_S)
                self._so_far(began)
            users_over.set()
            for thread in users:
                thread.join()
            minutes = round((time.monotonic() - began) / 60, 1)
            stuck = wait_for_the_end(self.db, _LAST_JOBS_S)
            self.injector.recoveries.join()
            return {
                **self.seen(minutes),
                "stuck": stuck,
                **check_jobs(self.db, self.accepted),
                "stages": check_stages(self.found, self.db),
                "storage": check_storage(self.found, self.db),
                "starts": {m.name: m.starts for m in self.found.everything()},
            }

    def _so_far(self, began: float) -> None:
        done, taken, ended = self.injector.done.total(), len(self.accepted.jobs), len(self.accepted.ended)
        at = time.strftime("%H:%M:%S")
        print(f"  {at} {done} faults, {taken} jobs taken, {ended} seen to end; {self.injector.now}", flush=True)
        write(self.options.keep, {"whole": False, **self.seen(round((time.monotonic() - began) / 60, 1))})

    def seen(self, minutes: float) -> dict[str, Any]:
        """What needs no end to be told."""
        return {
            "minutes": minutes,
            "workers": self.options.workers,
            "seed": self.options.seed,
            "faults": dict(sorted(self.injector.done.items())),
            "story": [*self.injector.story],
            "in_vain": dict(self.injector.in_vain),
            "recovery": self.injector.recoveries.to_json(),
            "trouble": [*self.accepted.trouble, *self.apis.broken],
            "faults_that_failed": [*self.injector.failed],
        }


@contextmanager
def ended_by(over: threading.Event) -> Iterator[None]:
    """Asked to end, by Ctrl-C or SIGTERM, the run strikes no more, and goes on to its checks; asked again, it ends."""

    def end(number: int, _frame: object) -> None:
        over.set()
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write(folder: Path, result: dict[str, Any]) -> None:
    part = folder / "result.part"
    part.write_text(json.dumps(result, indent=2, default=str))
    part.replace(folder / "result.json")


def soak(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    gates: list[Gate] = []
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(folder / "worker0", _SMALL_DISK_MB))

        def before_s3(url: str) -> str:
            gates.append(stack.enter_context(gate(url)))
            return gates[0].url

        settings = {**_SETTINGS, "PYTHONPATH": str(every_stage.installed(folder / "site"))}
        sizes = {"workers": options.workers, "disks": _DISKS}
        with cluster(folder, **sizes, settings=settings, before_s3=before_s3) as found:
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
    parser.add_argument(
        "--minutes", type=float, default=45.0, help="the faults are spread over; half as many more at most"
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--users", type=int, default=2, help="each has one job at a time: fewer than workers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="a regular expression")
    parser.add_argument("--keep", type=Path, help="a folder for the logs and result.json")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # so that what was begun is ended, and small disks do not stay
        signal.signal(number, signal.default_int_handler)
    options.keep = options.keep or Path(tempfile.mkdtemp(prefix="anneal-soak-"))
    options.keep.mkdir(parents=True, exist_ok=True)
    result = {"whole": True, **soak(options.keep, options)}
    write(options.keep, result)
    print(f"\n{told(result)}")
    wrong = verdict(result)
    if wrong:
        print(f"Logs and result.json: {options.keep}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
