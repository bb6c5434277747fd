"""The tuned serving of an engine beside the best of an exhaustive grid, on the same machine and the same requests.

    python benchmarks/serving/tuning.py --models digits

A job makes the engine and its bundle. The service's own search (`workers/measure/load/tuning.py`) looks for instances ×
threads × largest batch × delay; then every setup of the grid is measured with the same short looks. As short looks over
many setups flatter their maximum, the search's pick, the grid's best three and the setup that the search starts from
are measured in turns afterwards, with so many requests that the p99's bound carries the verdict: the ratio is taken
from those. Time is the wall time of search and grid, servers' starts included. The batcher runs in this process
(no HTTP).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE.parents[1]), str(_HERE.parent)]
from _common import CannotMeasure, deployment, execute, parser, say, scratch, table
from make_models import NAMES, Case, named
from peers import anneal
from run import requests

from anneal_client import AnnealError, Client
from workers.measure.load.arrivals import Arrivals
from workers.measure.load.bench import Bench, Clock, Limit, Setup, median_s, opened
from workers.measure.load.goodput import Plan
from workers.measure.load.served import launch_of
from workers.measure.load.tuning import Space, Tuner
from workers.serving.serving_settings import Settings

_BATCHES = (1, 2, 4, 8, 16, 32)
_DELAYS = (0.0, 1 / 16, 1 / 6, 1 / 3)  # of the limit
_ROUNDS, _FINALISTS = 3, 3
Json = dict[str, Any]


def grid(cores: int, limit_ms: float) -> list[Setup]:
    layouts = [(1, None), (cores, 1)] if cores > 1 else [(1, None)]
    return [
        Setup(instances, threads, batch, round(delay * limit_ms, 3))
        for (instances, threads), batch, delay in itertools.product(layouts, _BATCHES, _DELAYS)
        if batch > 1 or not delay
    ]


async def compare(files: Case, bundle: Path, arguments: argparse.Namespace) -> Json:
    base, cores = Settings.of_folder(bundle), len(os.sched_getaffinity(0))
    mix, limit_ms = requests(files, bundle), arguments.p99_ms
    limit = Limit(limit_ms / 1e3, 10 * limit_ms / 1e3)

    def bench(seed: int) -> Bench:
        return Bench(launch_of(bundle, base), mix, Arrivals(True), limit, Clock(), seed)

    setups = grid(cores, limit_ms)
    space = Space(sorted({(s.instances, s.threads) for s in setups}, key=str), _BATCHES)
    async with opened(bench(0)) as one:
        alone = 1e3 * median_s(await one.alone(Setup()))
        if alone > limit_ms:
            raise CannotMeasure(f"one caller alone waits {alone:.1f} ms: give a larger --p99-ms")
        began = time.perf_counter()
        tuned = await Tuner(one, Setup(), space, arguments.tune_s).run()
        tuned_s = time.perf_counter() - began
    say(f"  tuned in {tuned_s:.0f} s: {tuned.best}")
    rates: dict[Setup, float] = {}
    began = time.perf_counter()
    async with opened(bench(1_000_000)) as one:
        guess = max(tuned.start.rate, 1.0)
        for setup in setups:
            rates[setup] = (await one.goodput(setup, Plan(guess, resolution=1.05), proven=False)).rate
            say(f"  {setup}: {rates[setup]:.0f}/s")
    grid_s = time.perf_counter() - began
    best = sorted(rates, key=lambda s: -rates[s])[:_FINALISTS]
    finalists = list(dict.fromkeys([tuned.best, *best, Setup()]))
    proven: dict[Setup, list[float]] = {setup: [] for setup in finalists}
    rng = np.random.default_rng(0)
    async with opened(bench(2_000_000)) as one:
        for _ in range(_ROUNDS):
            for at in rng.permutation(len(finalists)):
                setup = finalists[int(at)]
                plan = Plan(0.9 * max(rates.get(setup, 0.0), tuned.goodput.rate / 2), resolution=1.05, stride=1.15)
                proven[setup].append((await one.goodput(setup, plan, proven=True)).rate)
    middle = {setup: float(np.median(found)) for setup, found in proven.items()}
    winner = max(best, key=lambda s: middle[s])
    return {
        "alone_ms": alone,
        "tuned": {"setup": str(tuned.best), "rates": proven[tuned.best], "seconds": tuned_s},
        "grid": {"setup": str(winner), "rates": proven[winner], "seconds": grid_s, "setups": len(setups)},
        "start": middle[Setup()],
        "ratio": middle[tuned.best] / middle[winner] if middle[winner] else None,
        "time": tuned_s / grid_s,
    }


def made(files: Case, arguments: argparse.Namespace, folder: Path) -> Path:
    with deployment(folder / "home") as service, Client(service.url) as client:
        fields = {"benchmark": {"batch_sizes": [1, 8], "min_seconds": 0.5}, "budget_seconds": arguments.budget}
        job, _report, _seconds = anneal.run_job(client, files, **fields)
        anneal.fetch_bundle(client, job, folder)
    return folder / "bundle"


def measure(arguments: argparse.Namespace) -> Json:
    figures: Json = {}
    rows = []
    for name, files in named(arguments.models):
        with scratch(arguments.folder, 4 << 30) as folder:
            try:
                bundle = made(files, arguments, folder)
            except (anneal.JobEnded, AnnealError) as failure:
                figures[name] = {"not_measured": str(failure)}
                print(f"Not measured: {files.label}: {failure}\n", flush=True)
                continue
            figures[name] = found = asyncio.run(compare(files, bundle, arguments))
        tuned, whole = found["tuned"], found["grid"]
        ratio = "–" if found["ratio"] is None else f"{100 * found['ratio']:.0f} %"
        rows.append([
            files.label, f"{found['start']:.0f}", f"{np.median(tuned['rates']):.0f}", tuned["setup"],
            f"{np.median(whole['rates']):.0f}", whole["setup"], ratio,
            f"{tuned['seconds']:.0f} of {whole['seconds']:.0f} ({100 * found['time']:.0f} %)",
        ])  # fmt: skip
    head = ["model", "start, 1/s", "tuned, 1/s", "tuned setup", "grid's best, 1/s", "its setup", "tuned ÷ best", "s"]
    print(table(head, rows))
    return {"models": figures}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--models", default="digits", help=f"some of {','.join(NAMES)}")
    options.add_argument("--p99-ms", type=float, default=10.0, help="the limit")
    options.add_argument("--tune-s", type=float, default=60.0, help="seconds that the search may take")
    options.add_argument("--budget", type=int, default=40, help="budget_seconds of the job that makes the engine")
    execute(measure, options.parse_args())
