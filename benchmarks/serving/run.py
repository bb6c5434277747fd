"""`serve.py` of a bundle beside a real Triton, LitServe and BentoML: same engine, same cores, same requests.

    python benchmarks/serving/run.py --models digits,recommender

A job makes the engine and its bundle. Each server is tried in the same few setups (instances × threads, batches),
driven over HTTP by the open-loop generator of the service (`workers/measure/load`: Poisson arrivals, latency from when
a request was due). Per setup the highest rate whose p99 is within the limit is looked for; the best setup of each
server is then measured in turns with those of the others, there and back, with so many requests that the p99's bound
carries the verdict: their mean counts. Servers come in an order that is drawn. "alone" is the p50 of one caller by
HTTP.

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
import re
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE.parents[1]), str(_HERE.parent)]
from _common import CannotMeasure, deployment, execute, free_port, parser, say, scratch, table
from engine import encoded
from make_models import NAMES, Case, case
from peers import anneal

from anneal_client import AnnealError, Client
from tests.integrations.environments import environment
from tests.integrations.tritonserver import tritonserver
from workers.measure.load.arrivals import Arrivals
from workers.measure.load.bench import Bench, Clock, Launch, Limit, Running, Setup, median_s, opened
from workers.measure.load.generator import closed_loop
from workers.measure.load.goodput import Plan
from workers.measure.load.mix import Kind, Mix
from workers.measure.load.over_http import HttpTarget, launch_server
from workers.measure.load.target import Feeds
from workers.serving.serving_settings import Settings

SERVERS = ("serve.py", "Triton", "LitServe", "BentoML")
_READY_S, _STOP_S, _ALONE_S = 90.0, 10.0, 1.5
_REQUESTS = 32  # different ones
_LEAST_PROVEN = 0.4  # of the rate that a short look found
_SERVER_S = 420.0  # for the looks at one server, after which what is known counts
_PROVEN_S = 120.0  # likewise, for each of its turns
Json = dict[str, Any]


class TritonTarget(HttpTarget):
    """Triton's batch axis stands before an input's own: what has one number a sample comes as [batch, 1]."""

    def _request(self, feeds: Feeds) -> bytes:
        known = self._encoded.get(id(feeds))
        if known is None:
            wide = {name: array.reshape(-1, 1) if array.ndim == 1 else array for name, array in feeds.items()}
            known = self._encoded[id(feeds)] = (feeds, super()._request(wide))
        return known[1]


class JsonTarget(HttpTarget):
    """`POST /predict` with a JSON body. `many`: the tensors of one request in a list, as BentoML batches them."""

    def __init__(self, url: str, pid: int, *, many: bool) -> None:
        super().__init__(url, pid=pid)
        self._many = many

    def _request(self, feeds: Feeds) -> bytes:
        known = self._encoded.get(id(feeds))
        if known is None:
            one = encoded(feeds)
            body = json.dumps({"requests": [one]} if self._many else {"inputs": one}).encode()
            head = f"POST /predict HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            known = self._encoded[id(feeds)] = (feeds, head.encode() + body)
        return known[1]


@asynccontextmanager
async def launched(command: list[str], folder: Path, ready: str, extra: Mapping[str, str]) -> AsyncIterator[int]:
    """Runs until the end of the block; answers its process id when `ready` (a URL) does."""
    log = folder / "server.log"
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=folder, env={**os.environ, **extra}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        until = time.monotonic() + _READY_S
        while not await asyncio.to_thread(_answers, ready):
            if process.returncode is not None or time.monotonic() > until:
                raise CannotMeasure(f"{command[0]} does not start: {log.read_text(errors='replace')[-1500:]}")
            await asyncio.sleep(0.2)
        yield process.pid
    finally:
        for number in (15, 9):  # the whole group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def peer(name: str, bundle: Path, folder: Path) -> Launch:
    """LitServe or BentoML on the bundle's `infer.py`."""
    python = environment(name.lower()) / "bin" / "python"
    apps = folder / name.lower()
    apps.mkdir()
    for file in ("engine.py", f"{name.lower()}_app.py"):
        shutil.copy(_HERE / file, apps)

    @asynccontextmanager
    async def serving(setup: Setup) -> AsyncIterator[Running]:
        port = free_port()
        extra = {
            "BUNDLE": str(bundle),
            "THREADS": str(setup.threads or os.cpu_count()),
            "INSTANCES": str(setup.instances),
            "MAX_BATCH": str(setup.max_batch),
            "MAX_DELAY_MS": str(setup.max_delay_ms),
            "MAX_LATENCY_MS": "1000",
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": str(apps / "home"),
        }
        if name == "LitServe":
            command, ready = [str(python), "litserve_app.py", str(port)], "health"
        else:
            listens = ["--host", "127.0.0.1", "--port", str(port)]
            command, ready = [str(python), "-m", "bentoml", "serve", "bentoml_app:Engine", *listens], "readyz"
        async with launched(command, apps, f"http://127.0.0.1:{port}/{ready}", extra) as pid:
            target = JsonTarget(f"http://127.0.0.1:{port}", pid, many=name == "BentoML")
            try:
                yield target
            finally:
                await target.close()

    return serving


