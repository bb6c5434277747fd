"""What stands before the S3 server of the soak, and misbehaves where it is told to: refuses connections, is slow, or
answers with an error. Headers go on as they came, so what is signed stays valid."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.factories.passing_on import PassingOn

_ERROR = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>Please try again.</Message></Error>'
_CODES = {500: b"InternalError", 503: b"SlowDown"}


class Gate:
    """`answer`: the status that it answers everything with; `refuses`: connections are reset; `slow_s`: every request
    waits so long; `holds`: of (method, path), those for which it waits until it is changed. `struck` counts."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target).netloc
        self.url = ""
        self.struck = 0
        self.pass_all()

    def pass_all(self) -> None:
        self.answer: int | None = None
        self.refuses = False
        self.slow_s = 0.0
        self.holds: Callable[[str, str], bool] = lambda _method, _path: False

    @contextlib.contextmanager
    def misbehaving(self, **how: Any) -> Iterator[None]:
        self.struck = 0
        for name, value in how.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            self.pass_all()


class _Handler(PassingOn):
    gate: Gate

    def _serve(self) -> None:
        gate = self.gate
        body = self.body()
        if gate.refuses:
            gate.struck += 1
            self._reset()
            return
        if gate.slow_s:
            gate.struck += 1
            time.sleep(gate.slow_s)
        while gate.holds(self.command, self.path):
            gate.struck += 1
            time.sleep(0.02)
        if (status := gate.answer) is not None:
            gate.struck += 1
            self.answer(status, [("Content-Type", "application/xml")], _ERROR % _CODES[status])
            return
        try:
            found = self.ask(gate.target, body)
        except (OSError, http.client.HTTPException):  # the server behind is down: so is this
            self._reset()
            return
        self.answer(*found)

    def _reset(self) -> None:
        """RST, as from a port that nobody listens on."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Whoever asked has given up, or was reset."""


@contextlib.contextmanager
def gate(target: str) -> Iterator[Gate]:
    """Before the server at this URL."""
    found = Gate(target)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"gate": found}))
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.pass_all()
        server.shutdown()
        server.server_close()
