"""Closed-loop load on one address over HTTP/1.1 keep-alive connections: `wrk` where it is installed, else the generator
below in a process of its own (which needs more of the second core, so its ceiling is lower: about 10,000 requests/s).
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


@dataclass(frozen=True)
class Load:
    """What came back; `bad` counts answers that were not 2xx or 3xx, and broken connections."""

    requests: int
    requests_s: float
    p50_ms: float
    p99_ms: float
    bad: int


def generator() -> str:
    return "wrk, 1 thread" if shutil.which("wrk") else "Python generator (no wrk on this machine)"


def load(url: str, headers: Mapping[str, str], connections: int, seconds: float) -> Load:
    if shutil.which("wrk"):
        return _wrk(url, headers, connections, seconds)
    arguments = json.dumps([url, dict(headers), connections, seconds])
    done = subprocess.run([sys.executable, __file__, arguments], capture_output=True, text=True, check=True)
    return Load(**json.loads(done.stdout))


def _wrk(url: str, headers: Mapping[str, str], connections: int, seconds: float) -> Load:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency"]
    command += [f"-H{name}: {value}" for name, value in headers.items()]
    text = subprocess.run([*command, url], capture_output=True, text=True, check=True).stdout
    rate = re.search(r"Requests/sec:\s*([\d.]+)", text)
    if rate is None:
        raise RuntimeError(f"wrk said:\n{text}")
    total = re.search(r"(\d+) requests in", text)
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    broken = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    count = int(bad[1]) if bad else 0
    count += sum(int(n) for n in broken.groups()) if broken else 0
    return Load(int(total[1]) if total else 0, float(rate[1]), _wrk_ms(text, 50), _wrk_ms(text, 99), count)


def _wrk_ms(text: str, percent: int) -> float:
    found = re.search(rf"^\s*{percent}%\s+([\d.]+)(us|ms|s|m)\s*$", text, re.MULTILINE)
    return float(found[1]) * _UNITS[found[2]] if found else float("nan")


# The generator for machines without wrk


class _Connection(asyncio.Protocol):
    """Sends the next request as soon as the answer to the last one is whole."""

    def __init__(self, request: bytes, times: list[float], bad: list[int]) -> None:
        self._request = request
        self._times = times
        self._bad = bad
        self._held = b""
        self._sent = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        assert self._transport is not None
        self._sent = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._held += data
        end = self._held.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._held[:end].lower()
        found = re.search(rb"content-length: *(\d+)", head)
        status = int(head[9:12])
        size = end + 4 + (int(found[1]) if found and status != 304 else 0)
        if len(self._held) < size:
            return
        self._held = self._held[size:]
        self._times.append(time.perf_counter() - self._sent)
        if status >= 400:
            self._bad[0] += 1
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._bad[0] += 1


async def _generate(url: str, headers: Mapping[str, str], connections: int, seconds: float) -> Load:
    address, _, path = url.removeprefix("http://").partition("/")
    host, _, port = address.partition(":")
    fields = {"Host": address, **headers}
    request = f"GET /{path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n"
    times: list[float] = []
    bad = [0]
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    transports = []
    for _ in range(connections):
        transport, _ = await loop.create_connection(
            lambda: _Connection(request.encode(), times, bad), host, int(port or 80)
        )
        transports.append(transport)
    await asyncio.sleep(seconds)
    elapsed = time.perf_counter() - started
    found = sorted(times)
    for transport in transports:
        transport.abort()
    return Load(len(found), len(found) / elapsed, _rank_ms(found, 0.5), _rank_ms(found, 0.99), bad[0])


def _rank_ms(ordered: Sequence[float], part: float) -> float:
    return 1000 * ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(_generate(*json.loads(sys.argv[1]))))))
