"""Waiting for a job: to its end, or as long as somebody has patience."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from anneal_client import Event
from anneal_client.cli.exits import Exit, Stop
from anneal_client.cli.service import Service

Json = dict[str, Any]
_TICK_S = 1.0


def follow(
    service: Service,
    job_id: str,
    on_event: Callable[[Event], None],
    seconds: float | None = None,
    on_tick: Callable[[], None] = lambda: None,
) -> Json:
    """The job, once it has ended; `on_tick` is called about every second in which nothing happens. Raises `Stop` where
    `seconds` run out before, or at Ctrl-C: the job goes on."""
    goes_on = f"`anneal watch {job_id}` goes on watching, `anneal cancel {job_id}` ends it."
    deadline = None if seconds is None else time.monotonic() + seconds
    told: queue.Queue[Event | Json | BaseException] = queue.Queue()
    # Blocked in a read it could neither tick nor keep a deadline; it dies with the command.
    threading.Thread(target=_listen, args=(service, job_id, told), daemon=True).start()
    try:
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                what = f"The job did not end within {seconds:g} s; it goes on."
                raise Stop(what, where=job_id, remedy=goes_on, exit=Exit.UNFINISHED)
            try:
                found = told.get(timeout=_TICK_S if left is None else min(_TICK_S, left))
            except queue.Empty:
                on_tick()
                continue
            if isinstance(found, BaseException):
                raise found
            if isinstance(found, Event):
                on_event(found)
            else:
                return found
    except KeyboardInterrupt:
        raise Stop("Interrupted; the job goes on.", where=job_id, remedy=goes_on, exit=Exit.INTERRUPTED) from None


def _listen(service: Service, job_id: str, told: queue.Queue[Event | Json | BaseException]) -> None:
    try:
        told.put(service.client.wait(job_id, told.put, check=False))
    except BaseException as error:  # whoever watches raises it
        told.put(error)
