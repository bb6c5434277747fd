"""An HTTP server before another one, which can be made to hold requests back."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "expect"})


class Staller:
    """`holds(method, path)`: which requests are kept until `release`. These are in `held`, all others in `passed`."""

    def __init__(self, port: int, target: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.target = target
        self.holds: Callable[[str, str], bool] = lambda _method, _path: False
        self.held: list[tuple[str, str]] = []
        self.passed: list[tuple[str, str]] = []
        self._arrived = threading.Condition()
        self._released = threading.Event()

    def pass_on(self, method: str, path: str) -> None:
        if self._released.is_set() or not self.holds(method, path):
            self.passed.append((method, path))
            return
        with self._arrived:
            self.held.append((method, path))
            self._arrived.notify_all()
        self._released.wait()

    def wait_held(self, count: int = 1, timeout_s: float = 30) -> None:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.held) >= count, timeout_s), "no request came to be held"

    def release(self) -> None:
        """Everything, from now on."""
        self._released.set()


@contextlib.contextmanager
def stalling(target: str) -> Iterator[Staller]:
    """Before the server at this URL. Headers go on as they came: what is signed stays valid."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            staller.pass_on(self.command, self.path)
            there = http.client.HTTPConnection(urlsplit(target).netloc, timeout=60)
            with contextlib.closing(there):
                there.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in _HOP:
                        there.putheader(name, value)
                there.endheaders(body)
                answer = there.getresponse()
                content = answer.read()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP and (name.lower() != "content-length" or self.command == "HEAD"):
                    self.send_header(name, value)
            if self.command != "HEAD" and answer.status != 204:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

        def log_message(self, *_: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Whoever asked has given up."""

    server = Server(("127.0.0.1", 0), Handler)
    staller = Staller(server.server_address[1], target)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield staller
    finally:
        staller.release()
        server.shutdown()
        thread.join()
        server.server_close()
