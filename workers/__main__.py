"""`python -m workers`: run one worker until SIGTERM or SIGINT."""

from __future__ import annotations

import sys

from app.logging import configure_logging
from app.settings import load_settings
from workers.celery_app import run_worker
from workers.gpus import UnknownGpu
from workers.service import WorkerService


def main() -> int:
    settings = load_settings()
    log_json = settings.log_json if settings.log_json is not None else not sys.stderr.isatty()
    configure_logging(json=log_json, level=settings.log_level)
    try:
        service = WorkerService(settings)
    except UnknownGpu as error:
        sys.exit(str(error))
    try:
        service.start()
        return run_worker(service) or int(service.failed is not None)
    finally:
        service.close()


if __name__ == "__main__":
    sys.exit(main())
