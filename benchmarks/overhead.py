"""What the service adds to a job: wall time from submit to the end, less the seconds that the stages worked themselves.

    python benchmarks/overhead.py              # 3 fresh deployments, each with one cold job and 3 repeats

Each round starts `python -m app serve` (API and one worker) in a fresh folder, uploads the digits example, submits a
job and waits for it; then submits the same job again, whose stages all come from the cache. Wall time is the client's,
from before `POST /v1/jobs` to the long poll's answer that the job has ended. A second table says where it went.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from _common import DIGITS, CannotMeasure, deployment, execute, parser, say, scratch, spread, table, verdict

GOAL_S = 1.0
ENDED = ("succeeded", "failed", "cancelled")

Json = dict[str, Any]


def upload(client: httpx.Client, kind: str, path: Path) -> str:
    answer = client.post(f"/v1/{kind}", params={"filename": path.name}, content=path.read_bytes())
    answer.raise_for_status()
    return str(answer.json()["id"])


def run_job(client: httpx.Client, spec: Mapping[str, Any]) -> tuple[Json, float]:
    """The job at its end, and the wall seconds from before its submission."""
    started = time.perf_counter()
    answer = client.post("/v1/jobs", json=dict(spec))
    answer.raise_for_status()
    job: Json = answer.json()
    etag = answer.headers["ETag"]
    while job["status"] not in ENDED:
        answer = client.get(f"/v1/jobs/{job['id']}", params={"wait": 30}, headers={"If-None-Match": etag})
        if answer.status_code == httpx.codes.OK:
            job, etag = answer.json(), answer.headers["ETag"]
    wall = time.perf_counter() - started
    if job["status"] != "succeeded":
        raise CannotMeasure(f"the job {job['status']}: {job['error']}")
    return job, wall


def at(value: str) -> float:
    return datetime.fromisoformat(value).timestamp()


def parts(job: Json, wall: float) -> dict[str, float]:
    """Where the wall time went, in seconds. The service's clock and this process's are the same machine's."""
    stages: list[Json] = job["stages"]
    work = sum(s["seconds"] or 0.0 for s in stages)
    inside = sum(at(s["finished_at"]) - at(s["started_at"]) for s in stages)
    begin, end = at(stages[0]["started_at"]), at(stages[-1]["finished_at"])
    seen = at(job["finished_at"]) - at(job["created_at"])
    return {
        "wall": wall,
        "the stages' own work": work,
        "overhead": wall - work,
        "queued": at(job["started_at"]) - at(job["created_at"]),
        "claim to first stage": begin - at(job["started_at"]),
        "around the stages' work": inside - work,
        "between stages": end - begin - inside,
        "report and manifest": at(job["finished_at"]) - end,
        "request and noticing the end": wall - seen,
    }


def dearest(job: Json) -> str:
    """The stages whose time outside of their own work is largest."""
    found = [
        (at(s["finished_at"]) - at(s["started_at"]) - (s["seconds"] or 0.0), s["name"], s["candidate"])
        for s in job["stages"]
    ]
    found.sort(reverse=True)
    return ", ".join(
        f"{name}{f' · {candidate}' if candidate else ''} {cost:.2f} s" for cost, name, candidate in found[:4]
    )


def one_round(folder: Path, repeats: int, min_seconds: float) -> tuple[Json, dict[str, float], list[dict[str, float]]]:
    """The cold job, its parts, and the parts of each repetition."""
    with (
        deployment(folder) as service,
        httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client,
    ):
        spec = {
            "model_id": upload(client, "models", DIGITS / "model.onnx"),
            "calibration": {"dataset_id": upload(client, "datasets", DIGITS / "calibration.npz")},
            "validation": {"dataset_id": upload(client, "datasets", DIGITS / "validation.npz")},
            "benchmark": {"batch_sizes": [1, 8], "min_seconds": min_seconds},
        }
        job, wall = run_job(client, spec)
        again = []
        for _ in range(repeats):
            cached, cached_wall = run_job(client, spec)
            missed = [s["name"] for s in cached["stages"] if not s["cached"]]
            if missed:
                raise CannotMeasure(f"stages of the same job that did not come from the cache: {', '.join(missed)}")
            again.append(parts(cached, cached_wall))
    return job, parts(job, wall), again


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    cold: list[dict[str, float]] = []
    again: list[dict[str, float]] = []
    jobs: list[Json] = []
    with scratch(arguments.folder) as folder:
        for i in range(arguments.rounds):
            job, first, repeated = one_round(folder / f"home{i}", arguments.repeats, arguments.min_seconds)
            jobs.append(job)
            cold.append(first)
            again += repeated
            walls = ", ".join(f"{r['wall']:.2f} s" for r in repeated)
            say(f"  round {i + 1}: {first['wall']:.2f} s, of it overhead {first['overhead']:.2f} s; again {walls}")
    show(cold, again, jobs)
    stages = [
        [{k: s[k] for k in ("name", "candidate", "seconds", "started_at", "finished_at")} for s in j["stages"]]
        for j in jobs
    ]
    return {"cold_s": cold, "again_s": again, "stages": stages}


def show(cold: Sequence[Mapping[str, float]], again: Sequence[Mapping[str, float]], jobs: Sequence[Json]) -> None:
    overhead, cached = [c["overhead"] for c in cold], [a["wall"] for a in again]
    print(f"digits example, {len(cold)} fresh deployments, {len(again)} repetitions; seconds, median (min–max)\n")
    rows = []
    for what, values in (
        ("a job: wall time less the stages' own work", overhead),
        ("the same job again: wall time, all stages from the cache", cached),
    ):
        met = sorted(values)[len(values) // 2] < GOAL_S
        rows.append([what, spread(values, 2), f"< {GOAL_S:.0f} s", verdict(met)])
    print(table(["what", "seconds", "goal", "verdict"], rows), end="\n\n")
    names = list(cold[0])
    rows = [[n, spread([c[n] for c in cold], 2), spread([a[n] for a in again], 2) if again else "–"] for n in names]
    print(table(["where the wall time goes", "a job", "the same again"], rows), end="\n\n")
    print(f"{len(jobs[0]['stages'])} stage calls. Dearest around their own work: {dearest(jobs[-1])}")


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3, help="fresh deployments")
    options.add_argument("--repeats", type=int, default=3, help="of the same job in each")
    options.add_argument("--min-seconds", type=float, default=0.5, help="benchmark.min_seconds of the job")
    execute(measure, options.parse_args())
