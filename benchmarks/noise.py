"""Whether a busy machine makes jobs claim what is not so: jobs beside three kinds of load, against quiet ones.

    python benchmarks/noise.py --json build/noise.json            # some 20 minutes; --resume goes on with that file
    python benchmarks/noise.py --jobs 6 --models digits --quiet 1 # a glance

First the quiet figures: every configuration of each model in full, several times, on a machine with nothing else to do.
Then jobs beside spinning processes, processes that stream through memory, and bursts of either; the first of each load
and model in a fresh deployment, with everything to be built, the others with all timings anew ("measure": "again").

Goals: the interval that a job reports holds the quiet figure in at least 90 % of the jobs that claim a speed-up; no
claim is off by more than 15 %; no job takes more than 1.10 of its budget. A job may claim nothing: it says so then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _common import deployment, execute, parser, say, scratch, table, verdict
from budget import GOAL, seconds_of
from make_models import case
from peers import anneal

from anneal_client import AnnealError, Client

HELD, OFF = 0.90, 0.15
_MORE_QUIET = 2  # jobs, where one of the quiet ones found that the machine was not
_SPIN = "while True: pass"
_STREAM = "import numpy as np\na = np.ones(30_000_000)\nb = a.copy()\nwhile True: np.copyto(b, a)"
_BURST = (
    "import random, time\nimport numpy as np\na = np.ones(4_000_000)\nb = a.copy()\nwhile True:\n"
    "    until = time.monotonic() + random.uniform(0.1, 2)\n    while time.monotonic() < until: np.copyto(b, a)\n"
    "    time.sleep(random.uniform(0.1, 2))"
)
LOADS = {"spinning": (_SPIN, 4), "streaming": (_STREAM, 2), "bursts": (_BURST, 2)}  # code, processes at most
Json = dict[str, Any]


@contextlib.contextmanager
def load(kind: str, count: int) -> Iterator[None]:
    """So many processes of this kind, gone afterwards."""
    running = [subprocess.Popen([sys.executable, "-c", LOADS[kind][0]]) for _ in range(count)]
    try:
        time.sleep(1.0)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def fields(arguments: argparse.Namespace, **more: Any) -> Json:
    benchmark = {"batch_sizes": [1, 8], "min_seconds": arguments.job_seconds}
    return {"benchmark": benchmark, "budget_seconds": arguments.budget, "measure": "again", **more}


def quiet_figures(client: Client, files: Any, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Candidate → its speed-up at the batch size that counts, of each quiet job."""
    found: dict[str, list[float]] = {}
    claimed = 0
    for _ in range(arguments.quiet + _MORE_QUIET):
        if claimed == arguments.quiet:
            break
        wanted = fields(arguments, budget_seconds=10 * arguments.budget, search={"strategy": "exhaustive"})
        wanted["benchmark"]["min_seconds"] /= 2
        _, report, _ = anneal.run_job(client, files, lambda _: None, **wanted)
        if not report["claim"]:
            say(f"  not quiet, once more: {report['disturbance']['reason']}")
            continue
        claimed += 1
        batch = str(report["final_metrics"]["batch_size"])
        for candidate in report["candidates"]:
            at = candidate["batches"].get(batch)
            if candidate["measured"] == "full" and at:
                found.setdefault(candidate["id"], []).append(at["speedup"]["ratio"])
    return found


def told(job: Json, report: Json, budget: int) -> Json:
    """What a job claims, and what it took."""
    final, disturbance = report["final_metrics"] or {}, report["disturbance"] or {}
    claims = report["picked"] not in (None, "baseline") and bool(final.get("speedup_proven"))
    picked = next((c for c in report["candidates"] if c["id"] == report["picked"]), None)
    at = picked["batches"][str(final["batch_size"])]["speedup"] if picked and claims else None
    return {
        "picked": report["picked"],
        "claims": claims,
        "speedup": at,
        "seconds": seconds_of(job),
        "share": seconds_of(job) / budget,
        "noisy": report["noisy"],
        "disturbance": disturbance,
    }


def against(entry: Json, quiet: dict[str, list[float]]) -> Json:
    """Whether the interval holds the quiet figure, and how far the claim is off it."""
    known = quiet.get(entry["picked"] or "")
    if not entry["claims"] or not known:
        return {**entry, "quiet": None, "held": None, "off": None}
    figure, at = math.exp(statistics.fmean(map(math.log, known))), entry["speedup"]
    return {**entry, "quiet": figure, "held": at["low"] <= figure <= at["high"], "off": at["ratio"] / figure - 1}


