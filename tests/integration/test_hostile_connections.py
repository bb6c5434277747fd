"""What clients without a key can do to the server itself: endless headers, slow connections, bodies that trickle."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.factories.deployment import Deployment, deployment

HEADER_S, BODY_S, WRITE_S = 2.0, 1.5, 2.0


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    limits = {
        "LIMIT_HEADER_S": str(HEADER_S),
        "LIMIT_BODY_S": str(BODY_S),
        "LIMIT_WRITE_S": str(WRITE_S),
        "LIMIT_CONNECTIONS_PER_ADDRESS": "450",
    }
    with deployment(tmp_path_factory.mktemp("connections") / "home", limits) as found:
        yield found


def connect(deployed: Deployment, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", deployed.port), timeout=30, source_address=(source, 0))


def rest(connection: socket.socket) -> bytes:
    """All that still comes, to the end of the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            found += chunk
    return found


def memory(deployed: Deployment) -> int:
    return psutil.Process(deployed.processes[0].pid).memory_info().rss


def slowest_answer(deployed: Deployment, until: threading.Event) -> float:
    slowest = 0.0
    with httpx.Client(base_url=deployed.url, timeout=30) as client:
        while not until.is_set():
            started = time.monotonic()
            assert client.get("/healthz").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.02)
    return slowest


ENDLESS = {
    "one header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Endless: ",
    "headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n",
    "target": b"GET /",
    "trailer": b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Endless: ",
    "chunk extension": b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1;a=",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_endless_headers(deployed: Deployment, kind: str) -> None:
    """Three connections want to send 60 MB each."""
    piece = b"X-A: b\r\n" * 8192 if kind == "headers" else b"a" * 65536
    sent = [0, 0, 0]

    def attack(number: int) -> bytes:
        with connect(deployed) as connection:
            try:
                connection.sendall(ENDLESS[kind])
                for _ in range(60_000_000 // len(piece)):
                    connection.sendall(piece)
                    sent[number] += len(piece)
            except ConnectionError:
                pass
            return rest(connection)

    before, done = memory(deployed), threading.Event()
    with ThreadPoolExecutor(4) as threads:
        slowest = threads.submit(slowest_answer, deployed, done)
        list(threads.map(attack, range(3)))
        done.set()
        assert slowest.result() < 1
    assert max(sent) < 20_000_000, "the connection was closed"  # what the sockets' buffers took
    assert memory(deployed) - before < 32 << 20


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 200 + b"\r\n", id="many"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"b" * 70_000 + b"\r\n\r\n", id="long"),
    ],
)
def test_headers_above_the_limit_are_told_so(deployed: Deployment, head: bytes) -> None:
    with connect(deployed) as connection:
        connection.sendall(head)
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"application/problem+json" in answer
    assert b'"code": "headers_too_large"' in answer


def test_what_is_no_http_is_answered_by_a_problem_too(deployed: Deployment) -> None:
    with connect(deployed) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in answer
    assert b'"code": "bad_request"' in answer


def test_slow_connections_are_closed_while_others_are_served(deployed: Deployment) -> None:
    """400 of them: some say nothing, some begin a request, some send a blank line now and then."""
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(deployed)) for _ in range(400)]
        for number, connection in enumerate(slow):
            connection.sendall([b"", b"GET / HTTP/1.1\r\nHost: local", b"\r\n"][number % 3])
        started = time.monotonic()
        done = threading.Event()
        with ThreadPoolExecutor(1) as threads:
            slowest = threads.submit(slowest_answer, deployed, done)
            for _ in range(4):
                time.sleep(HEADER_S / 4)
                for number, connection in enumerate(slow):
                    with contextlib.suppress(ConnectionError):
                        connection.sendall([b"", b"h", b"\r\n"][number % 3])
            answers = [rest(connection) for connection in slow]
            done.set()
            assert slowest.result() < 1
        assert time.monotonic() - started < HEADER_S + 10
    assert sum(b'"code": "request_timeout"' in answer for answer in answers) > 100
    assert b"HTTP/1.1 408 " in answers[1]


def test_too_many_connections_of_one_address(deployed: Deployment) -> None:
    with contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(connect(deployed)) for _ in range(460)]
        time.sleep(0.3)
        last = rest(open_ones[-1])
        assert b'"code": "too_many_connections"' in last
        with connect(deployed, "127.0.0.9") as other:  # another address has its own
            other.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert rest(other).startswith(b"HTTP/1.1 200 ")
    time.sleep(0.2)
    assert httpx.get(f"{deployed.url}/healthz").status_code == 200


def test_a_body_that_trickles(deployed: Deployment) -> None:
    head = b"POST /v1/models?filename=m.onnx HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
    with connect(deployed) as connection:
        connection.sendall(head)
        started = time.monotonic()
        with pytest.raises(ConnectionError):  # noqa: PT012  # one of them
            while time.monotonic() - started < 20:
                connection.sendall(b"a")
                time.sleep(0.1)
    assert time.monotonic() - started < 3 * BODY_S + 3
    assert not list((deployed.home / "tmp").glob("*"))


def test_a_body_that_stops_is_told_so(deployed: Deployment) -> None:
    with connect(deployed) as connection:
        connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"application/problem+json" in answer


def test_a_steady_slow_body_is_taken(deployed: Deployment) -> None:
    """A kilobyte a second, for longer than any of the times."""
    size, step = 5000, 250
    head = f"POST /v1/models?filename=m.onnx HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
    with connect(deployed) as connection:
        connection.sendall(head.encode())
        for _ in range(size // step):
            connection.sendall(b"a" * step)
            time.sleep(step / 1000)
        assert connection.recv(100).startswith(b"HTTP/1.1 422 ")


def test_an_answer_that_is_not_read_is_cut(deployed: Deployment) -> None:
    with connect(deployed) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with pytest.raises(ConnectionError):  # noqa: PT012  # one of them
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                connection.sendall(request * 20)
                time.sleep(0.1)
