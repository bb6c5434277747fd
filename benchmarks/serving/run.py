"""`serve.py` of a bundle beside a real Triton, LitServe and BentoML: same engine, same cores, same requests.

    python benchmarks/serving/run.py --models digits,recommender
    python -m benchmarks.serving.run --models resnet50 --servers serve.py,Triton
    python -m benchmarks.serving.run --models pooled --servers serve.py,Triton --alone    # what a server adds

A job makes the engine and its bundle. Each server is tried in the same few setups (instances × threads, batches),
driven over HTTP by the open-loop generator of the service (`workers/measure/load`: Poisson arrivals, latency from when
a request was due). Per setup the highest rate whose p99 is within the limit is looked for; then the best setup of each
server is measured with so many requests that the p99's bound carries the verdict.

All of it is done in turns, since the machine is not as fast in each minute: setup by setup at all servers, and the
last, longer measurements rate by rate, with all servers running beside each other and one of them being asked. Servers
come in an order that is drawn. "alone" is the p50 of one caller over HTTP, in turns too.

Short looks are lucky ones, as the best of several: a proof begins below them, and goes down until a rate is proven.
Peers that were seen to serve far less than the best of them are not proven: the time is for those by which the ratio
goes. Each server has a session of its own (Linux shares cores among sessions), and the client is a real-time thread
where the system allows it: on the same cores it would else be what is late.

Triton is the server of a wheel, without its C++ backends for ONNX Runtime and OpenVINO: its Python backend stands in
for them, so that its figures tell of its HTTP server, its batcher and that backend. LitServe and BentoML get tensors as
base64 in JSON, Triton and `serve.py` as binary data of the protocol v2. The peers are installed on first use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE.parents[1]), str(_HERE.parent), str(_HERE)]
import servers
from _common import CannotMeasure, deployment, execute, parser, say, scratch, table
from make_models import NAMES, Case, named
from peers import anneal

from anneal_client import AnnealError, Client
from workers.measure.load.arrivals import Arrivals
from workers.measure.load.bench import Bench, Clock, Launch, Limit, Setup, median_s
from workers.measure.load.generator import closed_loop
from workers.measure.load.goodput import Goodput, Plan
from workers.measure.load.judged import Point
from workers.measure.load.mix import Kind, Mix
from workers.serving.serving_settings import Settings

CACHE = _HERE.parent / ".cache" / "serving"
_ALONE_S, _ALONE_TURNS = 1.0, 6
_IDLE_S = 2.0
_MORE = 4  # beside other work
_REQUESTS = 32  # different ones
_FIRST_PROVEN, _LEAST_PROVEN = 0.9, 0.15  # of the rate that a short look found: where a proof begins, and ends
_CONTENDS = 0.6  # of what the best peer was seen to serve: a peer below is not tried further, nor proven
_TOLD = 2  # setups, after which that is looked at: one by one, and in batches
_LOOKED = 0.4  # of the time, for the short looks
OURS = servers.OURS
Json = dict[str, Any]


class InTurns(Bench):
    """Points of several servers come one after the other: whoever has waited longest is next."""

    def __init__(self, turn: asyncio.Lock, *given: Any) -> None:
        super().__init__(*given)
        self._turn = turn

    async def point(self, *given: Any, **how: Any) -> Point:
        async with self._turn:
            return await super().point(*given, **how)


@contextlib.contextmanager
def first_on_the_cores() -> Iterator[None]:
    """This thread runs whenever it has something to do, as a client with cores of its own would; not what it starts."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        say("the client is no real-time thread (not allowed here): it may be late at high rates")
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, *before)


def requests(files: Case, bundle: Path) -> Mix:
    """Samples of the validation data, one at a time."""
    with np.load(bundle / "sample_input.npz") as sample, np.load(files.validation) as data:
        kinds = {name: sample[name] for name in sample.files}
        feeds = [
            {name: np.ascontiguousarray(data[name][i : i + 1], dtype=a.dtype) for name, a in kinds.items()}
            for i in range(_REQUESTS)
        ]
    return Mix([Kind("one sample", 1, {n: a.shape for n, a in feeds[0].items()}, 1.0, feeds)], "validation data")


