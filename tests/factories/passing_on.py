"""A handler that passes requests on to another HTTP server. Headers go on as they came: what is signed stays valid."""

from __future__ import annotations

import contextlib
import http.client
from http.server import BaseHTTPRequestHandler
from typing import Any

_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "expect"})


class PassingOn(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def ask(self, target: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and content of what the server at `target` (host:port) answers. Raises OSError,
        HTTPException."""
        there = http.client.HTTPConnection(target, timeout=60)
        with contextlib.closing(there):
            there.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    there.putheader(name, value)
            there.endheaders(body)
            answer = there.getresponse()
            content = answer.read()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP]
        return answer.status, kept, content

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        head = self.command == "HEAD"
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or head:
                self.send_header(name, value)
        if not head and status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not head:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...
