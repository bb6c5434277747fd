"""What the benchmarks share: real servers in processes of their own, ratios round by round, a table, a JSON file."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HOST = "127.0.0.1"
MIB = 1 << 20
GIB = 1 << 30
DIGITS = ROOT / "examples" / "digits"

_PR_SET_PDEATHSIG = 1


class CannotMeasure(Exception):
    """There is no figure, and this is why."""


# Processes


@dataclass
class Server:
    """A process that listens on `port`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(self, path: str, timeout_s: float = 60, expected: str = "") -> None:
        """Until it answers 200 there, with `expected` in the body."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(self.url + path, timeout=5, trust_env=False)
                if answer.status_code == httpx.codes.OK and expected in answer.text:
                    return
            time.sleep(0.05)
        raise CannotMeasure(f"{self.url}{path} did not come up:\n{self.log.read_text(errors='replace')[-3000:]}")


@contextlib.contextmanager
def server(command: Sequence[str], environment: Mapping[str, str], port: int, log: Path) -> Iterator[Server]:
    """Run `python COMMAND` until the context ends; nothing of it is left then."""
    with log.open("wb") as output:
        # In a session of its own, so that Ctrl-C reaches this process only. `preexec_fn` is safe: there are no threads.
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  # see above
        )
    found = Server(process, port, log)
    try:
        yield found
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _, left = psutil.wait_procs(children, timeout=5)
        for child in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def environment(home: Path, port: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the service's processes are told: the embedded default in `home`, whatever the shell has set."""
    prefixes = ("ANNEAL_", "WORKER_", "STORAGE_", "LIMIT_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    for name in ("DATABASE_URL", "BROKER_URL", "S3_ENDPOINT_URL"):
        kept.pop(name, None)
    return {**kept, "ANNEAL_HOME": str(home), "ANNEAL_HOST": HOST, "ANNEAL_PORT": str(port), **(extra or {})}


@contextlib.contextmanager
def api(home: Path, extra: Mapping[str, str] | None = None) -> Iterator[Server]:
    """The API alone (`python -m app api`) on a migrated database."""
    port = free_port()
    env = environment(home, port, extra)
    home.mkdir(parents=True, exist_ok=True)
    migrated = subprocess.run(
        [sys.executable, "-m", "app", "migrate"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if migrated.returncode:
        raise CannotMeasure(f"the database could not be migrated:\n{migrated.stderr[-3000:]}")
    with server(["-m", "app", "api"], env, port, home / "api.log") as found:
        found.wait_for("/healthz")
        yield found


@contextlib.contextmanager
def deployment(home: Path, extra: Mapping[str, str] | None = None) -> Iterator[Server]:
    """API and one worker (`python -m app serve`), once the worker is live."""
    port = free_port()
    home.mkdir(parents=True, exist_ok=True)
    with server(["-m", "app", "serve"], environment(home, port, extra), port, home / "serve.log") as found:
        found.wait_for("/readyz", 120, '"status":"ready"')
        yield found


@contextlib.contextmanager
def bare(kind: str, *arguments: str, log: Path) -> Iterator[Server]:
    """The bare peer (`bare.py`), run by uvicorn with the options that the service uses."""
    port = free_port()
    command = [str(HERE / "bare.py"), kind, "--port", str(port), *arguments]
    with server(command, environment(log.parent, port), port, log) as found:
        found.wait_for("/healthz")
        yield found


@contextlib.contextmanager
def scratch(folder: Path | None, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder, below the checkout's `build/` unless said otherwise: /tmp is memory on many machines."""
    base = folder or ROOT / "build" / "bench"
    base.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(base).free
    if free < needed_bytes + GIB:
        raise CannotMeasure(
            f"{base} has {free / GIB:.1f} GiB free; {needed_bytes / GIB + 1:.1f} GiB are needed (--folder)"
        )
    with tempfile.TemporaryDirectory(prefix="run-", dir=base) as path:
        yield Path(path)


# Figures


@dataclass
class Contest:
    """The same thing measured on several contenders in turns; `values[name]` has one figure per round."""

    names: Sequence[str]
    values: dict[str, list[float]] = field(default_factory=dict)

    def run(self, rounds: int, measure: Callable[[str], float]) -> None:
        """A B, B A, A B …: who goes first changes, so that what one round leaves behind meets everybody."""
        for turn in range(rounds):
            order = list(self.names) if turn % 2 == 0 else list(reversed(self.names))
            for name in order:
                self.values.setdefault(name, []).append(measure(name))

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def ratio(self, name: str, peer: str) -> Ratio:
        pairs = zip(self.values[name], self.values[peer], strict=True)
        return Ratio([a / b for a, b in pairs])


@dataclass
class Ratio:
    """One ratio per round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        return f"{100 * self.median:.0f} % ({100 * min(self.rounds):.0f}–{100 * max(self.rounds):.0f})"

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "min": min(self.rounds), "max": max(self.rounds), "rounds": self.rounds}


def spread(values: Sequence[float], digits: int = 0, unit: str = "") -> str:
    """Median (min–max)."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f}{unit} ({low:.{digits}f}–{high:.{digits}f})"


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, readable as plain text too."""
    cells = [[str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


# The machine


def machine() -> dict[str, Any]:
    """What could explain a difference between two runs."""
    versions = {}
    for name in ("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "sqlalchemy", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


# The command


def parser(text: str | None) -> argparse.ArgumentParser:
    """Options that all commands have."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure, round by round")
    found.add_argument("--folder", type=Path, help="scratch space, on the disk to measure (default: build/bench)")
    return found


def execute(measure: Callable[[argparse.Namespace], dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Run one benchmark command. Figures are not tests: a missed goal is printed, and the exit status stays 0."""
    signal.signal(signal.SIGTERM, _interrupt)
    here = machine()
    print(
        f"{here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB, Python {here['python']}, "
        f"load average at start {here['load_average']}\n",
        flush=True,
    )
    if here["load_average"] > 0.5 * here["cores"]:
        print("The machine is busy with something else: these figures are not to be quoted.\n", flush=True)
    try:
        figures = measure(arguments)
    except CannotMeasure as reason:
        print(f"Not measured: {reason}")
        figures = {"not_measured": str(reason)}
    except KeyboardInterrupt:
        print("Interrupted.")
        return
    if arguments.json is not None:
        document = {"machine": here, "arguments": _plain(vars(arguments)), **figures}
        arguments.json.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """What happens now, apart from the figures on stdout."""
    print(text, file=sys.stderr, flush=True)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
