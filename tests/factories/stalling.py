"""An HTTP server before another one, which can be made to hold requests back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.factories.passing_on import PassingOn


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
    """Before the server at this URL."""

    class Handler(PassingOn):
        def _pass_on(self) -> None:
            body = self.body()
            staller.pass_on(self.command, self.path)
            self.answer(*self.ask(urlsplit(target).netloc, body))

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

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
