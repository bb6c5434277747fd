"""Sends jobs to the broker. A broker that is away is no error: the queued row is the outbox, the sweeper re-sends."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from celery import Celery

from app.db.orm import Job
from app.queue.broker import make_celery
from app.queue.messages import FIRST, OPTIMIZE, USUAL
from app.settings import Settings

log = structlog.get_logger(__name__)

# True = handed to the broker. False = it is away; the caller goes on, the sweeper sends the job later.
Dispatch = Callable[[Job], bool]


def make_dispatch(settings: Settings, celery: Celery | None = None) -> Dispatch:
    """A function that sends the message of one queued job; call it only after the commit. A broker that is away costs
    about a second."""
    app = celery or make_celery(settings, sends_only=True)

    def dispatch(job: Job) -> bool:
        try:
            # A job that was begun goes on before others begin: whoever gave it back did so for no fault of its own.
            priority = FIRST if job.started_at is not None else USUAL
            app.send_task(OPTIMIZE, args=[job.id], queue=job.queue, priority=priority, retry=False)
        except Exception as error:
            # Whatever the transport's client raises (it is full, away, refuses the password): the row is committed.
            log.warning("dispatch_failed", job_id=job.id, queue=job.queue, error=str(error))
            return False
        return True

    return dispatch


def check_broker(settings: Settings) -> None:
    """Raise an exception where the broker cannot be reached (readiness)."""
    with make_celery(settings, sends_only=True).connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=2)
