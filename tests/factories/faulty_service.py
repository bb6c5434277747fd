"""An HTTP service of which a test says what each route answers, over real sockets: drops, cuts, nonsense."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyService

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        self.server.queries.append(query)
        self.server.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, self.body))
        for (method, pattern), answers in self.server.routes.items():
            if method == self.command and re.fullmatch(pattern, path):
                with self.server.lock:
                    answer = answers[0] if len(answers) == 1 else answers.pop(0)
                answer(self)
                return
        self.send_error(404)

    do_GET = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: object) -> None:
        pass


class FaultyService(ThreadingHTTPServer):
    """Answers each route with the next of its answers; the last one stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes: dict[tuple[str, str], list[Answer]] = {}
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.queries: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def on(self, method: str, pattern: str, *answers: Answer) -> None:
        self.routes[method, pattern] = list(answers)


def body(status: int, content: bytes, **headers: str) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def answer_json(status: int, value: object, **headers: str) -> Answer:
    return body(status, json.dumps(value).encode(), Content_Type="application/json", **headers)


def problem(status: int, **members: object) -> Answer:
    return answer_json(status, members)


def drop(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(2)


def cut_off(content: bytes, after: int, **headers: str) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(200)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:after])
        handler.wfile.flush()
        drop(handler)

    return answer


def ranged(content: bytes, etag: str) -> Answer:
    def answer(handler: Handler) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if not match:
            body(200, content, ETag=etag)(handler)
        elif int(match[1]) >= len(content):
            body(416, b"", Content_Range=f"bytes */{len(content)}")(handler)
        else:
            start = int(match[1])
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            body(206, content[start:], ETag=etag, Content_Range=span)(handler)

    return answer


def stream(text: str) -> Answer:
    """An event stream that ends by closing the connection."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(text.encode())
        handler.close_connection = True

    return answer


@contextmanager
def faulty_service() -> Iterator[FaultyService]:
    server = FaultyService()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