def one_job(client: Client, name: str, kind: str, count: int, arguments: argparse.Namespace) -> Json:
    with load(kind, count):
        try:
            job, report, _ = anneal.run_job(client, case(name), lambda _: None, **fields(arguments))
        except (anneal.JobEnded, AnnealError) as failure:
            return {"failed": str(failure)[:200]}
    return told(job, report, arguments.budget)


class Figures:
    """What is known so far; on disk after every job, so that an interrupted run goes on."""

    def __init__(self, path: Path | None, resume: bool) -> None:
        self.path = path
        self.quiet: dict[str, dict[str, list[float]]] = {}
        self.jobs: list[Json] = []
        if path is not None and resume and path.exists():
            known = json.loads(path.read_text())
            self.quiet, self.jobs = known["quiet"], known["jobs"]

    def save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"quiet": self.quiet, "jobs": self.jobs}, indent=2) + "\n")


def line(entry: Json) -> list[str]:
    cells = [entry["model"], f"{entry['count']} {entry['load']}" + (", fresh" if entry["fresh"] else "")]
    if "failed" in entry:
        return [*cells, entry["failed"][:60], "–", "–", "–"]
    at, share = entry["speedup"], f"{entry['seconds']:.0f} s ({entry['share']:.2f})"
    claim = f"{at['ratio']:.2f}x [{at['low']:.2f}, {at['high']:.2f}]" if at else "none"
    quiet = "–" if entry["quiet"] is None else f"{entry['quiet']:.2f}x ({100 * entry['off']:+.0f} %)"
    held = {None: "–", True: "yes", False: "**no**"}[entry["held"]]
    return [*cells, f"{claim} {entry['picked']}" if at else claim, quiet, held, share]


def measure(arguments: argparse.Namespace) -> Json:
    found = Figures(arguments.json, arguments.resume)
    models = arguments.models.split(",")
    with (
        scratch(arguments.folder, 4 << 30) as folder,
        deployment(folder / "home") as service,
        Client(service.url) as client,
    ):
        for name in models:
            if name not in found.quiet:
                say(f"{name}, quiet …")
                found.quiet[name] = quiet_figures(client, case(name), arguments)
                found.save()
        draw = random.Random(arguments.seed)
        for i in range(arguments.jobs):
            kind, name = [*LOADS][i % len(LOADS)], models[i // len(LOADS) % len(models)]
            count, fresh = draw.randint(1, LOADS[kind][1]), i < len(LOADS) * len(models)
            if i < len(found.jobs):
                continue
            if fresh:
                with deployment(folder / f"fresh-{i}") as other, Client(other.url) as alone:
                    entry = one_job(alone, name, kind, count, arguments)
            else:
                entry = one_job(client, name, kind, count, arguments)
            entry = {"model": name, "load": kind, "count": count, "fresh": fresh, **entry}
            found.jobs.append(entry if "failed" in entry else against(entry, found.quiet[name]))
            found.save()
            say(f"  {i + 1}/{arguments.jobs} " + " | ".join(line(found.jobs[-1])))
    return summary(found)


def summary(found: Figures) -> Json:
    print(table(["model", "load", "claim", "quiet", "held", "job"], [line(e) for e in found.jobs]), end="\n\n")
    ended = [e for e in found.jobs if "failed" not in e]
    claims = [e for e in ended if e["held"] is not None]
    held = sum(e["held"] for e in claims)
    worst = max((abs(e["off"]) for e in claims), default=0.0)
    late = max((e["share"] for e in ended), default=0.0)
    rows = [
        [
            "claims whose interval holds the quiet figure",
            f"{held} of {len(claims)}",
            verdict(held >= HELD * len(claims)),
        ],
        ["farthest that a claim is off", f"{100 * worst:.0f} %", verdict(worst <= OFF)],
        ["longest job over its budget", f"{late:.2f}", verdict(late <= GOAL)],
        ["jobs that claim nothing", f"{sum(not e['claims'] for e in ended)} of {len(ended)}", "–"],
        ["claims without a quiet figure", f"{sum(e['claims'] and e['quiet'] is None for e in ended)}", "–"],
        ["jobs that failed", f"{len(found.jobs) - len(ended)}", verdict(len(found.jobs) == len(ended))],
    ]
    print(table(["", "figure", "goal"], rows), end="\n\n")
    return {"quiet": found.quiet, "jobs": found.jobs}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--models", default="digits,digits_mobile,recommender", help="some of make_models.py's")
    options.add_argument("--jobs", type=int, default=30)
    options.add_argument("--quiet", type=int, default=2, help="quiet jobs of each model")
    options.add_argument("--budget", type=int, default=30, help="budget_seconds of each job")
    options.add_argument("--job-seconds", type=float, default=1.0, help="benchmark.min_seconds of the jobs")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--resume", action="store_true", help="go on with what --json holds")
    execute(measure, options.parse_args())