def setups(cores: int, delays: tuple[float, ...]) -> list[Setup]:
    """`delays`: of batches; without any, requests are served one by one."""
    layouts = [(1, cores), (cores, 1)] if cores > 1 else [(1, 1)]
    batches = [(1, 0.0), *((8, delay) for delay in delays)]
    return [Setup(i, t, b, d) for i, t in layouts for b, d in batches]


async def alone(made: dict[str, Launch], mix: Mix, cores: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """p50 in ms of one caller over HTTP, one instance on all cores, no batching: one for each turn; and what share of a
    core each server takes where nobody asks. A server that does not answer is not in it."""
    waits: dict[str, list[float]] = {}
    targets: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        for name, launch in made.items():
            target = await stack.enter_async_context(launch(Setup(1, cores, 1, 0.0)))
            if math.isfinite(median_s(await closed_loop(target, mix, 1, _ALONE_S / 2, 10.0))):
                targets[name] = target
            else:
                say(f"  {name} answers no request: left out")
        before = {name: _cpu_s(target.pid) for name, target in targets.items()}
        await asyncio.sleep(_IDLE_S)
        idle = {name: (_cpu_s(target.pid) - before[name]) / _IDLE_S for name, target in targets.items()}
        for turn in range(_ALONE_TURNS):
            for name in [*targets] if turn % 2 else [*targets][::-1]:
                run = await closed_loop(targets[name], mix, 1, _ALONE_S, 10.0)
                waits.setdefault(name, []).append(1e3 * median_s(run))
    return waits, idle


def _cpu_s(pid: int) -> float:
    """CPU time of a process and all below it."""
    total = 0.0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


async def looked(benches: dict[str, InTurns], tried: list[Setup], guess: float, until: float) -> dict[str, list[Json]]:
    """What each server was seen to serve in each setup, by short looks."""
    found: dict[str, list[Json]] = {name: [] for name in benches}
    able = [*benches]
    for done, setup in enumerate(tried):
        if done == _TOLD:
            able = [*contenders(bests_of(found))] or able
        for number, name in enumerate(able):
            best = max((one["rate"] for one in found[name]), default=0.0) or guess
            bench, left = benches[name], (len(tried) - done) * len(able) - number
            await bench.target(setup)  # some take seconds to start
            with bench.within((until - time.monotonic()) / left):
                seen = await bench.goodput(setup, Plan(best, resolution=1.15, least=0.02 * guess), proven=False)
            found[name].append({"setup": setup, "rate": seen.rate})
            say(f"  {name}: {setup}: {seen.rate:.0f}/s")
    return found


def bests_of(looks: dict[str, list[Json]]) -> dict[str, tuple[Setup, float]]:
    """The best setup of each server that was seen to serve something, and its rate."""
    bests = {name: max(seen, key=lambda one: one["rate"]) for name, seen in looks.items()}
    return {name: (best["setup"], best["rate"]) for name, best in bests.items() if best["rate"] > 0}


def contenders(bests: dict[str, tuple[Setup, float]]) -> dict[str, tuple[Setup, float]]:
    """Those by which the ratio goes: `serve.py`, and the peers that may be the best one."""
    most = max((rate for name, (_, rate) in bests.items() if name != OURS), default=0.0)
    return {name: one for name, one in bests.items() if name == OURS or one[1] >= _CONTENDS * most}


async def proven(
    benches: dict[str, InTurns], bests: dict[str, tuple[Setup, float]], until: float
) -> dict[str, Goodput]:
    """What the best setups serve, rate by rate in turns, with so many requests that the p99's bound carries the
    verdict."""

    async def one(name: str) -> Goodput:
        setup, rate = bests[name]
        benches[name].clock = Clock(until)
        # Far below what was looked at nothing is proven: at a few requests a second a verdict takes minutes.
        plan = Plan(_FIRST_PROVEN * rate, resolution=1.05, stride=1.15, least=_LEAST_PROVEN * rate)
        return await benches[name].goodput(setup, plan, proven=True)

    found = await asyncio.gather(*(one(name) for name in bests))
    return dict(zip(bests, found, strict=True))


def engine_of(files: Case, arguments: argparse.Namespace, folder: Path) -> tuple[Path, Path, Json]:
    """The bundle, unpacked, its kind `triton`, and what the job said; of an earlier run, where that is asked for."""
    kept = CACHE / files.name
    if not (arguments.reuse and (kept / "facts.json").exists()):
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        facts = optimized(files, arguments, kept, folder / "home")
        (kept / "facts.json").write_text(json.dumps(facts))
    shutil.copytree(kept, folder / "engine")  # each setup writes its settings
    found = folder / "engine"
    return found / "bundle", found / "triton.tar", json.loads((found / "facts.json").read_text())


def optimized(files: Case, arguments: argparse.Namespace, folder: Path, home: Path) -> Json:
    """What the job said; both kinds of its bundle are in `folder` then."""
    with deployment(home) as service, Client(service.url) as client:
        benchmark = {"batch_sizes": [1, 8], "min_seconds": 0.3, "allow_noisy": True}
        try:
            job, report, _ = anneal.run_job(client, files, benchmark=benchmark, budget_seconds=arguments.budget)
        except anneal.JobEnded as ended:
            if "budget_too_small" not in str(ended):
                raise
            say(f"  {arguments.budget} s are too few for the job here: once more with {_MORE} times as many")
            longer = _MORE * arguments.budget
            job, report, _ = anneal.run_job(client, files, benchmark=benchmark, budget_seconds=longer)
        anneal.fetch_bundle(client, job, folder)
        url = f"{service.url}/v1/engines/{job['engine_ids'][0]}/bundle?kind=triton"
        with urllib.request.urlopen(url) as answer, (folder / "triton.tar").open("wb") as file:
            shutil.copyfileobj(answer, file)
    return {"picked": report["picked"], "speedup": report["final_metrics"]["speedup"]}


async def compare(files: Case, arguments: argparse.Namespace, folder: Path) -> Json:
    bundle, archive, facts = await asyncio.to_thread(engine_of, files, arguments, folder)
    names = [str(name) for name in np.random.default_rng(0).permutation(arguments.servers.split(","))]
    made = await asyncio.to_thread(servers.launches, names, bundle, archive, folder)
    until = time.monotonic() + 60.0 * arguments.minutes
    mix, cores = requests(files, bundle), len(os.sched_getaffinity(0))
    waits, idle = await alone(made, mix, cores)
    if not waits:
        raise CannotMeasure("no server answers")
    middle = {name: float(np.median(turns)) for name, turns in waits.items()}
    limit = arguments.p99_ms or max(10.0, 6 * min(middle.values()))
    say(f"{files.label}: {facts['picked']} ships, {facts['speedup']}")
    say(f"{files.label}: alone { ({n: [round(w, 2) for w in t] for n, t in waits.items()}) }, p99 limit {limit:.1f} ms")
    say(f"{files.label}: idle, share of a core: { ({n: round(share, 3) for n, share in idle.items()}) }")
    found: Json = {"limit_ms": round(limit, 2), **facts, "alone_p50_ms": waits, "idle_cores": idle, "servers": {}}
    if arguments.alone:
        return found
    turn, limits = asyncio.Lock(), Limit(limit / 1e3, 5 * limit / 1e3 + 1)
    benches = {name: InTurns(turn, made[name], mix, Arrivals(True), limits, Clock()) for name in waits}
    settings = Settings.of_folder(bundle)
    one_by_one = all(settings.batch_axis.get(name, 0) is None for name in mix.kinds[0].dims)
    if one_by_one:  # as the job found: then no server may batch them
        say(f"{files.label}: {settings.reason}")
    tried = setups(cores, () if one_by_one else (0.0, min(2.0, limit / 8)))
    start = time.monotonic()
    try:
        looks = await looked(benches, tried, 0.5e3 / min(middle.values()), start + _LOOKED * (until - start))
        bests = bests_of(looks)
        for name, seen in looks.items():
            told = [{"setup": str(one["setup"]), "rate": round(one["rate"], 1)} for one in seen]
            setup = str(bests[name][0]) if name in bests else "–"
            found["servers"][name] = {"setup": setup, "tried": told, "proven": []}
        bests = contenders(bests)
        for number in range(arguments.rounds):
            share = (until - time.monotonic()) / (arguments.rounds - number)
            for name, got in (await proven(benches, bests, time.monotonic() + share)).items():
                say(f"  {name}: {bests[name][0]}: {got.rate:.0f}/s proven{'' if got.complete else ', not to the end'}")
                found["servers"][name]["proven"].append(got.to_json())
                lowest = min((point.rate for point in got.points), default=bests[name][1])
                bests[name] = bests[name][0], (got.rate or lowest) / _FIRST_PROVEN
            bests = dict(reversed(bests.items()))  # who comes first changes
    finally:
        for bench in benches.values():
            await bench.close()
    for name, told in found["servers"].items():
        rates = [one["rate"] for one in told["proven"] if one["rate"]]
        told["rate"] = float(np.mean(rates)) if rates else 0.0
        told["generator"] = _generator([p for points in benches[name].points.values() for p in points])
        told["points"] = [
            {"setup": str(setup), **point.to_json()}
            for setup, points in benches[name].points.items()
            for point in points
        ]
    return found


def _generator(points: list[Point]) -> Json:
    """What the load's own process took, and how late it was, by the median of the points."""
    cpu = [p.figures["cpu_us_per_request"] for p in points if p.figures.get("cpu_us_per_request")]
    late = [p.figures["late"]["p99_ms"] for p in points if p.figures.get("late", {}).get("p99_ms")]
    return {
        "cpu_us_per_request": float(np.median(cpu)) if cpu else None,
        "late_p99_ms": float(np.median(late)) if late else None,
    }


def measure(arguments: argparse.Namespace) -> Json:
    figures: Json = {}
    rows: list[list[str]] = []
    for name, files in named(arguments.models):
        with scratch(arguments.folder, 4 << 30) as folder:
            try:
                # A cheap client: it has its part of the same cores.
                with first_on_the_cores(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    figures[name] = found = runner.run(compare(files, arguments, folder))
            except (anneal.JobEnded, AnnealError, CannotMeasure) as failure:
                figures[name] = {"not_measured": str(failure)}
                print(f"Not measured: {files.label}: {failure}\n", flush=True)
                continue
        rows += rows_of(files.label, found)
    head = [
        "model",
        "p99 limit, ms",
        "server",
        "goodput, 1/s",
        "÷ best peer",
        "alone, p50 ms",
        "best setup",
        "in turns",
    ]
    print(table(head, rows))
    return {"models": figures}


def rows_of(label: str, found: Json) -> list[list[str]]:
    """The fastest first."""
    told = found["servers"]
    best = max((one["rate"] for name, one in told.items() if name != OURS), default=0.0)
    rows = []
    for name in sorted(found["alone_p50_ms"], key=lambda n: -told.get(n, {}).get("rate", 0.0)):
        one = told.get(name, {"rate": 0.0, "setup": "–", "proven": []})
        ratio = f"{one['rate'] / best:.2f}" if best and one["rate"] else "–"
        rates = ", ".join(in_turn(turn) for turn in one["proven"]) or "–"
        alone_ms = f"{np.median(found['alone_p50_ms'][name]):.2f}"
        rate = f"{one['rate']:.0f}" if one["rate"] else "–"
        rows.append([label, f"{found['limit_ms']:g}", name, rate, ratio, alone_ms, one["setup"], rates])
    return rows


def in_turn(proven: Json) -> str:
    """The rate that was proven in one turn, and whether a higher one was left open for want of time."""
    if not proven["rate"]:
        return "nothing"
    return f"{proven['rate']:.0f}{'' if proven['complete'] else ' or more'}"


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--models", default="digits,recommender,minilm", help=f"some of {','.join(NAMES)}")
    options.add_argument("--servers", default=",".join(servers.NAMES), help=f"some of {','.join(servers.NAMES)}")
    options.add_argument("--rounds", type=int, default=2, help="of the best setups' measurement in turns")
    options.add_argument(
        "--minutes", type=float, default=9.0, help="for each model, beside the job that makes the engine"
    )
    options.add_argument("--reuse", action="store_true", help="the engine of the run before, no new job")
    options.add_argument("--alone", action="store_true", help="one caller only")
    options.add_argument("--p99-ms", type=float, help="default: 6 × the shortest p50 of one caller, at least 10")
    options.add_argument("--budget", type=int, default=90, help="budget_seconds of the job that makes the engine")
    execute(measure, options.parse_args())
