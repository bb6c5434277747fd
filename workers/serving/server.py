#!/usr/bin/env python3
"""Serve the engine beside this file: the Open Inference Protocol v2 over HTTP, with the dynamic batcher.

    python serve.py [--host 127.0.0.1] [--port 8000] [--grpc-port 8001]

`serving.json` says how (instances, threads, batches, queue). JSON and Triton's binary tensors; Prometheus metrics at
/metrics. SIGTERM ends it when what it has taken is answered. Exit code 1 where the engine does not start.

Needs: numpy, httptools (orjson and uvloop make it faster), and what infer.py needs; for gRPC also grpcio and protobuf.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __package__:
    from . import v2
    from .batcher import (
        Batcher,
        Histogram,
        ServingError,
        Settings,
        SettingsError,
    )
    from .http1 import HttpServer
    from .http_messages import Answer, HttpError, Later, Request, http_error
    from .instances import keep_freed_memory
    from .rows import Array
else:  # beside this file, in a bundle
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import v2  # type: ignore[import-not-found,no-redef]
    from batcher import (  # type: ignore[import-not-found,no-redef]
        Batcher,
        Histogram,
        ServingError,
        Settings,
        SettingsError,
    )
    from http1 import HttpServer  # type: ignore[import-not-found,no-redef]
    from http_messages import (  # type: ignore[import-not-found,no-redef]
        Answer,
        HttpError,
        Later,
        Request,
        http_error,
    )
    from instances import keep_freed_memory  # type: ignore[import-not-found,no-redef]
    from rows import Array  # type: ignore[import-not-found,no-redef]


class App:
    """What is answered to whom. `timeout_s`: of a request that has none of its own; `caller_header`: tells whose turn
    it is, instead of the client's address."""

    def __init__(
        self, batcher: Batcher, name: str, platform: str, *, timeout_s: float = 60.0, caller_header: str | None = None
    ) -> None:
        self.batcher, self.name, self.platform = batcher, name, platform
        self.timeout_s = timeout_s
        self._caller_header = caller_header.lower().encode() if caller_header else None

    def __call__(self, request: Request) -> Answer | Later:
        """Raises `HttpError`."""
        method, path = request.method, request.path.rstrip("/")
        if method == "POST":
            if self._model_path(path) == "infer":
                return self._infer(request)
        elif method in ("GET", "HEAD"):
            found = self._get(path)
            if found is not None:
                return found
        raise HttpError(404, "not_found", f"there is no {method} {request.path}")

    def _get(self, path: str) -> Answer | None:
        ready = 200 if self.batcher.ready else 503
        if path == "/v2/health/live":
            return 200, [], b""
        if path == "/v2/health/ready":
            return ready, [], b""
        if path == "/metrics":
            return 200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")], metrics(self.batcher).encode()
        if path == "/v2":
            told = self.about()
        else:
            what = self._model_path(path)
            if what == "ready":
                return ready, [], b""
            if what != "":
                return None
            told = self.metadata()
        return 200, [(b"content-type", b"application/json")], json.dumps(told).encode()

    def _model_path(self, path: str) -> str | None:
        """What follows the model (and its version): `infer`, `ready`, or nothing; None for another path."""
        parts = path.split("/")
        if parts[:3] != ["", "v2", "models"] or len(parts) < 4:
            return None
        rest, version = parts[4:], None
        if rest[:1] == ["versions"]:
            version, rest = "".join(rest[1:2]), rest[2:]
        self.check_model(parts[3], version)
        return "/".join(rest)

    def check_model(self, name: str, version: str | None) -> None:
        """Raises `HttpError` where it is another one."""
        if name != self.name:
            raise HttpError(404, "unknown_model", f"there is no model {name!r}; there is {self.name!r}")
        if version not in (None, "1"):
            raise HttpError(404, "unknown_version", f"there is version 1 of {self.name!r} only")

    def about(self) -> dict[str, Any]:
        """The server, as the protocol describes it."""
        return {"name": "anneal-serve", "version": "1", "extensions": ["binary_tensor_data"]}

    def metadata(self) -> dict[str, Any]:
        """The model, as the protocol describes it."""
        return v2.metadata(self.name, self.platform, self.batcher.tensors)

    def enqueue(self, asked: v2.Asked, timeout_s: float, caller: str) -> asyncio.Future[dict[str, Array]]:
        """The outputs, to come. Raises `ServingError`."""
        if self.batcher.tensors:
            v2.check_outputs(asked, [t.name for t in self.batcher.tensors[1]])
        return self.batcher.enqueue(asked.feeds, timeout_s, caller)

    def _infer(self, request: Request) -> Later:
        headers = request.headers
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise HttpError(415, "unsupported_encoding", "the body is to be sent as it is, not compressed")
        length = _number(headers, b"inference-header-content-length")
        header = self._caller_header
        caller = headers.get(header, b"").decode("latin-1") if header else request.client
        try:
            asked = v2.decode(request.body, length)
            future = self.enqueue(asked, self.timeout_s if asked.timeout_s is None else asked.timeout_s, caller)
        except ServingError as error:
            raise http_error(error) from None
        asked.feeds.clear()  # the batcher has them as long as they are needed

        def told(done: asyncio.Future[dict[str, Array]]) -> Answer:
            try:
                encoded, header_length = v2.encode(self.name, asked, done.result())
            except ServingError as error:
                raise http_error(error) from None
            if header_length is None:
                return 200, [(b"content-type", b"application/json")], encoded
            with_length = (b"inference-header-content-length", str(header_length).encode())
            return 200, [(b"content-type", b"application/octet-stream"), with_length], encoded

        return Later(future, told)


