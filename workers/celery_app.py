"""The Celery side of a worker: one thread takes messages and runs one job at a time."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Any

from celery import Celery
from celery.apps.worker import Worker as CeleryWorker
from celery.exceptions import SecurityWarning, WorkerShutdown
from celery.signals import setup_logging, worker_ready

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

    # The receivers must stay referenced here: Celery's signals hold them weakly.
    def on_ready(**_: Any) -> None:
        """Celery's own handlers only set a flag that its consumer looks at every two seconds."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        service.shutdown.set()  # the job's thread sees it, ends its child and gives the job back
        raise WorkerShutdown(0)

    def on_setup_logging(**_: Any) -> None:
        """Logging is set up already; with a receiver here Celery leaves it alone."""

    worker_ready.connect(on_ready)
    setup_logging.connect(on_setup_logging)
    worker: CeleryWorker = app.Worker(
        hostname=f"anneal@{service.id}",
        queues=[*service.offer.queues, service.sharing.queue],
        pool="threads",
        concurrency=1,
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    service.lookout.told = partial(_listen, worker, service.offer.queues)
    worker.start()
    return int(worker.exitcode or 0)


def _listen(worker: CeleryWorker, queues: Sequence[str], draining: bool) -> None:
    """A worker that takes no jobs leaves the messages to others. Called by another thread than Celery's."""
    consumer: Any = getattr(worker, "consumer", None)  # which celery-types leaves out
    if consumer is None:
        return
    change = consumer.cancel_task_queue if draining else consumer.add_task_queue
    for queue in queues:
        consumer.call_soon(change, queue)