def triton(archive: Path, folder: Path) -> Launch:
    """The bundle of kind `triton`, its settings written anew for each setup."""
    server = tritonserver()
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "triton", filter="data")
    (config,) = (folder / "triton").rglob("config.pbtxt")
    text, model = config.read_text(), config.parent.name

    @asynccontextmanager
    async def serving(setup: Setup) -> AsyncIterator[Running]:
        config.write_text(with_setup(text, setup))
        ports = [free_port() for _ in range(2)]
        listens = {"http-address": "127.0.0.1", "http-port": ports[0], "metrics-port": ports[1], "allow-grpc": "false"}
        given = {**listens, "model-repository": config.parents[1]}
        command = [str(server), *(f"--{k}={v}" for k, v in given.items()), "--disable-auto-complete-config"]
        ready = f"http://127.0.0.1:{ports[0]}/v2/models/{model}/ready"
        async with launched(command, folder, ready, {}) as pid:
            target = TritonTarget(f"http://127.0.0.1:{ports[0]}", model, pid)
            try:
                yield target
            finally:
                await target.close()

    return serving


def with_setup(text: str, setup: Setup) -> str:
    """`config.pbtxt` with this many instances and this batching. Raises CannotMeasure."""
    most = re.search(r"^max_batch_size: (\d+)", text, re.MULTILINE)
    if most is None or int(most[1]) < 1:
        raise CannotMeasure("this engine's batch is not the first axis: no server batches its requests")
    text = re.sub(r"^max_batch_size: \d+", f"max_batch_size: {max(setup.max_batch, 1)}", text, flags=re.MULTILINE)
    text = re.sub(r"\bcount: \d+", f"count: {setup.instances}", text, count=1)
    text = _without(_without(text, "dynamic_batching"), "model_warmup")
    if setup.max_batch > 1:
        text += f"\ndynamic_batching {{ max_queue_delay_microseconds: {round(1e3 * setup.max_delay_ms)} }}\n"
    return text


def _without(text: str, field: str) -> str:
    """All messages of this name left out."""
    while (found := re.search(rf"^{field}\s*:?\s*[\[{{]", text, re.MULTILINE)) is not None:
        depth, at = 1, found.end()
        while depth:
            depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(text[at], 0)
            at += 1
        text = text[: found.start()] + text[at:]
    return text


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
    layouts = [(1, cores), (cores, 1)] if cores > 1 else [(1, 1)]
    batches = [(1, 0.0), *((8, delay) for delay in delays)]
    return [Setup(i, t, b, d) for i, t in layouts for b, d in batches]


async def looked(name: str, bench: Bench, tried: list[Setup], guess: float) -> tuple[Setup | None, list[Json]]:
    """The best of the setups by short looks, and what each was seen to serve."""
    rates: list[float] = []
    async with opened(bench):
        for setup in tried:
            plan = Plan(guess, resolution=1.15, least=0.02 * guess)
            rates.append((await bench.goodput(setup, plan, proven=False)).rate)
            say(f"  {name}: {setup}: {rates[-1]:.0f}/s")
    best = max(range(len(tried)), key=rates.__getitem__)
    told = [{"setup": str(setup), "rate": round(rate, 1)} for setup, rate in zip(tried, rates, strict=True)]
    return (tried[best] if rates[best] else None), told


async def proven(name: str, bench: Bench, setup: Setup, rate: float) -> Json:
    """What a setup serves, with so many requests that the p99's bound carries the verdict."""
    # Far below what was looked at nothing is proven: at a few requests a second a verdict takes minutes.
    plan = Plan(rate, resolution=1.05, stride=1.15, least=_LEAST_PROVEN * rate)
    async with opened(bench):
        found = await bench.goodput(setup, plan, proven=True)
    say(f"  {name}: {setup}: {found.rate:.0f}/s proven")
    return found.to_json()


async def alone(launch: Launch, mix: Mix, cores: int) -> float:
    """p50 in ms of one caller over HTTP, one instance on all cores, no batching."""
    async with launch(Setup(1, cores, 1, 0.0)) as target:
        await closed_loop(target, mix, 1, _ALONE_S / 3, 10.0)
        return 1e3 * median_s(await closed_loop(target, mix, 1, _ALONE_S, 10.0))