def _number(headers: dict[bytes, bytes], name: bytes) -> int | None:
    value = headers.get(name)
    if value is None:
        return None
    if not value.isdigit():
        raise HttpError(400, "invalid_request", f"{name.decode()} is {value.decode('latin-1')!r}, not a number")
    return int(value)


def metrics(batcher: Batcher) -> str:
    """In Prometheus' text format."""
    return "\n".join(_metrics(batcher)) + "\n"


def _metrics(batcher: Batcher) -> Iterator[str]:
    stats = batcher.stats
    yield from (
        "# HELP anneal_serve_requests_total Requests by how they ended.",
        "# TYPE anneal_serve_requests_total counter",
    )
    yield from (f'anneal_serve_requests_total{{outcome="{how}"}} {n}' for how, n in sorted(stats.ended.items()))
    for name, kind, value, text in (
        ("retried_total", "counter", stats.retried, "Requests that were run once more, alone."),
        ("instance_restarts_total", "counter", stats.restarts, "Processes of the engine that ended."),
        ("instances_up", "gauge", batcher.up, "Processes that have loaded the engine."),
        ("instances", "gauge", batcher.settings.instances, "Processes that are wanted."),
        ("waiting", "gauge", batcher.waiting, "Requests whose batch has not begun."),
        ("queue_limit", "gauge", batcher.settings.queue_limit, "Requests that may wait."),
        ("in_flight", "gauge", batcher.in_flight, "Requests that run."),
    ):
        yield from (
            f"# HELP anneal_serve_{name} {text}",
            f"# TYPE anneal_serve_{name} {kind}",
            f"anneal_serve_{name} {value}",
        )
    yield from _histogram("batch_size", stats.batch_size, "Rows of the batches that ran.")
    yield from _histogram("request_seconds", stats.request, "From a request's arrival to its answer, where it had one.")
    yield from _histogram("queue_seconds", stats.queue, "What requests waited before their batch began.")
    yield from _histogram("compute_seconds", stats.compute, "What batches took, arrays there and back included.")


def _histogram(name: str, found: Histogram, text: str) -> Iterator[str]:
    name = f"anneal_serve_{name}"
    yield from (f"# HELP {name} {text}", f"# TYPE {name} histogram")
    total = 0
    for bound, n in zip((*map(str, found.bounds), "+Inf"), found.counts, strict=True):
        total += n
        yield f'{name}_bucket{{le="{bound}"}} {total}'
    yield from (f"{name}_sum {found.sum:.9g}", f"{name}_count {total}")


def _told(folder: Path) -> tuple[str, str]:
    """The model's name and the engine's format, as the manifest tells them."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return manifest.get("name") or folder.name, (manifest.get("engine") or {}).get("format") or "unknown"


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="the unpacked bundle")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free, which is printed")
    parser.add_argument("--grpc-port", type=int, help="serve gRPC too (needs grpcio and protobuf); 0: any that is free")
    parser.add_argument("--name", help="of the model in the paths (default: as the manifest says)")
    parser.add_argument("--max-request-mb", type=float, default=64.0, help="of a request's body (default: 64)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds of a request that has no timeout of its own"
    )
    parser.add_argument(
        "--caller-header", help="header that says who asks, for fairness (default: the client's address)"
    )
    parser.add_argument("--grace", type=float, default=30.0, help="seconds for what was taken, after SIGTERM")
    args = parser.parse_args()
    keep_freed_memory()
    name, platform = _told(args.folder)
    try:
        batcher = Batcher(args.folder, Settings.of_folder(args.folder))
        listening = socket.create_server((args.host, args.port), backlog=2048)
    except (SettingsError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    app = App(batcher, args.name or name, platform, timeout_s=args.timeout, caller_header=args.caller_header)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(app, listening, args))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _serve(app: App, listening: socket.socket, args: argparse.Namespace) -> int:
    """The exit code. Alive at once; ready when every instance has loaded the engine."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    max_bytes = int(args.max_request_mb * 1e6)
    server = HttpServer(app, max_bytes=max_bytes)
    host, port = listening.getsockname()[:2]
    told = f"{app.name} is served at http://{host}:{port}"
    await server.start(listening)
    beside = None
    try:
        if args.grpc_port is not None:
            beside, bound = await _grpc(app, args, max_bytes)
            told += f" and at grpc://{host}:{bound}"
        if await _until_ready(app.batcher, stop):
            why = app.batcher.one_by_one
            print(told + (f" ({why})" if why else ""), flush=True)
            await stop.wait()
        code = 0
    except (ServingError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        code = 1
    until = time.monotonic() + args.grace
    await asyncio.gather(server.stop(args.grace), *([beside.stop(args.grace)] if beside is not None else []))
    await app.batcher.stop(max(until - time.monotonic(), 0.0))
    return code


async def _until_ready(batcher: Batcher, stop: asyncio.Event) -> bool:
    """False where it is to stop before. Raises `ServingError`, OSError."""
    stopped, starting = asyncio.create_task(stop.wait()), asyncio.create_task(batcher.start())
    await asyncio.wait({stopped, starting}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return False
    starting.result()
    return not stop.is_set()


async def _grpc(app: App, args: argparse.Namespace, max_bytes: int) -> tuple[Any, int]:
    """The gRPC server, and its port. Raises ImportError, OSError."""
    try:
        if __package__:
            from . import grpc_server
        else:
            import grpc_server  # type: ignore[import-not-found,no-redef]
    except ImportError as error:
        raise ImportError(f"gRPC needs grpcio and protobuf (pip install grpcio protobuf): {error}") from None
    started: tuple[Any, int] = await grpc_server.start(app, args.host, args.grpc_port, max_bytes, args.caller_header)
    return started


if __name__ == "__main__":
    sys.exit(main())
