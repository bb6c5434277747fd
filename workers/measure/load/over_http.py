"""The server that ships, from outside: `serve.py` of a bundle, driven by the Open Inference Protocol v2 over HTTP with
binary tensors. Connections are kept and as many as requests are under way."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from app.domain.failures import StageFailure
from workers.measure.instances import memory_bytes
from workers.measure.load.bench import Launch, Running, Setup
from workers.measure.load.served import settings_of
from workers.measure.load.target import FAILED, OK, REJECTED, TIMED_OUT, Counters, Feeds, Outcome
from workers.serving.batcher import Settings
from workers.serving.launching import environment, port_of, server_command
from workers.serving.v2 import DATATYPES

MODEL = "model"
_START_S = 60.0
_GRACE_S = 5.0
_LIMIT = 64 << 20  # of a line or body that is read
_LOST = "connection_lost"
_METRICS_S = 2.0  # to wait for the server's metrics
_METRIC = re.compile(r"^anneal_serve_(\w+) (\S+)$", re.MULTILINE)
_BATCHES = re.compile(r'^anneal_serve_batch_size_bucket\{le="([^"]+)"\} (\S+)$', re.MULTILINE)
_STATUS = {200: OK, 503: REJECTED, 504: TIMED_OUT}


class HttpTarget:
    """A v2 server at `url`. `pid`: of its process, where that is known."""

    def __init__(self, url: str, model: str = MODEL, pid: int | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._port, self.pid = parts.hostname or "127.0.0.1", parts.port or 80, pid
        self._head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {parts.netloc}\r\n".encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._counted = Counters()
        self._encoded: dict[int, tuple[Feeds, bytes]] = {}  # by the feeds' identity: the same few come again and again

    async def submit(self, feeds: Feeds, deadline_s: float) -> Outcome:
        connection = self._idle.pop() if self._idle else None
        whole = False
        try:
            async with asyncio.timeout(deadline_s):
                connection = connection or await asyncio.open_connection(self._host, self._port, limit=_LIMIT)
                reader, writer = connection
                writer.write(self._request(feeds))
                await writer.drain()
                outcome = await _answer(reader)
                whole = True
                return outcome
        except TimeoutError:
            return Outcome(TIMED_OUT, "deadline_exceeded")
        except (OSError, EOFError, ValueError):
            return Outcome(FAILED, _LOST)
        finally:  # a request that is given up leaves: the server sees the connection close
            if connection is not None and whole:
                self._idle.append(connection)
            elif connection is not None:
                connection[1].close()

    def counters(self) -> Counters:
        """As the server's /metrics tells them; where it does not answer, as it told them last. Between runs: it waits
        for the answer."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_METRICS_S)
        try:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            if answer.status == http.HTTPStatus.OK:
                self._counted = counters_of(answer.read().decode())
        except (OSError, http.client.HTTPException, ValueError):
            pass
        finally:
            connection.close()
        return self._counted

    def memory_mb(self) -> float | None:
        """Of the server's process and its instances'."""
        if self.pid is None:
            return None
        children = psutil.Process(self.pid).children(recursive=True)
        return sum(map(memory_bytes, [self.pid, *(child.pid for child in children)])) / 1e6

    async def close(self) -> None:
        connections, self._idle = self._idle, []
        for _, writer in connections:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _request(self, feeds: Feeds) -> bytes:
        known = self._encoded.get(id(feeds))
        if known is None:
            known = self._encoded[id(feeds)] = (feeds, self._head + encoded(feeds))
        return known[1]


def counters_of(text: str) -> Counters:
    """Of serve.py's metrics, in Prometheus' text format; zero is what a server does not tell. Sizes of batches are the
    bounds of its histogram; those beyond the last one are counted as twice that."""
    told = {name: float(value) for name, value in _METRIC.findall(text)}
    batches: Counter[int] = Counter()
    size = below = 0
    for bound, count in _BATCHES.findall(text):
        size = 2 * size if bound == "+Inf" else int(bound)
        batches[size] = int(float(count)) - below
        below += batches[size]
    return Counters(
        +batches,
        told.get("queue_seconds_sum", 0.0),
        int(told.get("queue_seconds_count", 0)),
        told.get("compute_seconds_sum", 0.0),
        int(told.get("compute_seconds_count", 0)),
    )


def encoded(feeds: Feeds) -> bytes:
    """The rest of the headers and the body of a request with binary tensors, which asks for binary outputs."""
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": DATATYPES[array.dtype.name],
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in feeds.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    body = head + b"".join(array.tobytes() for array in feeds.values())
    return (
        f"Inference-Header-Content-Length: {len(head)}\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


async def _answer(reader: asyncio.StreamReader) -> Outcome:
    """Reads the whole answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    status = int(lines[0].split(" ", 2)[1])
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    if status == 200:
        return Outcome(OK)
    try:
        code = str(json.loads(body).get("code", status))
    except ValueError:
        code = str(status)
    return Outcome(_STATUS.get(status, FAILED), code, float(headers.get("retry-after", "nan")))


def launch_server(folder: Path, base: Settings) -> Launch:
    """Starts `serve.py` of the bundle in `folder`, as a user would, with the settings of a setup."""

    def launch(setup: Setup) -> AbstractAsyncContextManager[Running]:
        return _serving(folder, settings_of(base, setup))

    return launch


@asynccontextmanager
async def _serving(folder: Path, settings: Settings) -> AsyncIterator[Running]:
    (folder / "serving.json").write_text(json.dumps(settings.to_json()), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *server_command("--name", MODEL),
        cwd=folder,
        env=environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    target: HttpTarget | None = None
    try:
        target = HttpTarget(await _url(process), pid=process.pid)
        yield target
    finally:
        if target is not None:
            await target.close()
        await _end(process)


async def _url(process: asyncio.subprocess.Process) -> str:
    """What it prints when it is ready. Raises StageFailure (`server_does_not_start`)."""
    assert process.stdout is not None
    began = time.monotonic()
    try:
        line = await asyncio.wait_for(process.stdout.readline(), _START_S)
    except TimeoutError:
        line = b""
    port = port_of(line)
    if port is None:
        detail = f"serve.py of the bundle was not ready within {time.monotonic() - began:.1f} s."
        raise StageFailure("server_does_not_start", detail, stage="load_test", cacheable=False)
    return f"http://127.0.0.1:{port}"


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _GRACE_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
