"""Sends jobs to the broker. A broker that is away is no error: the queued row is the outbox, the sweeper re-sends."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from celery import Celery
from kombu.exceptions import KombuError, OperationalError

from app.db.orm import Job
from app.queue.broker import make_celery
from app.queue.messages import OPTIMIZE
from app.settings import Settings

log = structlog.get_logger(__name__)

Dispatch = Callable[[Job], None]


def make_dispatch(settings: Settings, celery: Celery | None = None) -> Dispatch:
    """A function that sends the message of one queued job; call it only after the commit."""
    app = celery or make_celery(settings)

    def dispatch(job: Job) -> None:
        try:
            app.send_task(OPTIMIZE, args=[job.id], queue=job.queue, retry=False)
        except (KombuError, OperationalError, OSError) as error:
            log.warning("dispatch_failed", job_id=job.id, queue=job.queue, error=str(error))

    return dispatch


def check_broker(settings: Settings) -> None:
    """Raise an exception where the broker cannot be reached (readiness)."""
    with make_celery(settings).connection_for_write(connect_timeout=2) as connection:
        connection.ensure_connection(max_retries=1, timeout=2)
