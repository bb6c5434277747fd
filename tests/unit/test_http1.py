"""The HTTP server of a bundle on real connections: what comes in pieces, out of order, too large, or not at all."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import hypothesis.strategies as st
import pytest
import uvloop
from hypothesis import given, settings

from workers.serving.http1 import HttpServer
from workers.serving.http_messages import Answer, HttpError, Later, Request

PATIENCE_S = 60.0
PLAIN = [(b"content-type", b"text/plain")]


class Echo:
    """Tells method, path and body. `/later`: when `ready` is set; `/fails`: raises; `/large`: 8 MiB; `/pieces`: in
    three, with the body once more."""

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.waiting: list[asyncio.Future[Any]] = []

    def __call__(self, request: Request) -> Answer | Later:
        self.seen.append(request)
        text = f"{request.method} {request.path} ".encode() + bytes(request.body)
        if request.path == "/fails":
            raise RuntimeError("no")
        if request.path == "/refused":
            raise HttpError(503, "queue_full", "later", 2.0)
        if request.path == "/large":
            text = bytes(8 << 20)
        if request.path == "/pieces":  # the second one is empty
            return 200, PLAIN, [text, memoryview(b""), memoryview(bytes(request.body))]
        if request.path == "/later":
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self.waiting.append(future)
            return Later(future, lambda done: (200, PLAIN, text + done.result()))
        return 200, PLAIN, text


@asynccontextmanager
async def served(app: Any, **options: Any) -> AsyncIterator[tuple[HttpServer, int]]:
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    server = HttpServer(app, **options)
    await server.start(listening)
    try:
        yield server, port
    finally:
        await server.stop(0.0)
        await asyncio.sleep(0.01)


Read = asyncio.StreamReader
Write = asyncio.StreamWriter


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[Read, Write]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=16 << 20)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer(reader: Read, *, head_only: bool = False) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    body = b"" if head_only else await reader.readexactly(int(headers["content-length"]))
    return int(head[0].split()[1]), headers, body


def post(path: str, body: bytes, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def in_both_loops(test: Callable[[], Awaitable[None]]) -> Callable[[Any], None]:
    @pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    def run(factory: Any) -> None:
        async def limited() -> None:
            async with asyncio.timeout(PATIENCE_S):
                await test()

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(limited())

    return run


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


@in_both_loops
async def test_bodies_of_any_size_come_whole() -> None:
    async with served(Echo()) as (server, port), connected(port) as (reader, writer):
        for size in (0, 1, 100, (16 << 10) - 60, 16 << 10, 100_000, 3_000_000):
            body = bytes(range(256)) * (size // 256) + bytes(size % 256)
            writer.write(post("/a%20b?c=d", body))
            status, headers, found = await answer(reader)
            assert (status, headers["content-type"]) == (200, "text/plain")
            assert found == b"POST /a b " + body
        assert server.buffered == 0
        writer.write(b"HEAD /h HTTP/1.1\r\nHost: x\r\n\r\n")
        assert int((await answer(reader, head_only=True))[1]["content-length"]) == len(b"HEAD /h ")
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await answer(reader))[2] == b"GET / "


@in_both_loops
async def test_a_body_in_pieces_is_one() -> None:
    async with served(Echo()) as (_, port), connected(port) as (reader, writer):
        for size in (0, 5, 40_000, 3_000_000):
            body = bytes(range(256)) * (size // 256) + bytes(size % 256)
            writer.write(post("/pieces", body))
            assert (await answer(reader))[2] == b"POST /pieces " + 2 * body
        writer.write(post("/pieces", b"abc").replace(b"POST", b"HEAD") + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert int((await answer(reader, head_only=True))[1]["content-length"]) == len(b"HEAD /pieces ") + 6
        assert (await answer(reader))[2] == b"GET / "


REQUESTS = [
    (post("/a", b"x" * 300), b"POST /a " + b"x" * 300),
    (b"GET /b HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /b "),
    (post("/c", b""), b"POST /c "),
    (
        b"POST /d HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nabc\r\n4;e=f\r\ndefg\r\n0\r\nTrailer: t\r\n\r\n",
        b"POST /d abcdefg",
    ),
    (post("/e", b"POST /f HTTP/1.1\r\n\r\n"), b"POST /e POST /f HTTP/1.1\r\n\r\n"),
    (post("/g", b"y" * 40_000), b"POST /g " + b"y" * 40_000),
]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(range(len(REQUESTS))), min_size=1, max_size=8), st.lists(st.integers(1, 41_000)))
def test_however_a_stream_of_requests_is_cut_each_is_answered_in_its_turn(order: list[int], cuts: list[int]) -> None:
    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S), served(Echo()) as (_, port), connected(port) as (reader, writer):
            stream = b"".join(REQUESTS[i][0] for i in order)
            at = 0
            for cut in [*cuts, len(stream)]:
                writer.write(stream[at : at + cut])
                await writer.drain()
                await asyncio.sleep(0)
                at += cut
            for i in order:
                assert (await answer(reader))[2] == REQUESTS[i][1]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


@in_both_loops
async def test_answers_that_come_later_keep_their_order() -> None:
    app = Echo()
    async with served(app) as (_, port), connected(port) as (reader, writer):
        writer.write(post("/later", b"1") + post("/now", b"2") + post("/later", b"3"))
        await until(lambda: len(app.waiting) == 1)
        assert [r.path for r in app.seen] == ["/later"], "the next one waits for its turn"
        app.waiting[0].set_result(b"!")
        assert (await answer(reader))[2] == b"POST /later 1!"
        assert (await answer(reader))[2] == b"POST /now 2"
        await until(lambda: len(app.waiting) == 2)
        app.waiting[1].set_exception(HttpError(504, "deadline_exceeded", "late"))
        status, _, body = await answer(reader)
        assert (status, json.loads(body)["code"]) == (504, "deadline_exceeded")


@in_both_loops
async def test_who_hangs_up_cancels_what_was_asked() -> None:
    app = Echo()
    async with served(app) as (server, port):
        async with connected(port) as (_, writer):
            writer.write(post("/later", b"1"))
            await until(lambda: bool(app.waiting))
        await until(app.waiting[0].cancelled)
        async with connected(port) as (_, writer):
            writer.write(post("/never", bytes(1_000_000))[:300_000])  # in the middle of a body
            await until(lambda: server.buffered > 0)
        await until(lambda: server.buffered == 0 and not server.connections)


@in_both_loops
async def test_faults_of_the_application_end_one_request() -> None:
    async with served(Echo()) as (_, port), connected(port) as (reader, writer):
        for path, status, code in (("/fails", 500, "internal"), ("/refused", 503, "queue_full"), ("/ok", 200, "")):
            writer.write(post(path, b""))
            found, headers, body = await answer(reader)
            assert found == status
            assert code in body.decode()
            assert headers.get("retry-after") == ("2" if status == 503 else None)


HEAD = "POST /x HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"nonsense\r\n\r\n", 400, "invalid_request"),
        (f"{HEAD}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n".encode(), 400, "invalid_request"),
        (f"{HEAD}Content-Length: -2\r\n\r\n".encode(), 400, "invalid_request"),
        (f"{HEAD}Content-Length: 2\r\nContent-Length: 3\r\n\r\n".encode(), 400, "invalid_request"),
        (f"{HEAD}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(), 400, "invalid_request"),
        (f"{HEAD}Content-Length: 50001\r\n\r\n".encode(), 413, "too_large"),
        (post("/x", bytes(4_000_000)), 413, "too_large"),  # it goes on sending, and sees the answer
        (f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + b"4e20\r\n" + bytes(20_000) + b"\r\n", 200, ""),
        (f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + (b"4e20\r\n" + bytes(20_000) + b"\r\n") * 3, 413, ""),
        (f"{HEAD}X: ".encode() + b"x" * 100_000, 431, "invalid_request"),
        (f"{HEAD}Transfer-Encoding: chunked\r\n\r\n0\r\nX: ".encode() + b"x" * 100_000, 431, "invalid_request"),
        (b"GET  HTTP/1.1\r\n\r\n", 400, "invalid_request"),
    ],
)
def test_what_is_refused(sent: bytes, status: int, code: str) -> None:
    async def run() -> None:
        app = Echo()
        async with asyncio.timeout(PATIENCE_S), served(app, max_bytes=50_000) as (server, port):
            async with connected(port) as (reader, writer):
                writer.write(post("/first", b"1") + sent + (b"0\r\n\r\n" if status == 200 else b""))
                assert (await answer(reader))[2] == b"POST /first 1", "what came before it"
                found, headers, body = await answer(reader)
                assert (found, code in body.decode()) == (status, True)
                assert (headers.get("connection") == "close") == (status != 200)
            await until(lambda: not server.connections)
            assert server.buffered == 0
            assert len(app.seen) == (2 if status == 200 else 1)

    asyncio.run(run())


@in_both_loops
async def test_connections_that_are_to_close_do() -> None:
    for sent in (
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\nGET /again HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    ):
        app = Echo()
        async with served(app) as (_, port), connected(port) as (reader, writer):
            writer.write(sent)
            _, headers, body = await answer(reader)
            assert (headers["connection"], body) == ("close", b"GET / ")
            assert await reader.read() == b""
        assert len(app.seen) == 1


@in_both_loops
async def test_who_asks_whether_to_send_is_told_to() -> None:
    async with served(Echo(), max_bytes=1000) as (_, port):
        async with connected(port) as (reader, writer):
            head, body = post("/x", b"abc", "Expect: 100-continue")[:-3], b"abc"
            writer.write(head)
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert (await answer(reader))[2] == b"POST /x abc"
        async with connected(port) as (reader, writer):
            writer.write(post("/x", bytes(2000), "Expect: 100-continue")[:-2000])
            assert (await answer(reader))[0] == 413, "and not to send that"


@in_both_loops
async def test_who_takes_no_answers_gets_no_further_ones() -> None:
    app = Echo()
    async with served(app, idle_s=0.3) as (server, port), connected(port) as (_, writer):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        writer.transport.pause_reading()
        writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        await until(lambda: not server.connections)  # in the end it is left
        assert len(app.seen) < 5


@in_both_loops
async def test_a_connection_without_requests_is_closed() -> None:
    async with served(Echo(), idle_s=0.1) as (server, port):
        async with connected(port) as (reader, _):
            assert await reader.read() == b""
        async with connected(port) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost")  # and one whose head never ends
            assert await reader.read() == b""
        await until(lambda: not server.connections)


@in_both_loops
async def test_the_end_answers_what_was_asked() -> None:
    app = Echo()
    async with (
        served(app) as (server, port),
        connected(port) as (idle, _),
        connected(port) as (reader, writer),
        connected(port) as (sending, sender),
    ):
        sender.write(post("/late", bytes(500_000))[:100_000])
        writer.write(post("/later", b"1") + post("/last", b"2"))
        await until(lambda: bool(app.waiting) and server.buffered > 0)
        stopping = asyncio.create_task(server.stop(PATIENCE_S))
        assert await idle.read() == b""
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
        app.waiting[0].set_result(b"")
        first, second = await answer(reader), await answer(reader)
        assert (first[2], second[2]) == (b"POST /later 1", b"POST /last 2")
        assert ("connection" in first[1], second[1]["connection"]) == (False, "close")
        sender.write(post("/late", bytes(500_000))[100_000:])
        assert (await answer(sending))[0] == 200
        await stopping
        assert not server.connections


def test_a_body_that_never_comes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.serving.http1._BODY_S", 0.1)

    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S), served(Echo()) as (server, port):
            for sent in (post("/x", bytes(100_000))[:-1], f"{HEAD}Transfer-Encoding: chunked\r\n\r\n2\r\na".encode()):
                async with connected(port) as (reader, writer):
                    writer.write(sent)
                    status, _, body = await answer(reader)
                    assert (status, json.loads(body)["code"]) == (408, "body_timeout")
            assert server.buffered == 0

    asyncio.run(run())


def test_only_so_many_large_requests_are_on_their_way() -> None:
    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S), served(Echo(), max_bytes=1_000_000) as (server, port):
            connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]
            for _, writer in connections:
                writer.write(post("/x", bytes(1_000_000))[:-1])
            refused = [asyncio.create_task(answer(reader)) for reader, _ in connections]
            done, waiting = await asyncio.wait(refused, return_when=asyncio.FIRST_COMPLETED)
            status, headers, _ = next(iter(done)).result()
            assert (status, headers["retry-after"]) == (503, "1")
            for _, writer in connections:
                writer.close()
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await until(lambda: not server.connections)
            assert server.buffered == 0

    asyncio.run(run())


def test_the_client_s_address_is_told() -> None:
    async def run() -> None:
        app = Echo()
        async with asyncio.timeout(PATIENCE_S), served(app) as (_, port), connected(port) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Mine:  a b \r\n\r\n")
            await answer(reader)
        assert (app.seen[0].client, app.seen[0].headers[b"x-mine"].strip()) == ("127.0.0.1", b"a b")

    asyncio.run(run())
