"""Two engines in one bundle, with real models: whether a job ships a pair, and what its bundle then does.

    python benchmarks/two_engines.py --models recommender --batches 1,64

The job is the default one (objective latency), with these batch sizes. Where it ships a pair, the bundle is run as its
user will: `infer.py` replays its samples, and `serve.py` is asked over HTTP by one caller, at each batch size, in turns
with the same server on each of the two engines alone (their own `infer.py`). Where it ships one engine, the table of
what was timed tells why.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _common import CannotMeasure, deployment, execute, parser, scratch, table
from make_models import NAMES, Case, named
from peers import anneal

from anneal_client import AnnealError, Client
from workers.measure.load.bench import Setup, median_s
from workers.measure.load.generator import closed_loop
from workers.measure.load.mix import Kind, Mix
from workers.measure.load.over_http import launch_server
from workers.serving.serving_settings import Settings

Json = dict[str, Any]
_TURNS, _SECONDS = 6, 1.0
PAIR = "both"


def job_of(files: Case, sizes: list[int], arguments: argparse.Namespace, folder: Path) -> Json:
    """The report; the bundle lies in `folder`."""
    shapes = {name: {key: list(dims) for key, dims in bounds.items()} for name, bounds in files.shapes.items()}
    for name, bounds in shapes.items():
        axis = files.axes.get(name, 0)
        if axis is not None:
            bounds["opt"][axis] = bounds["max"][axis] = max(sizes)
    with deployment(folder / "home") as service, Client(service.url) as client:
        fields = {
            "benchmark": {"batch_sizes": sizes, "min_seconds": arguments.job_seconds, "allow_noisy": True},
            "budget_seconds": arguments.budget,
            "shapes": shapes,
        }
        job, report, _ = anneal.run_job(client, files, **fields)
        anneal.fetch_bundle(client, job, folder)
    return report


def replayed(bundle: Path) -> str:
    """The last lines of `python infer.py`. Raises CannotMeasure."""
    done = subprocess.run(
        [sys.executable, "-I", "infer.py"], cwd=bundle, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise CannotMeasure(f"infer.py of the bundle ended with {done.returncode}: {done.stderr[-1000:]}")
    return done.stdout.strip()


def alone(bundle: Path, engine: str, folder: Path) -> Path:
    """The bundle as it would be with this one engine."""
    shutil.copytree(bundle, folder)
    shutil.copytree(bundle / engine, folder, dirs_exist_ok=True)
    return folder


def requests(files: Case, bundle: Path, size: int) -> Mix:
    with np.load(bundle / "sample_input.npz") as sample, np.load(files.validation) as data:
        count = len(data[sample.files[0]]) // size
        feeds = [
            {n: np.ascontiguousarray(data[n][i * size : (i + 1) * size], dtype=sample[n].dtype) for n in sample.files}
            for i in range(min(count, 8))
        ]
    return Mix([Kind(f"{size}", size, {n: a.shape for n, a in feeds[0].items()}, 1.0, feeds)], "validation data")


async def served(files: Case, bundle: Path, sizes: list[int], folder: Path) -> dict[str, dict[int, list[float]]]:
    """p50 in ms over HTTP of each server (both engines, the small one, the large one) at each batch size: one for each
    turn."""
    folders = {PAIR: bundle, **{name: alone(bundle, name, folder / f"only-{name}") for name in ("small", "large")}}
    found: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in folders}
    mixes = {size: requests(files, bundle, size) for size in sizes}
    async with AsyncExitStack() as stack:
        targets = {}
        for name, one in folders.items():
            base = replace(Settings.of_folder(one), preferred_batches=())
            setup = Setup(1, base.threads if base.instances == 1 else None, max_batch=max(sizes))
            targets[name] = await stack.enter_async_context(launch_server(one, base)(setup))
        for turn in range(_TURNS + 1):
            for size, mix in mixes.items():
                for name in [*targets] if turn % 2 else [*targets][::-1]:
                    run = await closed_loop(targets[name], mix, 1, _SECONDS, 30.0)
                    if turn:  # the first one warms up
                        found[name][size].append(1e3 * median_s(run))
    return found


def rows_of(label: str, report: Json, sizes: list[int], waits: dict[str, dict[int, list[float]]]) -> list[list[str]]:
    """A row for each batch size."""
    rows = []
    at = {row["batch"]: row for row in report["by_batch"]["batches"]}
    who = [engine["candidate"] for engine in report["by_batch"]["engines"]]
    for size in sizes:
        told = at.get(size, {})
        gains = [told.get(f"{name}_speedup") for name in ("small", "large")]
        shown = [f"{cid} {gain:.2f}x" if gain else cid for cid, gain in zip(who, gains, strict=True)]
        cells = [f"{np.median(waits[name][size]):.2f}" for name in (PAIR, "small", "large")]
        rows.append([label, str(size), *shown, over_one(report, size), *cells])
    return rows


def over_one(report: Json, size: int) -> str:
    """What the two gain over the engine that would ship alone, by the rounds that both were timed in."""
    alone = (report["by_batch"]["costs"].get("alone") or {}).get("candidate")
    both = next(c for c in report["candidates"] if c["id"] == report["picked"])
    at = (both["batches"][str(size)].get("beside") or {}).get(alone)
    if at is None:
        return "–"
    ratio = at["speedup"]
    return f"{ratio['ratio']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}] {alone}"


def why_not(report: Json, sizes: list[int]) -> str:
    """What was timed at the batch sizes, and how long each phase of the search took, as tables."""
    rows = []
    for one in report["candidates"]:
        timed = [one["batches"].get(str(size), {}) for size in sizes]
        cells = [f"{t['speedup']['ratio']:.2f}x" if (t.get("speedup") or {}).get("ratio") else "–" for t in timed]
        rows.append([one["id"], one["status"], *cells, one["reason"][:100]])
    phases = [[str(phase["name"]), f"{phase['seconds']:.1f}"] for phase in report["search"]["phases"]]
    found = table(["candidate", "status", *(f"b {s}" for s in sizes), "reason"], rows)
    return f"{found}\n\n{table(['phase', 's'], phases)}"


def measure(arguments: argparse.Namespace) -> Json:
    figures: Json = {}
    rows: list[list[str]] = []
    sizes = [int(size) for size in arguments.batches.split(",")]
    for name, files in named(arguments.models):
        with scratch(arguments.folder, 4 << 30) as folder:
            try:
                report = job_of(files, sizes, arguments, folder)
            except (anneal.JobEnded, AnnealError) as failure:
                print(f"Not measured: {files.label}: {failure}\n", flush=True)
                continue
            figures[name] = {"picked": report["picked"], "by_batch": report.get("by_batch")}
            if not report.get("by_batch"):
                print(f"{files.label}: {report['picked']} ships alone.\n\n{why_not(report, sizes)}\n", flush=True)
                continue
            print(f"{files.label}: infer.py of the bundle says:\n\n{replayed(folder / 'bundle')}\n", flush=True)
            waits = asyncio.run(served(files, folder / "bundle", sizes, folder))
            figures[name]["http_p50_ms"] = waits
            rows += rows_of(files.label, report, sizes, waits)
    if rows:
        head = [
            "model",
            "batch",
            "small",
            "large",
            "both over one",
            "serve.py, both: p50 ms",
            "small alone",
            "large alone",
        ]
        print(table(head, rows))
    return {"models": figures}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--models", default="recommender", help=f"some of {','.join(NAMES)}")
    options.add_argument("--batches", default="1,64", help="batch sizes that count")
    options.add_argument("--budget", type=int, default=300, help="budget_seconds of the job")
    options.add_argument("--job-seconds", type=float, default=1.5, help="benchmark.min_seconds of the job")
    execute(measure, options.parse_args())
