"""A receiver of spans, OTLP over HTTP with protobuf: as a collector takes them, read by protobuf's own wire format.

The messages (opentelemetry-proto, `collector/trace/v1`): ExportTraceServiceRequest {1: ResourceSpans}, ResourceSpans
{1: Resource, 2: ScopeSpans}, ScopeSpans {2: Span}, Span {1: trace_id, 2: span_id, 4: parent_span_id, 5: name, 6: kind,
9: KeyValue, 15: Status}, KeyValue {1: key, 2: AnyValue}, AnyValue {1: string, 2: bool, 3: int, 4: double}.
"""

from __future__ import annotations

import gzip
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Receiver:
    """`requests`: (path, headers) of what came. `refuses`: answer 503 to all of it."""

    port: int = 0
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)
    refuses: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def named(self, name: str) -> list[dict[str, Any]]:
        return [span for span in self.spans if span["name"] == name]


@contextmanager
def receiving() -> Iterator[Receiver]:
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            found.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            if not found.refuses:
                found.spans.extend(spans_of(body))
            self.send_response(503 if found.refuses else 200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def spans_of(message: bytes) -> Iterator[dict[str, Any]]:
    for group in fields(message).get(1, ()):
        parts = fields(group)
        resource = dict(map(pair, fields(parts[1][0]).get(1, ())))
        for scope in parts.get(2, ()):
            for raw in fields(scope).get(2, ()):
                span = fields(raw)
                status = fields(span[15][0]) if 15 in span else {}
                yield {
                    "resource": resource,
                    "trace_id": span[1][0].hex(),
                    "span_id": span[2][0].hex(),
                    "parent_id": span[4][0].hex() if 4 in span else "",
                    "name": span[5][0].decode(),
                    "kind": span[6][0],
                    "attributes": dict(map(pair, span.get(9, ()))),
                    "status": (status.get(3, [0])[0], status.get(2, [b""])[0].decode()),
                }


def pair(raw: bytes) -> tuple[str, Any]:
    parts = fields(raw)
    value = fields(parts[2][0])
    if 1 in value:
        return parts[1][0].decode(), value[1][0].decode()
    if 2 in value:
        return parts[1][0].decode(), bool(value[2][0])
    if 3 in value:
        return parts[1][0].decode(), value[3][0]
    return parts[1][0].decode(), struct.unpack("<d", value[4][0])[0] if 4 in value else None


def fields(message: bytes) -> dict[int, list[Any]]:
    """Number → values in order: int of a varint, else bytes."""
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        number, kind = tag >> 3, tag & 7
        value: Any
        if kind == 0:
            value, at = varint(message, at)
        elif kind == 2:
            size, at = varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            size = {1: 8, 5: 4}[kind]
            value, at = message[at : at + size], at + size
        found.setdefault(number, []).append(value)
    return found


def varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
