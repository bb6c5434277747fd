"""The Celery side of a worker: one thread takes messages and runs one job at a time."""

from __future__ import annotations

import warnings
from typing import Any

from celery import Celery
from celery.apps.worker import Worker as CeleryWorker
from celery.exceptions import SecurityWarning
from celery.signals import setup_logging, worker_shutting_down

from app.queue.broker import make_celery
from workers.service import WorkerService
from workers.tasks.optimize import register


def make_worker_app(service: WorkerService) -> Celery:
    app = make_celery(service.settings)
    register(app, service)
    return app


def run_worker(service: WorkerService) -> int:
    """Serve until SIGTERM or SIGINT; the exit status.

    The threads pool: a job waits for child processes, so it needs no process of its own; Celery's prefork children may
    have none; and a SIGKILL takes worker, job and (by their parent-death signal) children at once.
    """
    app = make_worker_app(service)
    # Celery's warning against root is about pickled messages; only JSON is accepted here.
    warnings.filterwarnings("ignore", category=SecurityWarning)

    # The handler must stay referenced here: Celery's signals hold it weakly.
    def on_shutdown(**_: Any) -> None:
        service.shutdown.set()

    def on_setup_logging(**_: Any) -> None:
        """Logging is set up already; with a receiver here Celery leaves it alone."""

    worker_shutting_down.connect(on_shutdown)
    setup_logging.connect(on_setup_logging)
    worker: CeleryWorker = app.Worker(
        hostname=f"anneal@{service.id}",
        queues=service.queues,
        pool="threads",
        concurrency=1,
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    worker.start()
    return int(worker.exitcode or 0)
