"""Kombu's file-system transport, with whole messages only.

Kombu's own writes a message in place, so a consumer that looks often enough finds it empty, and the worker ends on what
it cannot parse. Here a message appears by a rename, is taken by a rename, and what cannot be parsed is left out:
workers look for themselves.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from queue import Empty
from typing import Any

import structlog
from kombu.transport import filesystem
from kombu.utils.json import dumps, loads

log = structlog.get_logger(__name__)

_TRIES = 50


class Channel(filesystem.Channel):
    """Messages are files `<nanoseconds>_<uuid>.<queue>.msg` in one folder, oldest first."""

    # The stubs of kombu's own class and of its base disagree on the name of the second parameter.
    def _put(self, queue: str, payload: Any, **_: Any) -> None:  # type: ignore[override]
        folder = Path(self.data_folder_out)
        name = f"{time.monotonic_ns():020d}_{uuid.uuid4()}"
        partial = folder / f"{name}.partial"
        partial.write_bytes(dumps(payload).encode())
        partial.rename(folder / f"{name}.{queue}.msg")

    def _get(self, queue: str, timeout: float | None = None) -> Any:  # noqa: ARG002  (kombu's signature)
        folder = Path(self.data_folder_in)
        for path in sorted(p for p in folder.iterdir() if p.name.partition(".")[2] == f"{queue}.msg"):
            taken = path.with_suffix(".taken")
            try:
                path.rename(taken)
            except FileNotFoundError:
                continue  # another worker was faster
            raw = taken.read_bytes()
            taken.unlink()
            try:
                return loads(raw.decode())
            except ValueError:
                log.warning("message_unreadable", queue=queue, size=len(raw))
        raise Empty

    def get_table(self, exchange: str) -> Any:
        return self._patiently(super().get_table, exchange)

    def _queue_bind(self, exchange: str, routing_key: str | None, pattern: str | None, queue: str | None) -> None:
        self._patiently(super()._queue_bind, exchange, routing_key, pattern, queue)

    def _patiently(self, call: Any, *arguments: Any) -> Any:
        """The tables of exchanges are written in place by kombu: another process may be at it."""
        for attempt in range(_TRIES):
            try:
                return call(*arguments)
            except ValueError:
                if attempt == _TRIES - 1:
                    raise
                time.sleep(0.01)
        raise AssertionError("unreachable")


class Transport(filesystem.Transport):
    Channel = Channel
