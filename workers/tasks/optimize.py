"""What messages do: one came, so there may be jobs, or somebody to help. Which ones, the database decides."""

from __future__ import annotations

import structlog
from celery import Celery

from app.logging import bind_correlation_id, new_correlation_id
from app.queue.messages import HELP, OPTIMIZE
from workers.service import WorkerService

log = structlog.get_logger(__name__)


def register(app: Celery, service: WorkerService) -> None:
    """Bind the tasks to this worker's service."""

    def optimize(_job_id: str | None = None) -> None:
        bind_correlation_id(new_correlation_id())
        try:
            service.run_jobs()
        except Exception:  # the database is away, say: the lease runs out and the sweeper gives the job on
            log.exception("task_failed")

    app.task(name=OPTIMIZE, ignore_result=True)(optimize)
    app.task(name=HELP, ignore_result=True)(service.spare.look)
