"""A job's events as a server-sent stream (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from app.db.orm import JobEvent
from app.errors import AppError
from app.http.auth import Credentials
from app.http.services import Services
from app.jobs.documents import JobDocument
from app.jobs.schemas import timestamp
from app.jobs.service import JobService

_HEARTBEAT_S = 15.0
_RECHECK_S = 3.0  # a key that was revoked ends its streams within this and what the authenticator remembers
_BATCH = 500


@dataclass(frozen=True)
class _Batch:
    """Some events as they are sent; `seq` of the last one, else what was asked for; and whether there may be more."""

    body: bytes
    seq: int
    more: bool


async def event_stream(
    services: Services, tenant_id: str, job_id: str, job: JobDocument, after: int, credentials: Credentials
) -> AsyncIterator[bytes]:
    """Events with `seq` above `after`, as they come; ends after the job's last one, when the key is revoked, and with
    the process. A comment every 15 s keeps proxies from closing the connection. Streams of one job share what they
    read."""
    with services.waiting.taken(tenant_id):
        yield b"retry: 1000\n\n"
        seq, spoken = after, time.monotonic()
        while True:
            # Whoever comes with this key has seen the job's version in the database: its events are there too.
            place = ("events", tenant_id, job_id, seq, job.version)
            batch = await services.reads.read(place, _read_batch, services.jobs, tenant_id, job_id, seq)
            seq = batch.seq
            if batch.body:
                yield batch.body
                spoken = time.monotonic()
            if batch.more:
                continue
            if job.terminal:
                return
            try:
                async for ping in until_changed(services, tenant_id, job_id, job.version, credentials, spoken):
                    yield ping
                    spoken = time.monotonic()
            except StreamOver:
                return
            key = ("job", tenant_id, job_id, job.version)
            job = await services.reads.read(key, services.job_documents.get, tenant_id, job_id)


class StreamOver(Exception):
    """What let a stream in would do so no more, or this process ends: whoever follows on comes again."""


async def until_changed(
    services: Services, tenant_id: str, job_id: str, version: int, credentials: Credentials, spoken: float
) -> AsyncIterator[bytes]:
    """Ends when the job is another than this version; until then comments that keep the connection, the first one 15 s
    after `spoken`. Raises `StreamOver`."""
    changed = False
    while not changed:
        changed = await services.watcher.wait(job_id, version, _RECHECK_S)
        if services.watcher.closed or await _revoked(services, tenant_id, credentials):
            raise StreamOver
        if not changed and time.monotonic() - spoken >= _HEARTBEAT_S:
            yield b": ping\n\n"
            spoken = time.monotonic()


async def _revoked(services: Services, tenant_id: str, credentials: Credentials) -> bool:
    try:
        return await services.auth.tenant(credentials) != tenant_id
    except AppError as error:
        return error.status in (401, 403)  # the key has ended, or its tenant is switched off


def _read_batch(jobs: JobService, tenant_id: str, job_id: str, seq: int) -> _Batch:
    events = jobs.events_after(tenant_id, job_id, seq, _BATCH)
    body = b"".join(format_event(event) for event in events)
    return _Batch(body, events[-1].seq if events else seq, len(events) == _BATCH)


def format_event(event: JobEvent) -> bytes:
    """`data` is one line of JSON: a newline in a message from a user's model cannot forge a field."""
    data = json.dumps({**event.data, "seq": event.seq, "at": timestamp(event.created_at)}, separators=(",", ":"))
    return f"id: {event.seq}\nevent: {event.type}\ndata: {data}\n\n".encode()
