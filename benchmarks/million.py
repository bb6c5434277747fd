"""A service whose table of jobs has a million rows, beside one that was just installed: the same questions, in turns.

    python benchmarks/million.py                  # 1,000,000 ended jobs; about six minutes
    python benchmarks/million.py --jobs 100000

One durable PostgreSQL with two databases, and an API process on each. Both have the same few queued jobs, of twenty
tenants; beside them the one has 400 ended jobs, and the other a million, with 50,000 models and two events each. Every
figure is the median of twenty of the same question; ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _common import CannotMeasure, Contest, api, execute, parser, say, scratch, spread, table, verdict
from dispatch import QUEUE, ROWS, SPEC, TENANTS, TENANTS_SQL
from growth import postgres, timed
from sqlalchemy import Engine

from app.blobs.content import ContentStore
from app.db.base import make_engine
from app.db.migrate import upgrade
from app.db.uow import Database
from app.jobs.ledger import JobLedger
from app.jobs.schedule import Offer
from app.settings import Settings, WorkerSettings
from app.storage.local import LocalStore
from app.tenants import create_key
from tests.factories import filled
from tests.servers import new_database

FULL, EMPTY = "a million", "almost none"
GOAL = 1.5
_CALLS = 20
_FEW = 400  # so that on both sides each status is asked for the first time: no document is kept of it
_CACHED_S = 1.1  # for so long, scrapes of the metrics share one count
_ENDED = {"code": "x", "detail": "y"}


@dataclass
class Side:
    """One of the two services."""

    ledger: JobLedger
    client: httpx.Client
    jobs: int

    def get(self, path: str) -> None:
        answer = self.client.get(path)
        if answer.status_code != httpx.codes.OK:
            raise CannotMeasure(f"GET {path} answered {answer.status_code}: {answer.text[:500]}")


OFFER = Offer("w1", (QUEUE, "anneal.hw.cpu-x"))


def questions() -> dict[str, tuple[Callable[[Side, int], object], float, int]]:
    """By name: what is asked (the number of the call chooses the rows), the pause before each, and how many a figure
    is made of."""

    def ended(side: Side, number: int) -> str:
        return filled.job_id((number * 7919) % side.jobs + 1)

    def claim(side: Side, _number: int) -> None:
        if side.ledger.claim(OFFER) is None:
            raise CannotMeasure("no job is left to claim")

    def claim_and_end(side: Side, _number: int) -> None:
        found = side.ledger.claim(OFFER)
        if found is None:
            raise CannotMeasure("no job is left to claim")
        side.ledger.fail(found, _ENDED, {})

    return {
        "status: `GET /v1/jobs/{id}`, ended": (lambda s, n: s.get(f"/v1/jobs/{ended(s, n)}"), 0, _CALLS),
        "list: `GET /v1/jobs`": (lambda s, _: s.get("/v1/jobs?limit=20"), 0, _CALLS),
        "list: `?status=failed`": (lambda s, _: s.get("/v1/jobs?status=failed&limit=4"), 0, _CALLS),
        "list: `?status=cancelled` (none)": (lambda s, _: s.get("/v1/jobs?status=cancelled"), 0, _CALLS),
        "list: `?model_id=…`": (lambda s, _: s.get(f"/v1/jobs?limit=20&model_id={filled.model_id(2)}"), 0, _CALLS),
        "claim": (claim, 0, _CALLS),
        "claim, and its end": (claim_and_end, 0, _CALLS),
        "`GET /metrics`": (lambda s, _: s.get("/metrics"), _CACHED_S, 2),
    }


def fill(engine: Engine, ended: int, queued: int) -> None:
    filled.fill_with_jobs(engine, ended)
    common = {"model": filled.model_id(1), "spec": SPEC, "status": "queued", "finished": "NULL", "kind": "q"}
    rows = ROWS.format(**common, tenant=f"'tnt_' || mod(n, {TENANTS})", queue=QUEUE, count=queued)
    with engine.begin() as connection:
        connection.exec_driver_sql(TENANTS_SQL)
        connection.exec_driver_sql(rows)
    filled.analyze(engine)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    queued = 2 * (_CALLS + 1) * arguments.rounds + 200
    with (
        scratch(arguments.folder) as folder,
        postgres() as url,
        new_database(url) as other,
        serving(folder / "full", url, arguments.jobs, queued) as full,
        serving(folder / "empty", other, _FEW, queued) as empty,
    ):
        return contests({FULL: full, EMPTY: empty}, arguments)


@contextmanager
def serving(home: Path, url: str, jobs: int, queued: int) -> Iterator[Side]:
    """A service on this database, filled with so many ended and queued jobs."""
    settings = Settings(home=home, DATABASE_URL=url)
    upgrade(settings.database)
    filler, began = make_engine(settings.database, silence_s=3600), time.perf_counter()
    fill(filler, jobs, queued)
    filler.dispose()
    say(f"  {jobs:,} jobs in {time.perf_counter() - began:.0f} s")
    with closing(Database(make_engine(settings.database))) as db, api(home, {"DATABASE_URL": url}) as server:
        headers = {"Authorization": f"Bearer {create_key(db, 'local', 'benchmark')}"}
        ledger = JobLedger(db, ContentStore(LocalStore(home / "none")), lambda _: True, WorkerSettings())
        with httpx.Client(base_url=server.url, headers=headers, trust_env=False, timeout=60) as client:
            yield Side(ledger, client, jobs)


def contests(sides: dict[str, Side], arguments: argparse.Namespace) -> dict[str, Any]:
    rows, told = [], {}
    for name, (ask, pause_s, calls) in questions().items():
        contest, asked = Contest([FULL, EMPTY]), 0

        def turn(who: str, ask: Any = ask, pause_s: float = pause_s, calls: int = calls) -> float:
            nonlocal asked
            asked += calls
            return statistics.median(timed(lambda n: ask(sides[who], asked + n), calls, pause_s))

        contest.run(arguments.rounds, turn)
        ratio = contest.ratio(FULL, EMPTY)
        say(f"  {name}: {contest.median(FULL):.2f} ms, {ratio}")
        mine, theirs = (spread(contest.values[side], 1) for side in (FULL, EMPTY))
        rows.append((name, mine, theirs, f"{ratio.median:.2f} ×", f"≤ {GOAL:g} ×", verdict(ratio.median <= GOAL)))
        told[name] = {"ms": contest.values, "ratio": ratio.to_json()}
    print(f"PostgreSQL, {arguments.jobs:,} ended jobs beside {_FEW}, {arguments.rounds} rounds in turns, in ms\n")
    print(table(("what", f"{arguments.jobs:,} jobs", f"{_FEW} jobs", "ratio", "goal", "verdict"), rows))
    return told


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=1_000_000)
    options.add_argument("--rounds", type=int, default=9)
    execute(measure, options.parse_args())
