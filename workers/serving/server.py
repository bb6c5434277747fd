#!/usr/bin/env python3
"""Serve the engine beside this file: the Open Inference Protocol v2 over HTTP, with the dynamic batcher.

    python serve.py [--host 127.0.0.1] [--port 8000]

`serving.json` says how (instances, threads, batches, queue). JSON and Triton's binary tensors; Prometheus metrics at
/metrics. SIGTERM ends it when what it has taken is answered. Exit code 1 where the engine does not start.

Needs: numpy, uvicorn (httptools and uvloop make it faster), and what infer.py needs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import uvicorn

if __package__:
    from . import v2
    from .batcher import (
        SECONDS,
        Batcher,
        Histogram,
        InvalidRequest,
        Rejected,
        ServingError,
        Settings,
        SettingsError,
        TimedOut,
    )
else:  # beside this file, in a bundle
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import v2  # type: ignore[import-not-found,no-redef]
    from batcher import (  # type: ignore[import-not-found,no-redef]
        SECONDS,
        Batcher,
        Histogram,
        InvalidRequest,
        Rejected,
        ServingError,
        Settings,
        SettingsError,
        TimedOut,
    )

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_BODY_S = 30.0  # for the whole body of a request to come
_BUFFERED = 4  # the largest requests that may be on their way at once


class HttpError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.retry_after_s = status, code, detail, retry_after_s


def http_error(error: ServingError) -> HttpError:
    """The status of an error of the batcher."""
    if isinstance(error, Rejected):
        return HttpError(503, error.code, error.detail, error.retry_after_s)
    if isinstance(error, TimedOut):
        return HttpError(504, error.code, error.detail)
    if isinstance(error, InvalidRequest):
        return HttpError(413 if error.code == "too_large" else 400, error.code, error.detail)
    return HttpError(500, error.code, error.detail)


class App:
    """The ASGI application. `max_bytes`: of a request's body; `timeout_s`: of a request that has none of its own;
    `caller_header`: tells whose turn it is, instead of the client's address."""

    def __init__(
        self,
        batcher: Batcher,
        name: str,
        platform: str,
        *,
        max_bytes: int = 64 << 20,
        timeout_s: float = 60.0,
        caller_header: str | None = None,
        grace_s: float = 30.0,
    ) -> None:
        self.batcher, self.name, self.platform = batcher, name, platform
        self._max_bytes, self._timeout_s, self.grace_s = max_bytes, timeout_s, grace_s
        self._caller_header = caller_header.lower().encode() if caller_header else None
        self._buffered = 0
        self.failed: str | None = None  # why the engine did not start
        self.on_failure: Callable[[], None] = lambda: None
        self.on_ready: Callable[[], None] = lambda: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        try:
            status, headers, body = await self._answer(scope, receive)
        except HttpError as error:
            status = error.status
            headers = [(b"content-type", b"application/json")]
            if error.retry_after_s is not None:
                headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
            body = json.dumps({"error": error.detail, "code": error.code}).encode()
        except _Left:
            return
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        starting = asyncio.create_task(self._start())  # alive meanwhile, and not ready
        await send({"type": "lifespan.startup.complete"})
        await receive()
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        await self.batcher.stop(self.grace_s)
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        try:
            await self.batcher.start()
        except (ServingError, OSError) as error:
            self.failed = str(error)
            self.on_failure()
        else:
            self.on_ready()

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        method, path = scope["method"], scope["path"].rstrip("/")
        if method == "POST":
            if self._model_path(path) == "infer":
                return await self._infer(scope, receive)
        elif method in ("GET", "HEAD"):
            found = self._get(path)
            if found is not None:
                return found
        raise HttpError(404, "not_found", f"there is no {method} {scope['path']}")

    def _get(self, path: str) -> tuple[int, list[tuple[bytes, bytes]], bytes] | None:
        ready = 200 if self.batcher.ready else 503
        if path == "/v2/health/live":
            return 200, [], b""
        if path == "/v2/health/ready":
            return ready, [], b""
        if path == "/metrics":
            return 200, [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")], metrics(self.batcher).encode()
        if path == "/v2":
            told: dict[str, Any] = {"name": "anneal-serve", "version": "1", "extensions": ["binary_tensor_data"]}
        else:
            what = self._model_path(path)
            if what == "ready":
                return ready, [], b""
            if what != "":
                return None
            told = v2.metadata(self.name, self.platform, self.batcher.tensors)
        return 200, [(b"content-type", b"application/json")], json.dumps(told).encode()

    def _model_path(self, path: str) -> str | None:
        """What follows the model (and its version): `infer`, `ready`, or nothing; None for another path."""
        parts = path.split("/")
        if parts[:3] != ["", "v2", "models"] or len(parts) < 4:
            return None
        if parts[3] != self.name:
            raise HttpError(404, "unknown_model", f"there is no model {parts[3]!r}; there is {self.name!r}")
        rest = parts[4:]
        if rest[:1] == ["versions"]:
            if rest[1:2] != ["1"]:
                raise HttpError(404, "unknown_version", f"there is version 1 of {self.name!r} only")
            rest = rest[2:]
        return "/".join(rest)

    async def _infer(self, scope: Scope, receive: Receive) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise HttpError(415, "unsupported_encoding", "the body is to be sent as it is, not compressed")
        length = _number(headers, b"inference-header-content-length")
        body = await self._body(headers, receive)
        client = scope.get("client") or ("",)
        caller = headers.get(self._caller_header, b"").decode("latin-1") if self._caller_header else client[0]
        try:
            asked = v2.decode(body, length)
            if self.batcher.tensors:
                v2.check_outputs(asked, [t.name for t in self.batcher.tensors[1]])
            timeout = self._timeout_s if asked.timeout_s is None else asked.timeout_s
            future = self.batcher.enqueue(asked.feeds, timeout, caller)
            outputs = await self._unless_left(future, receive)
            encoded, header_length = v2.encode(self.name, asked, outputs)
        except ServingError as error:
            raise http_error(error) from None
        if header_length is None:
            return 200, [(b"content-type", b"application/json")], encoded
        told = (b"inference-header-content-length", str(header_length).encode())
        return 200, [(b"content-type", b"application/octet-stream"), told], encoded

    async def _unless_left(self, future: asyncio.Future[Any], receive: Receive) -> Any:
        """The future's result; a client that hangs up cancels it."""
        watch = asyncio.ensure_future(receive())
        watch.add_done_callback(lambda done: done.cancelled() or future.cancel())
        try:
            return await future
        except asyncio.CancelledError:
            if watch.done() and not watch.cancelled():
                raise _Left from None
            raise
        finally:
            watch.cancel()

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        told = _number(headers, b"content-length") or 0
        if told > self._max_bytes:
            raise HttpError(413, "too_large", f"the request has {told} bytes, {self._max_bytes} are taken")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(_BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    part = message.get("body", b"")
                    size += len(part)
                    self._buffered += len(part)
                    if size > self._max_bytes:
                        raise HttpError(413, "too_large", f"more than {self._max_bytes} bytes are not taken")
                    if self._buffered > _BUFFERED * self._max_bytes:
                        raise HttpError(503, "queue_full", "too many large requests are on their way", 1.0)
                    parts.append(part)
                    if not message.get("more_body", False):
                        return parts[0] if len(parts) == 1 else b"".join(parts)
        except TimeoutError:
            raise HttpError(408, "body_timeout", f"the request did not come within {_BODY_S:g} s") from None
        finally:
            self._buffered -= size


class _Left(Exception):
    """The client has hung up: nobody is there to answer."""


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
    yield from (
        "# HELP anneal_serve_batches_total Batches that ran, by rows.",
        "# TYPE anneal_serve_batches_total counter",
    )
    yield from (f'anneal_serve_batches_total{{rows="{rows}"}} {n}' for rows, n in sorted(stats.batches.items()))
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
    yield from _histogram("request_seconds", stats.request, "From a request's arrival to its answer, where it had one.")
    yield from _histogram("queue_seconds", stats.queue, "What requests waited before their batch began.")
    yield from _histogram("compute_seconds", stats.compute, "What batches took, arrays there and back included.")


def _histogram(name: str, found: Histogram, text: str) -> Iterator[str]:
    name = f"anneal_serve_{name}"
    yield from (f"# HELP {name} {text}", f"# TYPE {name} histogram")
    total = 0
    for bound, n in zip((*map(str, SECONDS), "+Inf"), found.counts, strict=True):
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
    try:
        batcher = Batcher(args.folder, Settings.of_folder(args.folder))
        listening = socket.create_server((args.host, args.port), backlog=2048)
    except (SettingsError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    name, platform = _told(args.folder)
    app = App(
        batcher,
        args.name or name,
        platform,
        max_bytes=int(args.max_request_mb * 1e6),
        timeout_s=args.timeout,
        caller_header=args.caller_header,
        grace_s=args.grace,
    )
    return _serve(app, listening)


def _serve(app: App, listening: socket.socket) -> int:
    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(app.grace_s) + 1,
        server_header=False,
    )
    server = uvicorn.Server(config)

    def failed() -> None:
        server.should_exit = True

    host, port = listening.getsockname()[:2]
    app.on_failure = failed
    told = f"{app.name} is served at http://{host}:{port}"
    app.on_ready = lambda: print(told + (f" ({why})" if (why := app.batcher.one_by_one) else ""), flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it once more at the end
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listening])
    if app.failed:
        print(app.failed, file=sys.stderr)
    return 1 if app.failed else 0


if __name__ == "__main__":
    sys.exit(main())
