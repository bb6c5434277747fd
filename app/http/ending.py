"""How an API process ends without losing a request: what a rolling restart of several is made of.

At SIGTERM it is no longer ready, so that whoever spreads requests sends it none, and each answer ends its connection,
so that the next request goes elsewhere. For `ANNEAL_DRAIN_S` it serves all the same; then whoever waits (long polls,
event streams) is answered with the state of that moment and comes again, elsewhere; requests that are under way have
`ANNEAL_SHUTDOWN_S` to end.

A listening socket that was handed over (`Settings.listen_fds`) is shared with other processes, or kept by whoever
starts them: such a process takes no connection any more from the first moment on, and none is refused.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import uvicorn

from app.http.server import LimitedProtocol
from app.network import is_loopback
from app.settings import Settings

log = structlog.get_logger(__name__)

_FIRST_FD = 3  # of those that are handed over: sd_listen_fds(3)
_LOOK_S = 0.05


@dataclass
class Ending:
    """Whether this process has been asked to end; what ends the waiting of those that wait for something."""

    begun: bool = False
    stop_waiting: Callable[[], None] = lambda: None


class ApiServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, drain_s: float, ending: Ending) -> None:
        super().__init__(config)
        self._drain_s = drain_s
        self._ending = ending

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ending.begun = True
        protocol = self.config.http_protocol_class
        assert issubclass(protocol, LimitedProtocol)
        protocol.ending = True
        if sockets:
            for server in self.servers:
                server.close()
        until = time.monotonic() + self._drain_s
        log.info("draining", seconds=self._drain_s, connections=len(self.server_state.connections))
        while time.monotonic() < until and not self.force_exit:
            if sockets and not self.server_state.connections:
                break
            await asyncio.sleep(_LOOK_S)
        self._ending.stop_waiting()
        await super().shutdown(sockets)


def handed_over(settings: Settings) -> list[socket.socket]:
    """The listening sockets that whoever started this process has opened for it."""
    if settings.listen_pid != os.getpid():
        return []
    found = [socket.socket(fileno=_FIRST_FD + n) for n in range(settings.listen_fds)]
    for listening in found:
        listening.set_inheritable(False)
        if listening.family not in (socket.AF_INET, socket.AF_INET6):
            raise SystemExit("LISTEN_FDS: a listening TCP socket is wanted.")
    return found


def listening_on(settings: Settings, sockets: list[socket.socket]) -> Settings:
    """The settings with the address of these sockets, which decides whether keys are optional: the most open one's."""
    if not sockets:
        return settings
    host, port = max((found.getsockname()[:2] for found in sockets), key=lambda at: not is_loopback(at[0]))
    return settings.model_copy(update={"host": host, "port": port})
