"""`GET /metrics` of a worker, on a port of its own.

What is measured on this machine is not to be disturbed: while it is, an answer is the one rendered before, and a new
one is made once a minute at most.
"""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import structlog

log = structlog.get_logger(__name__)

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PATIENCE_S = 5.0  # with a client that is slow
_WHILE_MEASURING_S = 60.0
_AT_ONCE_S = 1.0


class Exposition:
    """Serves what `render` gives. `measuring`: whether something is measured here now."""

    def __init__(self, render: Callable[[], bytes], measuring: Callable[[], bool]) -> None:
        self._render, self._measuring = render, measuring
        self._lock = threading.Lock()
        self._last: tuple[float, bytes] | None = None
        self._server: ThreadingHTTPServer | None = None

    @property
    def port(self) -> int | None:
        return None if self._server is None else int(self._server.server_address[1])

    def start(self, host: str, port: int) -> None:
        """A port that cannot be had costs the metrics, and no job: the log says so."""
        handler = type("Handler", (_Handler,), {"told": self.told})
        try:
            self._server = (_Server6 if ":" in host else _Server)((host, port), handler)
        except OSError as error:
            log.error("no_worker_metrics", host=host, port=port, error=str(error)[:200])
            return
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()
        log.info("worker_metrics", host=host, port=self.port)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def told(self) -> bytes:
        with self._lock:
            fresh = _WHILE_MEASURING_S if self._measuring() else _AT_ONCE_S
            if self._last is None or time.monotonic() - self._last[0] > fresh:
                self._last = (time.monotonic(), self._render())
            return self._last[1]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        """Without its base's question for the host's name, which a name server may take long to answer."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    told: ClassVar[Callable[[], bytes]]
    timeout = _PATIENCE_S
    server_version, sys_version = "anneal", ""

    def do_GET(self) -> None:  # the name that its base calls
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        body = type(self).told()
        self.send_response(200)
        self.send_header("Content-Type", _CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """A scrape every few seconds is nothing to tell."""
