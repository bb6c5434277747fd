"""A model repository in a real tritonserver: whether it loads, and whether what comes back is the engine's answer."""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.rounding import tolerance
from workers.serving.probe import apart
from workers.serving.v2_client import Connection, Refused

if TYPE_CHECKING:
    from workers.kernel import Arrays

CALLERS, CALLS = 8, 96  # at once, and together
_STOPS_S = 15.0
_CALL_S = 60.0
_METRIC = re.compile(r'^(nv_inference_\w+)\{model="([^"]*)",version="[^"]*"\} (\S+)$', re.MULTILINE)


class NotLoaded(Exception):
    """The server does not serve the repository as it should; the message says what it did instead."""


@dataclass(frozen=True)
class Server:
    """One that is ready. `log`: what it writes."""

    http_port: int
    metrics_port: int
    log: Path

    def metrics(self, model: str) -> dict[str, float]:
        """Of this model: `nv_inference_request_success`, `nv_inference_exec_count`, …"""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {name: float(value) for name, found, value in _METRIC.findall(text) if found == model}


@contextmanager
def running(command: Path, repository: Path, scratch: Path, ready_s: float) -> Iterator[Server]:
    """`command`: the tritonserver, or a script that starts it with the arguments given. Raises `NotLoaded`."""
    ports = _free_ports(2)
    log = scratch / "tritonserver.log"
    listens = {"http-address": "127.0.0.1", "http-port": ports[0], "metrics-address": "127.0.0.1"}
    given = {**listens, "metrics-port": ports[1], "allow-grpc": "false", "model-repository": repository}
    arguments = [f"--{name}={value}" for name, value in given.items()]
    with log.open("wb") as output:
        try:
            # In the caller's process group, which ends as a whole.
            process = subprocess.Popen(
                [str(command), *arguments, "--disable-auto-complete-config"],
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            raise NotLoaded(f"{command.name} cannot be started ({error.strerror})") from error
    try:
        _wait(process, ports[0], log, ready_s)
        yield Server(ports[0], ports[1], log)
    finally:
        process.terminate()
        try:
            process.wait(_STOPS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Example:
    """One call of a model: arrays by name. `batched`: their first axes are the batch."""

    model: str
    feeds: Arrays
    expected: Mapping[str, Any]
    batched: bool
    precision: str


def replayed(server: Server, example: Example) -> dict[str, Any]:
    """The example asked for once, and then by many callers at once. {requests, executions, largest_difference (over the
    largest number of its output)}; raises `NotLoaded` where an answer is another, as far as the precision carries."""
    model, worst = example.model, _asked(server, example, 1)
    before = server.metrics(model)
    with ThreadPoolExecutor(CALLERS) as pool:
        calls = [pool.submit(_asked, server, example, CALLS // CALLERS) for _ in range(CALLERS)]
        worst = max(worst, *(call.result() for call in calls))
    after = server.metrics(model)
    allowed = tolerance(example.precision)
    if not worst <= allowed:
        raise NotLoaded(f"its answers differ by {worst:.3g} of the largest number, allowed is {allowed:.3g}")
    told = {"requests": "nv_inference_request_success", "executions": "nv_inference_exec_count"}
    counted = {name: int(after.get(metric, 0) - before.get(metric, 0)) for name, metric in told.items()}
    return {**counted, "largest_difference": worst}


def _asked(server: Server, example: Example, times: int) -> float:
    """The largest difference of all answers, over the largest number of its output; infinite where one has another
    shape or type."""
    connection, names = Connection(server.http_port, example.model, _CALL_S), list(example.expected)
    try:
        found = [connection.infer(example.feeds, names, batched=example.batched) for _ in range(times)]
    except (Refused, OSError, http.client.HTTPException) as error:
        raise NotLoaded(f"it does not answer: {error}") from error
    finally:
        connection.close()
    return max(
        apart(_shaped(answer[name], wanted), wanted) for answer in found for name, wanted in example.expected.items()
    )


def _shaped(found: Any, wanted: Any) -> Any:
    """Without the axis that Triton gives to what has none."""
    return found.reshape(wanted.shape) if found.shape == (*wanted.shape, 1) else found


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, ready_s: float) -> None:
    deadline = time.monotonic() + ready_s
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            pass
        if process.poll() is not None:
            raise NotLoaded(f"it ended with {process.returncode}: {_said(log)}")
        if time.monotonic() > deadline:
            raise NotLoaded(f"it was not ready after {ready_s:.0f} s: {_said(log)}")
        time.sleep(0.1)


def _said(log: Path) -> str:
    """Its last error, without the trace; else the end of its log."""
    text = log.read_text(errors="replace")
    errors = re.findall(r"^E\d{4} .*?\] (.*)$", text, re.MULTILINE)
    return errors[-1].split("\\n\\nAt:")[0][:500] if errors else text[-500:].strip() or "it wrote nothing"


def _free_ports(count: int) -> Sequence[int]:
    """That nothing on this machine listens on now: tritonserver takes no port 0."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
