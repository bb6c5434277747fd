"""The servers that are compared: `serve.py` of the bundle and its peers on the same engine, each in any setup."""

from __future__ import annotations

import asyncio
import contextlib
import json
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

from _common import CannotMeasure, free_port
from engine import encoded

from tests.integrations.environments import environment
from tests.integrations.tritonserver import tritonserver
from workers.measure.load.bench import Launch, Running, Setup
from workers.measure.load.over_http import MODEL, HttpTarget
from workers.measure.load.served import settings_of
from workers.measure.load.target import Feeds
from workers.serving.serving_settings import FILE, Settings

OURS = "serve.py"
NAMES = (OURS, "Triton", "LitServe", "BentoML")
_HERE = Path(__file__).resolve().parent
_READY_S, _STOP_S = 90.0, 10.0


def launches(names: list[str], bundle: Path, archive: Path, folder: Path) -> dict[str, Launch]:
    """`archive`: the bundle of kind `triton`. What is not installed yet is. Raises CannotMeasure."""
    base = Settings.of_folder(bundle)
    made: dict[str, Launch] = {}
    for name in names:
        if name not in NAMES:
            raise CannotMeasure(f"no such server: {name}; there are {', '.join(NAMES)}")
        if name == OURS:
            made[name] = own(bundle, base)
        else:
            made[name] = triton(archive, folder) if name == "Triton" else peer(name, bundle, folder)
    return made


class TritonTarget(HttpTarget):
    """Where Triton batches, its batch axis stands before an input's own: what has one number a sample comes as
    [batch, 1]."""

    def __init__(self, url: str, model: str, pid: int, *, batched: bool) -> None:
        super().__init__(url, model, pid)
        self._batched = batched

    def _request(self, feeds: Feeds) -> bytes:
        known = self._encoded.get(id(feeds))
        if known is None:
            flat = {name for name, array in feeds.items() if self._batched and array.ndim == 1}
            wide = {name: array.reshape(-1, 1) if name in flat else array for name, array in feeds.items()}
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


def own(bundle: Path, base: Settings) -> Launch:
    """`serve.py`, with its settings written anew for each setup; in a session of its own, as its peers."""

    @asynccontextmanager
    async def serving(setup: Setup) -> AsyncIterator[Running]:
        (bundle / FILE).write_text(json.dumps(settings_of(base, setup).to_json()), encoding="utf-8")
        port = free_port()
        command = [sys.executable, "serve.py", "--port", str(port), "--name", MODEL]
        async with launched(command, bundle, f"http://127.0.0.1:{port}/v2/health/ready", {}) as pid:
            target = HttpTarget(f"http://127.0.0.1:{port}", pid=pid)
            try:
                yield target
            finally:
                await target.close()

    return serving


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
            target = TritonTarget(f"http://127.0.0.1:{ports[0]}", model, pid, batched=_batched(text))
            try:
                yield target
            finally:
                await target.close()

    return serving


def with_setup(text: str, setup: Setup) -> str:
    """`config.pbtxt` with this many instances and this batching; where requests cannot share a batch, without any."""
    if _batched(text):
        text = re.sub(r"^max_batch_size: \d+", f"max_batch_size: {setup.max_batch}", text, flags=re.MULTILINE)
    text = re.sub(r"\bcount: \d+", f"count: {setup.instances}", text, count=1)
    text = _without(_without(text, "dynamic_batching"), "model_warmup")
    if setup.max_batch > 1:
        text += f"\ndynamic_batching {{ max_queue_delay_microseconds: {round(1e3 * setup.max_delay_ms)} }}\n"
    return text


def _batched(config: str) -> bool:
    most = re.search(r"^max_batch_size: (\d+)", config, re.MULTILINE)
    return most is not None and int(most[1]) > 0


def _without(text: str, field: str) -> str:
    """All messages of this name left out."""
    while (found := re.search(rf"^{field}\s*:?\s*[\[{{]", text, re.MULTILINE)) is not None:
        depth, at = 1, found.end()
        while depth:
            depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(text[at], 0)
            at += 1
        text = text[: found.start()] + text[at:]
    return text
