"""Receivers of webhooks, and one pass of deliveries."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from app.webhooks.sender import WebhookSender


@dataclass
class Receiver:
    """Answers `status`, after `takes_s`."""

    port: int = 0
    status: int = 200
    takes_s: float = 0.0
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?x=1"


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.requests.append((dict(self.headers), body))
            time.sleep(found.takes_s)
            self.send_response(found.status)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


Behaviour = int | Literal["hang", "cut", "cut body"]


@dataclass
class Unruly:
    """Does with each request what is next in `behaviours`, the last one for all further ones: answers a status; hangs
    until the end; breaks off in its answer's first line, or in its body."""

    behaviours: list[Behaviour]
    port: int = 0
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    @property
    def ids(self) -> list[str]:
        """Of the messages, in the order of the requests."""
        return [headers["webhook-id"] for headers, _ in self.requests]


@contextlib.contextmanager
def unruly(*behaviours: Behaviour) -> Iterator[Unruly]:
    found, over = Unruly([*behaviours]), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.requests.append((dict(self.headers), body))
            behaviour = found.behaviours.pop(0) if len(found.behaviours) > 1 else found.behaviours[0]
            if behaviour == "hang":
                over.wait(30)
            elif behaviour == "cut":
                self.wfile.write(b"HTTP/1.1 2")
            elif behaviour == "cut body":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nyes, and")
            else:
                self.send_response(behaviour)
                self.send_header("Location", found.url)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()


class Silent:
    """Takes connections and never says a word; how many it has had."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self._open: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/silent"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def connections(self) -> int:
        return len(self._open)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._open.append(self._listener.accept()[0])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


@contextlib.contextmanager
def delivering(sender: WebhookSender) -> Iterator[None]:
    """As a worker's thread does it."""
    stopping = threading.Event()
    thread = threading.Thread(target=sender.run, args=(stopping, 0.05))
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def deliver_due(sender: WebhookSender) -> int:
    """One attempt for every webhook that is due; how many were delivered."""
    delivered = 0
    while attempts := sender.start_due():
        delivered += sum(attempt.result(timeout=30) for attempt in attempts)
    return delivered


def eventually(ready: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
