"""`python -m workers`: run one worker until SIGTERM or SIGINT."""

from __future__ import annotations

import contextlib
import signal
import sys
from types import FrameType

from app.background import tell_of_dead_threads
from app.logging import configure_logging
from app.sandbox.syscalls import hide_from_tracing
from app.settings import load_settings
from workers.celery_app import run_worker
from workers.devices.cuda import UnknownGpu
from workers.pipeline.confining import Unconfined
from workers.service import WorkerService


def main() -> int:
    settings = load_settings()
    log_json = settings.log_json if settings.log_json is not None else not sys.stderr.isatty()
    configure_logging(json=log_json, level=settings.log_level)
    hide_from_tracing()  # keys and passwords of the whole installation are in this process
    try:
        service = WorkerService(settings)
    except UnknownGpu as error:
        sys.exit(str(error))
    tell_of_dead_threads(lambda name: service.give_up(f"its thread {name!r} died"))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    status = 0
    try:
        with contextlib.suppress(SystemExit):  # of a signal that came before Celery listens to any
            service.start()
            status = run_worker(service)
    except Unconfined as missing:
        sys.exit(f"WORKER_SANDBOX=required, and this machine leaves open: {missing}")
    finally:
        service.close()
    return status or int(service.failed is not None)


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit


if __name__ == "__main__":
    sys.exit(main())
