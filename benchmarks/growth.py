"""What the service's own questions cost once a database has many rows, on a real PostgreSQL.

    python benchmarks/growth.py                 # 200,000 jobs
    python benchmarks/growth.py --jobs 20000

Every job has an engine (but every tenth), report, manifest and a stage result; every twenty share a model. The database
is durable, analyzed, and holds nothing in memory but what the questions before left there. "Whole tables" is the same
question in a session that may use no index: what it costs, about, where there is none.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _common import CannotMeasure, Server, api, execute, parser, say, scratch, spread, table
from sqlalchemy import text
from sqlalchemy.orm import Session

from app.blobs.collector import Collector
from app.blobs.content import ContentStore
from app.blobs.references import is_referenced, referenced
from app.capabilities.repository import StatisticsRepository
from app.db.base import make_engine
from app.db.migrate import upgrade
from app.db.orm import LOCAL_TENANT
from app.db.uow import Database
from app.settings import Settings
from app.storage.factory import make_store
from app.tenants import create_key
from tests import servers
from tests.factories import filled

_CACHED_S = 1.1  # for so long, scrapes of the metrics share one count


@contextmanager
def postgres() -> Iterator[str]:
    """As durable as a real one, whose files the tests' server does not wait for."""
    user = servers.unprivileged()
    with servers.temporary_folder("postgres", owner=user) as folder:
        binaries, data, password = servers.postgres_installation(folder, user), folder / "data", secrets.token_hex(8)
        servers.init_database(binaries, data, password, user)
        port = servers.free_port()
        with servers.postmaster(binaries, data, password, user, port=port, durable=True):
            yield f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"


def timed(call: Callable[[int], object], rounds: int, pause_s: float = 0.0) -> list[float]:
    """Milliseconds of each round, the first of all left out."""
    found = []
    for number in range(rounds + 1):
        time.sleep(pause_s)
        began = time.perf_counter()
        call(number)
        found.append(1000 * (time.perf_counter() - began))
    return found[1:]


def questions(jobs: int) -> dict[str, Callable[[Session, int], object]]:
    """What is asked of the database alone, by name; the number of the round chooses the rows."""

    def page(number: int) -> list[str]:
        kinds = ("report", "manifest", "engine", "bundle", "output")
        return [filled.digest(kinds[i % 5], (number * 1000 + i) % jobs + 1) for i in range(990)] + [
            f"f{number:03d}{i:060d}" for i in range(10)
        ]

    return {
        "is a blob referred to? (no)": lambda s, n: is_referenced(s, LOCAL_TENANT, f"e{n:063d}"),
        "which of 1,000 blobs are": lambda s, n: referenced(s, LOCAL_TENANT, page(n)),
        "count the jobs": lambda s, _: StatisticsRepository(s).job_counts(),
    }


def ask(db: Database, question: Callable[[Session, int], object], rounds: int, *, indexes: bool) -> list[float]:
    def once(number: int) -> None:
        with db.read() as session:
            if not indexes:
                for kind in ("indexscan", "indexonlyscan", "bitmapscan"):
                    session.execute(text(f"SET LOCAL enable_{kind} = off"))
            question(session, number)

    return timed(once, rounds)


def requests(found: Server, key: str, rounds: int, jobs: int) -> dict[str, list[float]]:
    models = max(jobs // filled.JOBS_OF_A_MODEL, 1)
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=found.url, headers=headers, trust_env=False, timeout=300) as client:

        def send(method: str, path: str) -> None:
            answer = client.request(method, path)
            if answer.is_error:
                raise CannotMeasure(f"{method} {path} answered {answer.status_code}: {answer.text[:500]}")

        rare = filled.model_id(models // 2)
        return {
            "`GET /metrics`": timed(lambda _: send("GET", "/metrics"), min(rounds, 8), _CACHED_S),
            "`GET /v1/jobs`": timed(lambda _: send("GET", "/v1/jobs?limit=20"), rounds),
            "`GET /v1/jobs?status=cancelled` (none)": timed(lambda _: send("GET", "/v1/jobs?status=cancelled"), rounds),
            "`GET /v1/jobs?model_id=…`": timed(lambda _: send("GET", f"/v1/jobs?limit=20&model_id={rare}"), rounds),
            "`DELETE /v1/models/…`": timed(lambda n: send("DELETE", f"/v1/models/{filled.model_id(n + 1)}"), rounds),
        }


def collect(db: Database, settings: Settings) -> tuple[list[float], float]:
    """A round in which nothing is to be removed: each pass in ms, and all in s."""
    collector, passes = Collector(db, ContentStore(make_store(settings)), settings), []
    began = time.perf_counter()
    while not collector.round_over:
        start = time.perf_counter()
        if sum(collector.collect().values()) > 100:
            raise CannotMeasure("the collector found something to remove")
        passes.append(1000 * (time.perf_counter() - start))
    return passes, time.perf_counter() - began


def tally(db: Database) -> float:
    began = time.perf_counter()
    while True:
        with db.write() as uow:
            if not StatisticsRepository(uow.session).tally(500):
                return time.perf_counter() - began


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with scratch(arguments.folder) as folder, postgres() as url:
        settings = Settings(home=folder / "home", DATABASE_URL=url)
        upgrade(settings.database)
        db = Database(make_engine(settings.database))
        try:
            began = time.perf_counter()
            filled.fill(db.engine, arguments.jobs)
            say(f"  {arguments.jobs:,} jobs in {time.perf_counter() - began:.0f} s")
            tallied_s = tally(db)
            filled.analyze(db.engine)
            return figures(db, settings, url, folder, arguments, tallied_s)
        finally:
            db.close()


def figures(
    db: Database, settings: Settings, url: str, folder: Path, arguments: argparse.Namespace, tallied_s: float
) -> dict[str, Any]:
    rounds, whole = arguments.rounds, {}
    ms: dict[str, list[float]] = {}
    for name, question in questions(arguments.jobs).items():
        ms[name] = ask(db, question, rounds, indexes=True)
        whole[name] = ask(db, question, 3, indexes=False)
        say(f"  {name}: {statistics.median(ms[name]):.1f} ms")
    with db.read() as session:
        blobs = int(session.scalar(text("SELECT count(*) FROM blobs")) or 0)
    passes, round_s = collect(db, settings)
    ms["a pass of the collector"] = passes
    key = create_key(db, "local", "benchmark")
    with api(folder / "home", {"DATABASE_URL": url}) as found:
        ms |= requests(found, key, rounds, arguments.jobs)
    print(f"PostgreSQL, {arguments.jobs:,} jobs, {blobs:,} blobs; median (min–max) of {rounds} rounds\n")
    print(table(("what", "ms", "whole tables, ms"), rows(ms, whole)))
    print(
        f"\nA round of the collector over all {blobs:,} blobs: {round_s:.1f} s in {len(passes)} passes. "
        f"To tally {arguments.jobs:,} ended jobs, once: {tallied_s:.1f} s."
    )
    return {"ms": ms, "whole_tables_ms": whole, "blobs": blobs, "round_s": round_s, "tallied_s": tallied_s}


def rows(ms: dict[str, list[float]], whole: dict[str, list[float]]) -> list[Sequence[str]]:
    return [(n, spread(v, 1), f"{statistics.median(whole[n]):.0f}" if n in whole else "–") for n, v in ms.items()]


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--jobs", type=int, default=200_000, help="how many (200,000)")
    found.add_argument("--rounds", type=int, default=20, help="of each question (20)")
    execute(measure, found.parse_args())


if __name__ == "__main__":
    main()
