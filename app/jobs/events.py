"""A job's events as a server-sent stream (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence

import anyio.to_thread

from app.db.orm import Job, JobEvent
from app.http.services import Services
from app.jobs.schemas import is_terminal, timestamp

HEARTBEAT_S = 15.0
_BATCH = 500


async def event_stream(services: Services, tenant_id: str, job: Job, after: int) -> AsyncIterator[bytes]:
    """Events with `seq` above `after`, as they come; ends after the job's last one. A comment every 15 s keeps
    proxies from closing the connection."""
    yield b"retry: 1000\n\n"
    seq = after
    while True:
        events: Sequence[JobEvent] = await anyio.to_thread.run_sync(
            services.jobs.events_after, tenant_id, job.id, seq, _BATCH
        )
        for event in events:
            seq = event.seq
            yield format_event(event)
        if len(events) == _BATCH:
            continue
        # Read after the events: a job that has ended by now may have left some meanwhile.
        version, ended = job.version, is_terminal(job)
        if ended and not events:
            return
        job = await anyio.to_thread.run_sync(services.jobs.get, tenant_id, job.id)
        if is_terminal(job) or job.version != version:
            continue
        while not await services.watcher.wait(job.id, job.version, HEARTBEAT_S):
            yield b": ping\n\n"


def format_event(event: JobEvent) -> bytes:
    """`data` is one line of JSON: a newline in a message from a user's model cannot forge a field."""
    data = json.dumps({**event.data, "seq": event.seq, "at": timestamp(event.created_at)}, separators=(",", ":"))
    return f"id: {event.seq}\nevent: {event.type}\ndata: {data}\n\n".encode()
