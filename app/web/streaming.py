"""A job's page while it runs: server-sent events, each the whole live part of the page."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

from app.http.auth import Credentials
from app.http.services import Services
from app.jobs.events import StreamOver, until_changed


async def live_stream(
    services: Services,
    tenant_id: str,
    job_id: str,
    credentials: Credentials,
    render: Callable[[], tuple[int, bool, str]],
) -> AsyncIterator[bytes]:
    """`render` answers the job's version, whether it ended, and its fragment. Pages that show the same version share
    one. A browser that lost the connection comes again and gets the state of that moment first, so nothing is missed
    whatever restarts. It ends with the event `end`, or when whoever asks is not let in any more."""
    with services.waiting.taken(tenant_id):
        yield b"retry: 1000\n\n"
        known, spoken = -1, time.monotonic()
        while True:
            version, ended, body = await services.reads.read(("page", tenant_id, job_id, known), render)
            if version != known:
                yield _event("job", body)
                known, spoken = version, time.monotonic()
            if ended:
                yield _event("end", "")
                return
            try:
                async for ping in until_changed(services, tenant_id, job_id, known, credentials, spoken):
                    yield ping
                    spoken = time.monotonic()
            except StreamOver:
                return


def _event(name: str, body: str) -> bytes:
    """Every line of the fragment is a line of data: what a user named cannot end the event."""
    lines = "".join(f"data: {line}\n" for line in body.splitlines() or [""])
    return f"event: {name}\n{lines}\n".encode()
