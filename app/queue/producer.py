"""Wakes workers through the broker. One that is away is no error: the queued row is what counts, and a worker that is
idle looks for itself (`workers.lookout`)."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from celery import Celery

from app.db.orm import Job
from app.queue.broker import make_celery
from app.queue.messages import HELP, OPTIMIZE, help_queue
from app.settings import Settings

log = structlog.get_logger(__name__)

_RINGS_FOR_S = 60  # whoever was busy for longer has nothing of it

# Wakes one worker of the job's queue. True = handed to the broker. False = it is away; the caller goes on.
Dispatch = Callable[[Job], bool]


def make_dispatch(settings: Settings, celery: Celery | None = None) -> Dispatch:
    """A function that wakes a worker for a queued job; call it only after the commit. A broker that is away costs about
    a second."""
    app = celery or make_celery(settings, sends_only=True)

    def dispatch(job: Job) -> bool:
        try:
            # The id is for workers of the previous release, which take that very job, and for whoever looks on.
            app.send_task(OPTIMIZE, args=[job.id], queue=job.queue, retry=False)
        except Exception as error:
            # Whatever the transport's client raises (it is full, away, refuses the password): the row is committed.
            log.warning("dispatch_failed", job_id=job.id, queue=job.queue, error=str(error))
            return False
        return True

    return dispatch


# Wakes so many workers of a kind to help. False = the broker is away; they look for themselves now and then.
Bell = Callable[[str, int], bool]


def make_bell(settings: Settings, celery: Celery | None = None) -> Bell:
    """A function that wakes workers that are idle; call it only after the commit of what they are to find."""
    app = celery or make_celery(settings, sends_only=True)

    def ring(kind: str, workers: int) -> bool:
        try:
            for _ in range(workers):
                app.send_task(HELP, queue=help_queue(kind), retry=False, expires=_RINGS_FOR_S)
        except Exception as error:  # as above
            log.warning("bell_failed", kind=kind, error=str(error))
            return False
        return True

    return ring


def check_broker(settings: Settings) -> None:
    """Raise an exception where the broker cannot be reached (readiness)."""
    with make_celery(settings, sends_only=True).connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=2)
