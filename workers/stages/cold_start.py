"""Stage `cold_start`: what a machine that served nothing takes to the first answer. The bundle that ships is unpacked,
and its server started in a process of its own, several times; timed from before the process is there."""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
from pydantic import Field

from app.domain.failures import FailureKind, StageFailure
from workers.kernel import Stage, StageContext, StageOptions, StageResult
from workers.measure.method import versions
from workers.members import names_of
from workers.serving.launching import SERVER, process, server_command
from workers.serving.v2_client import Connection, Refused

_STARTS = 3
_LONGEST_S = 60.0  # where nothing else limits the stage
_END_S = 1.0  # to stop what was started and to write the result
_PAUSE_S = 0.01  # between looks at whether the server is there: what the figures are exact to
_MODEL = "model"
_METHOD = (
    "The bundle's `serve.py` in a new process each time, from before the process exists to its first answer (its "
    "sample input, over HTTP); medians. The bundle and the libraries were in the page cache: who reads them from a "
    "disk, or fetches the archive or a container's image, takes that much longer."
)


class ColdStartOptions(StageOptions):
    """`backend`, `runtime`: of what ships. `serving`: what `serving.json` holds then; None: as it lies in the
    bundle."""

    backend: str
    runtime: dict[str, Any] = Field(default_factory=dict)
    serving: dict[str, Any] | None = Field(default=None)


@dataclass(frozen=True)
class Start:
    """Seconds since before the process was there: until the server answered at all (`alive`: Python and the server's
    imports), had loaded the engine (`ready`), and had answered the first request."""

    alive: float
    ready: float
    answered: float


class ColdStart(Stage[ColdStartOptions]):
    """inputs: bundle (the .zip that ships). No output.

    data: starts, alive_seconds, ready_seconds, first_answer_seconds (medians), slowest_seconds, unpack_seconds,
    from_zero_seconds (unpacking and the first answer), archive_mb, unpacked_mb, method, versions.
    """

    name = "cold_start"
    version = 1
    Options = ColdStartOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "httptools")
    hardware_bound = True
    loopback = True
    exclusive_device = True
    weight: ClassVar[float] = 0.5

    def run(self, ctx: StageContext, options: ColdStartOptions) -> StageResult:
        until = time.monotonic() + max(min(ctx.seconds_left(), _LONGEST_S) - _END_S, 1.0)
        archive, folder = ctx.only_file("bundle"), ctx.workspace / "bundle"
        began = time.monotonic()
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        unpacked = time.monotonic() - began
        if not (folder / SERVER).exists():
            raise StageFailure("no_server", "the bundle has no server of its own", stage="cold_start")
        if options.serving is not None:
            (folder / "serving.json").write_text(json.dumps(options.serving), encoding="utf-8")
        starts: list[Start] = []
        while len(starts) < _STARTS and (not starts or time.monotonic() + 2 * starts[-1].answered < until):
            starts.append(started(folder, until))
            ctx.reporter.progress(len(starts) / _STARTS, f"first answer after {starts[-1].answered:.2f} s")
        answered = [start.answered for start in starts]
        first = statistics.median(answered)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        data = {
            "starts": len(starts),
            "alive_seconds": round(statistics.median(start.alive for start in starts), 3),
            "ready_seconds": round(statistics.median(start.ready for start in starts), 3),
            "first_answer_seconds": round(first, 3),
            "slowest_seconds": round(max(answered), 3),
            "unpack_seconds": round(unpacked, 3),
            "from_zero_seconds": round(unpacked + first, 3),
            "archive_mb": round(archive.stat().st_size / 1e6, 3),
            "unpacked_mb": round(size / 1e6, 3),
            "method": _METHOD,
            "versions": versions(names_of(options.backend, options.runtime)),
        }
        return StageResult((), data, reusable=len(starts) == _STARTS)


def started(folder: Path, until: float) -> Start:
    """One start of the server in the unpacked bundle. Raises StageFailure (`server_does_not_start`)."""
    with np.load(folder / "sample_input.npz", allow_pickle=False) as sample:
        feeds = {name: sample[name] for name in sample.files}
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    outputs = [told["name"] for told in manifest["outputs"]]
    log = folder.parent / "serve.log"
    began = time.monotonic()
    with process(folder, log, server_command("--name", _MODEL, "--grace", "1")) as server:
        _until(server, log, until, lambda: _port(server.pid) is not None)
        port = _port(server.pid) or 0
        alive = _until(server, log, until, lambda: _status(port, "live", until) is not None) - began
        ready = _until(server, log, until, lambda: _status(port, "ready", until) == http.HTTPStatus.OK) - began
        connection = Connection(port, _MODEL, max(until - time.monotonic(), 0.1))
        try:
            connection.infer(feeds, outputs)
        except (Refused, OSError, http.client.HTTPException) as error:
            raise _failure(f"its server does not answer: {error}", log) from error
        finally:
            connection.close()
        return Start(alive, ready, time.monotonic() - began)


def _until(server: subprocess.Popen[bytes], log: Path, until: float, there: Callable[[], bool]) -> float:
    """The moment at which it is there."""
    while not there():
        if server.poll() is not None:
            raise _failure(f"its server ended with {server.returncode}", log)
        if time.monotonic() > until:
            raise _failure("its server was not there when the time was up", log)
        time.sleep(_PAUSE_S)
    return time.monotonic()


def _status(port: int, what: str, until: float) -> int | None:
    """None where nobody answers yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=max(until - time.monotonic(), 0.1))
    try:
        connection.request("GET", f"/v2/health/{what}")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _failure(what: str, log: Path) -> StageFailure:
    said = log.read_text(errors="replace").strip()[-500:]
    return StageFailure(
        "server_does_not_start",
        f"The bundle does not serve: {what}" + (f" ({said})" if said else "") + ".",
        FailureKind.MODEL,
        "cold_start",
        cacheable=False,
    )


def _port(pid: int) -> int | None:
    """That the process listens on, which it tells itself only once it is ready."""
    with suppress(psutil.Error):
        found = psutil.Process(pid).net_connections("tcp")
        return next((c.laddr.port for c in found if c.status == psutil.CONN_LISTEN), None)
    return None
