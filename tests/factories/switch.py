"""What stands before several API processes, as a load balancer does: connections go to those that are ready."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator

from tests.servers import HOST

_LOOK_S = 0.2
_PATIENCE_S = 20.0  # of a connection, while nobody is ready


class Switch:
    """`ports`: of the processes. Runs in a thread of its own."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = list(ports)
        self._ready: set[int] = set()
        self.open: Counter[int] = Counter()
        self._turns = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="switch")
        self._started = threading.Event()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def add(self, port: int) -> None:
        self._ports = [*self._ports, port]

    def remove(self, port: int, patience_s: float = 30) -> None:
        """No further connection goes there; returns when those that are open have ended."""
        self._ports = [p for p in self._ports if p != port]
        until = time.monotonic() + patience_s
        time.sleep(0.1)  # one that was on its way there by now counts among them
        while self.open[port]:
            assert time.monotonic() < until, f"{self.open[port]} connections stay open"
            time.sleep(0.02)

    def is_ready(self, port: int) -> bool:
        return port in self._ready

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, HOST, 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        async with server:
            while True:
                ports = self._ports
                answers = await asyncio.gather(*(self._ask(port) for port in ports))
                self._ready = {port for port, ready in zip(ports, answers, strict=True) if ready}
                await asyncio.sleep(_LOOK_S)

    async def _ask(self, port: int) -> bool:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection(HOST, port)
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                line = await reader.readline()
                writer.close()
                return b" 200 " in line
        return False

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until:
            ready = [port for port in self._ports if port in self._ready]
            if ready:
                port = ready[next(self._turns) % len(ready)]
                self.open[port] += 1  # before anybody is asked: `remove` waits for it
                try:
                    with contextlib.suppress(OSError):
                        await self._joined(reader, writer, *await asyncio.open_connection(HOST, port))
                        return
                finally:
                    self.open[port] -= 1
            await asyncio.sleep(0.05)
        writer.close()

    @staticmethod
    async def _joined(
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        their_reader: asyncio.StreamReader,
        their_writer: asyncio.StreamWriter,
    ) -> None:
        async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    target.write(data)
                    await target.drain()
            with contextlib.suppress(OSError):
                target.close()

        await asyncio.gather(pass_on(reader, their_writer), pass_on(their_reader, writer))

    def __enter__(self) -> Switch:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        def end() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()

        self._loop.call_soon_threadsafe(end)
        self._thread.join(10)


@contextlib.contextmanager
def switched(ports: list[int]) -> Iterator[Switch]:
    with Switch(ports) as switch:
        yield switch