def launches(files: Case, arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Launch], Path, Json]:
    with deployment(folder / "home") as service, Client(service.url) as client:
        fields = {
            "benchmark": {"batch_sizes": [1, 8], "min_seconds": 0.5},
            "budget_seconds": arguments.budget,
        }
        job, report, _ = anneal.run_job(client, files, **fields)
        anneal.fetch_bundle(client, job, folder)
        url = f"{service.url}/v1/engines/{job['engine_ids'][0]}/bundle?kind=triton"
        with urllib.request.urlopen(url) as answer, (folder / "triton.tar").open("wb") as file:
            shutil.copyfileobj(answer, file)
    bundle = folder / "bundle"
    base = Settings.of_folder(bundle)
    made: dict[str, Launch] = {}
    for name in arguments.servers.split(","):
        if name == "serve.py":
            made[name] = launch_server(bundle, base)
        else:
            made[name] = triton(folder / "triton.tar", folder) if name == "Triton" else peer(name, bundle, folder)
    return made, bundle, {"picked": report["picked"], "speedup": report["final_metrics"]["speedup"]}


async def compare(files: Case, arguments: argparse.Namespace, folder: Path) -> Json:
    made, bundle, facts = await asyncio.to_thread(launches, files, arguments, folder)
    mix, cores = requests(files, bundle), len(os.sched_getaffinity(0))
    waits = {name: await alone(launch, mix, cores) for name, launch in made.items()}
    for name in [name for name, wait in waits.items() if not math.isfinite(wait)]:
        say(f"  {name} answers no request: left out")
        del made[name]
    least = min(waits.values())
    limit = arguments.p99_ms or max(10.0, 6 * least)
    say(f"{files.label}: {facts['picked']} ships, {facts['speedup']}")
    say(f"{files.label}: alone { ({n: round(w, 2) for n, w in waits.items()}) }, p99 limit {limit:.1f} ms")
    tried = setups(cores, (0.0, min(2.0, limit / 8)))
    found: Json = {"limit_ms": round(limit, 2), **facts, "alone_p50_ms": waits, "servers": {}}
    order = [str(name) for name in np.random.default_rng(0).permutation([*made])]
    benches, bests = {}, {}
    for name in order:
        clock = Clock(until=time.monotonic() + _SERVER_S)
        benches[name] = Bench(made[name], mix, Arrivals(True), Limit(limit / 1e3, 5 * limit / 1e3 + 1), clock)
        bests[name], told = await looked(name, benches[name], tried, 0.5e3 / least)
        found["servers"][name] = {"setup": str(bests[name] or "–"), "tried": told, "proven": []}
    # There and back: the machine is not as fast in each minute.
    for name in [*order, *order[::-1]] * arguments.rounds:
        setup, told = bests[name], found["servers"][name]
        if setup is not None:
            rate = max(one["rate"] for one in told["tried"])
            benches[name].clock = Clock(until=time.monotonic() + _PROVEN_S)
            told["proven"].append(await proven(name, benches[name], setup, rate))
    for told in found["servers"].values():
        told["rate"] = float(np.mean([one["rate"] for one in told["proven"]])) if told["proven"] else 0.0
    return found


def measure(arguments: argparse.Namespace) -> Json:
    figures: Json = {}
    rows: list[list[str]] = []
    for name in arguments.models.split(","):
        if name not in NAMES:
            raise CannotMeasure(f"no such model: {name}; there are {', '.join(NAMES)}")
        files = case(name)
        say(f"{files.label} …")
        with scratch(arguments.folder, 4 << 30) as folder:
            try:
                figures[name] = found = asyncio.run(compare(files, arguments, folder))
            except (anneal.JobEnded, AnnealError) as failure:
                figures[name] = {"not_measured": str(failure)}
                print(f"Not measured: {files.label}: {failure}\n", flush=True)
                continue
        best = max((f["rate"] for s, f in found["servers"].items() if s != "serve.py"), default=0.0)
        for server, one in sorted(found["servers"].items(), key=lambda item: -item[1]["rate"]):
            ratio = f"{one['rate'] / best:.2f}" if best else "–"
            alone_ms = f"{found['alone_p50_ms'][server]:.2f}"
            rows.append([files.label, f"{found['limit_ms']:g}", server, f"{one['rate']:.0f}", ratio, alone_ms,
                         one["setup"]])  # fmt: skip
    head = ["model", "p99 limit, ms", "server", "goodput, 1/s", "÷ best peer", "alone, p50 ms", "best setup"]
    print(table(head, rows))
    return {"models": figures}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--models", default="digits,recommender,minilm", help=f"some of {','.join(NAMES)}")
    options.add_argument("--servers", default=",".join(SERVERS), help=f"some of {','.join(SERVERS)}")
    options.add_argument("--rounds", type=int, default=1, help="of the turns of all servers' best setups")
    options.add_argument("--p99-ms", type=float, help="default: 6 × the shortest p50 of one caller, at least 10")
    options.add_argument("--budget", type=int, default=60, help="budget_seconds of the job that makes the engine")
    execute(measure, options.parse_args())
