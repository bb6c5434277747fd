"""A client that costs little beside the server: sends a file by sendfile, receives into one buffer that is reused.

    python benchmarks/_http_client.py '{"port": 8000, "method": "GET", "target": "/file"}'

Prints JSON: {status, seconds, body_bytes, headers, body (of short answers)}. Time counts from the connection to the
last byte of the answer. One request, one connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

_BUFFER = 1 << 20
_SHORT = 1 << 16


def exchange(
    port: int, method: str, target: str, file: str | None = None, headers: dict[str, str] | None = None
) -> dict[str, Any]:
    """One request with the file, if any, as its body."""
    size = Path(file).stat().st_size if file else 0
    fields = {"Host": f"127.0.0.1:{port}", "Connection": "close", **(headers or {})}
    if file:
        fields |= {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n"
    buffer = bytearray(_BUFFER)
    started = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode())
        if file:
            _send(connection, Path(file), size)
        answer = _receive(connection, buffer)
    return {"seconds": time.perf_counter() - started, **answer}


def _send(connection: socket.socket, path: Path, size: int) -> None:
    with path.open("rb") as source:
        sent = 0
        # A server that refuses the file closes early; its answer says why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < size:
                sent += os.sendfile(connection.fileno(), source.fileno(), sent, size - sent)


def _receive(connection: socket.socket, buffer: bytearray) -> dict[str, Any]:
    view = memoryview(buffer)
    held = 0
    while (end := buffer.find(b"\r\n\r\n", 0, held)) < 0:
        count = connection.recv_into(view[held:])
        if not count:
            raise ConnectionError(f"the answer ended early: {bytes(view[:held])!r}")
        held += count
    lines = bytes(view[:end]).decode("latin-1").split("\r\n")
    headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
    got = held - end - 4
    short = bytearray(view[end + 4 : held][:_SHORT])
    while count := connection.recv_into(view):
        got += count
        if got <= _SHORT:
            short += view[:count]
    declared = headers.get("content-length")
    if declared is not None and int(declared) != got and not lines[0].split()[1] == "304":
        raise ConnectionError(f"{got} bytes of {declared} came")
    body = short.decode(errors="replace") if got <= _SHORT else ""
    return {"status": int(lines[0].split()[1]), "headers": headers, "body_bytes": got, "body": body}


if __name__ == "__main__":
    print(json.dumps(exchange(**json.loads(sys.argv[1]))))
