"""Status polls: `GET /v1/jobs/{id}` of the service beside a bare FastAPI endpoint on the same database, in turns.

    python benchmarks/polls.py                                  # SQLite, 5 rounds: about two minutes
    python benchmarks/polls.py --database-url postgresql://…    # an empty database of its own
    python benchmarks/polls.py --rounds 1 --seconds 1

A real job (the digits example) runs first, so that the row is a real one: it has ended and lists all of its stages.
Both servers are one uvicorn process with the same options. The bare endpoint is `def`, opens a SQLAlchemy session,
reads the row by primary key and returns it as a dict; a second one reads four short columns only, and so answers less
than the service does. The servers' CPU time per request is shown too: it suffers less from what else the machine does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import httpx
import psutil
from _common import (
    DIGITS,
    CannotMeasure,
    Contest,
    Server,
    api,
    bare,
    deployment,
    execute,
    parser,
    say,
    scratch,
    spread,
    table,
    verdict,
)
from _load import Load, generator, load

from anneal_client import Client
from app.settings import Settings

GOAL = 0.70
CONNECTIONS = 16
ROW, SHORT = "bare: the whole row", "bare: four short columns"
GET, CONDITIONAL = "Anneal", "Anneal, If-None-Match"


def real_job(home: Path, extra: dict[str, str]) -> str:
    """Run the digits example once; the id of its job."""
    say("running one real job, so that there is a row to poll …")
    with deployment(home, extra) as service, Client(service.url) as client:
        model = client.upload_model(DIGITS / "model.onnx")
        data = client.upload_dataset(DIGITS / "calibration.npz")
        job = client.submit(
            model_id=model["id"],
            calibration={"dataset_id": data["id"]},
            benchmark={"batch_sizes": [1], "min_seconds": 0.1},
        )
        client.wait(job["id"])
        return str(job["id"])


def cpu_seconds(server: Server) -> float:
    """CPU time that the server's process has used, all threads."""
    times = psutil.Process(server.pid).cpu_times()
    return float(times.user + times.system)


def check(url: str, headers: dict[str, str], status: int) -> httpx.Response:
    response = httpx.get(url, headers=headers, trust_env=False)
    if response.status_code != status:
        raise CannotMeasure(f"{url} answered {response.status_code}, not {status}: {response.text[:500]}")
    return response


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    extra = {"DATABASE_URL": arguments.database_url} if arguments.database_url else {}
    with scratch(arguments.folder) as folder:
        home = folder / "home"
        job_id = real_job(home, extra)
        database = Settings(home=home, DATABASE_URL=arguments.database_url or "").database
        with (
            api(home, extra) as service,
            bare("polls", "--database-url", database, log=folder / "bare.log") as peer,
        ):
            servers = {GET: service, ROW: peer, SHORT: peer, CONDITIONAL: service}
            mine, theirs = f"{service.url}/v1/jobs/{job_id}", f"{peer.url}/jobs/{job_id}"
            answer = check(mine, {}, 200)
            known = {"If-None-Match": answer.headers["ETag"]}
            check(mine, known, 304)
            targets: dict[str, tuple[str, dict[str, str]]] = {
                GET: (mine, {}),
                ROW: (theirs, {}),
                SHORT: (f"{theirs}/status", {}),
                CONDITIONAL: (mine, known),
            }
            sizes = {name: len(httpx.get(url, headers=headers).content) for name, (url, headers) in targets.items()}
            check(theirs, {}, 200)
            loads: dict[str, list[Load]] = {name: [] for name in targets}
            cpu: dict[str, list[float]] = {name: [] for name in targets}
            contest = Contest([*targets])
            for url, headers in targets.values():
                load(url, headers, CONNECTIONS, 1)  # warm-up

            def turn(name: str) -> float:
                before = cpu_seconds(servers[name])
                found = load(*targets[name], CONNECTIONS, arguments.seconds)
                used = cpu_seconds(servers[name]) - before
                if found.bad:
                    raise CannotMeasure(f"{name}: {found.bad} requests failed")
                loads[name].append(found)
                cpu[name].append(1e6 * used / max(found.requests, 1))
                say(f"  {name:<26} {found.requests_s:7.0f} requests/s")
                return found.requests_s

            contest.run(arguments.rounds, turn)
    show(contest, loads, cpu, sizes, arguments, database)
    return {
        "generator": generator(),
        "database": database.partition(":")[0],
        "body_bytes": sizes,
        "requests_s": contest.values,
        "ratio": {f"{m} / {p}": contest.ratio(m, p).to_json() for m in (GET, CONDITIONAL) for p in (ROW, SHORT)},
        "server_cpu_us_per_request": cpu,
        "latency_ms": {name: [[x.p50_ms, x.p99_ms] for x in found] for name, found in loads.items()},
    }


def show(
    contest: Contest,
    loads: dict[str, list[Load]],
    cpu: dict[str, list[float]],
    sizes: dict[str, int],
    arguments: argparse.Namespace,
    database: str,
) -> None:
    print(
        f"{database.partition(':')[0]}, {CONNECTIONS} connections, {arguments.rounds} rounds of "
        f"{arguments.seconds:.0f} s in turns, {generator()}; median (min–max); ratios round by round\n"
    )
    rows = []
    for name, found in loads.items():
        p50, p99 = spread([x.p50_ms for x in found], 1), spread([x.p99_ms for x in found], 1)
        rows.append([name, spread(contest.values[name]), p50, p99, spread(cpu[name]), str(sizes[name])])
    print(
        table(["endpoint", "requests/s", "p50 ms", "p99 ms", "server CPU µs per request", "body bytes"], rows),
        end="\n\n",
    )
    rows = []
    for mine in (GET, CONDITIONAL):
        for peer in (ROW, SHORT):
            ratio = contest.ratio(mine, peer)
            judged = [f"≥ {100 * GOAL:.0f} %", verdict(ratio.median >= GOAL)]
            rows.append([mine, peer, str(ratio), *(judged if peer == ROW else ["–", "–"])])
    print(table(["requests/s of", "beside", "ratio", "goal", "verdict"], rows))


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=3, help="of load per endpoint and round")
    options.add_argument("--database-url", help="PostgreSQL instead of a fresh SQLite file; leaves its rows there")
    execute(measure, options.parse_args())
