"""The search as it is beside an exhaustive one: how good its pick is, and what it takes.

    python benchmarks/search.py --models digits,lstm,minilm

Each model goes twice to a deployment of its own, in a fresh folder: `"search": {"strategy": "halving"}` and
`{"strategy": "exhaustive"}`. The two bundles are then timed again, side by side, in processes of their own
(`peers/contest.py`), because two jobs saw two moments of the machine.

Goals: the pick reaches at least 95 % of the exhaustive optimum's speed on every batch size, in at most 35 % of
its time. The time is that from the job's begin to its verdict; what explains it afterwards is the same for both.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _common import CannotMeasure, deployment, execute, parser, say, scratch, table, verdict
from make_models import NAMES, Case, named
from peers import anneal, contest

from anneal_client import AnnealError, Client, Event, InvalidRequest
from workers.measure.stats import ratio_of_medians

STRATEGIES = ("halving", "exhaustive")
DEFAULT = "digits,digits_mobile,lstm,minilm,mobilenet"
BATCHES = (1, 8)
SPEED = 0.95
TIME = 0.35

Json = dict[str, Any]


def search(strategy: str, files: Case, folder: Path, home: Path, arguments: argparse.Namespace) -> Json:
    """Run the job; answers the bundle, the seconds of the job and how many configurations it measured."""

    def note(event: Event) -> None:
        if line := anneal.short(event):
            say(line)

    say(f"  {strategy} …")
    folder.mkdir(parents=True)
    fields = {
        "benchmark": {"batch_sizes": list(BATCHES), "min_seconds": arguments.job_seconds},
        "budget_seconds": arguments.budget,
        "search": {"strategy": strategy},
        "engines_per_bundle": 1,  # the exhaustive one looks for no pairs
    }
    with deployment(home) as service, Client(service.url) as client:
        try:
            job, report, seconds = anneal.run_job(client, files, note, **fields)
        except InvalidRequest as refused:
            if refused.status == 422:
                raise CannotMeasure(f"this version's jobs have no option `search.strategy`: {refused}") from None
            raise
        spec = anneal.fetch_bundle(client, job, folder)
    return {
        "spec": spec,
        "seconds": report["search"]["verdict_seconds"],
        "job_seconds": seconds,
        "picked": report["picked"],
        "candidates": len(report["candidates"]),
        "measured": sum(bool(c["batches"]) for c in report["candidates"]),
    }


def compare(files: Case, found: Mapping[str, Json], folder: Path, seconds: float) -> Json:
    """`speed`: per batch size, the exhaustive pick's p50 over the search's, with its interval (1 = as fast)."""
    specs = {name: entry["spec"] for name, entry in found.items()}
    timed = contest.measure(specs, files.validation, folder, BATCHES, seconds, files.axes)
    for name, entry in timed.items():
        if "error" in entry:
            raise CannotMeasure(f"{files.label}: the bundle of the {name} search does not run: {entry['error']}")
    rounds = {name: entry["rounds"] for name, entry in timed.items()}
    return {str(b): ratio_of_medians(rounds["exhaustive"][b], rounds["halving"][b]).to_json() for b in BATCHES}


def row(label: str, found: Mapping[str, Json], speed: Mapping[str, Json]) -> list[str]:
    halving, exhaustive = (found[name] for name in STRATEGIES)
    share = halving["seconds"] / exhaustive["seconds"]
    cells = [label, halving["picked"], exhaustive["picked"]]
    for batch in BATCHES:
        at = speed[str(batch)]
        cells.append(f"{100 * at['ratio']:.0f} % [{100 * at['low']:.0f}, {100 * at['high']:.0f}]")
    cells.append(verdict(all(speed[str(b)]["ratio"] >= SPEED for b in BATCHES)))
    cells += [f"{entry['seconds']:.0f} s ({entry['measured']})" for entry in (halving, exhaustive)]
    return [*cells, f"{100 * share:.0f} %", verdict(share <= TIME)]


def measure(arguments: argparse.Namespace) -> Json:
    rows: list[list[str]] = []
    figures: Json = {}
    for name, files in named(arguments.models):
        with scratch(arguments.folder, 4 << 30) as folder:
            try:
                found = {
                    s: search(s, files, folder / f"bundle-{s}", folder / f"home-{s}", arguments) for s in STRATEGIES
                }
                speed = compare(files, found, folder, arguments.seconds)
            except (anneal.JobEnded, AnnealError) as failure:
                print(f"Not measured: {files.label}: {failure}\n", flush=True)
                figures[name] = {"not_measured": str(failure)}
                continue
        rows.append(row(files.label, found, speed))
        figures[name] = {"speed": speed, **{s: {k: v for k, v in e.items() if k != "spec"} for s, e in found.items()}}
    if not rows:
        return {"models": figures}
    head = [
        "model",
        "search's pick",
        "exhaustive pick",
        *(f"speed of it b={b} [95 %]" for b in BATCHES),
        f"≥ {SPEED:.0%}",
    ]
    head += ["search (measured)", "exhaustive (measured)", "time", f"≤ {TIME:.0%}"]
    print(table(head, rows), end="\n\n")
    measured = [f for f in figures.values() if "speed" in f]
    speeds = [f["speed"][str(b)]["ratio"] for f in measured for b in BATCHES]
    share = sum(f["halving"]["seconds"] for f in measured) / sum(f["exhaustive"]["seconds"] for f in measured)
    mean = math.exp(sum(math.log(s) for s in speeds) / len(speeds))
    print(f"All: {mean:.0%} of the exhaustive optimum's speed (geometric mean) in {share:.0%} of its time.")
    return {"models": figures, "speed": mean, "time": share}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--models", default=DEFAULT, help=f"some of {','.join(NAMES)} (default: {DEFAULT})")
    options.add_argument("--seconds", type=float, default=6, help="measured again per bundle and batch size")
    options.add_argument("--job-seconds", type=float, default=3, help="benchmark.min_seconds of the jobs")
    options.add_argument("--budget", type=int, default=3600, help="budget_seconds of each job")
    execute(measure, options.parse_args())
