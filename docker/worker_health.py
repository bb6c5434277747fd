"""Exit status 0 where the worker of this container has given a sign of life of late, else 1: its health check."""

from __future__ import annotations

import socket
import sys

from app.capabilities.service import CapabilityService
from app.db.base import make_engine
from app.db.uow import Database
from app.settings import load_settings


def main() -> int:
    settings = load_settings()
    db = Database(make_engine(settings.database))
    try:
        live = CapabilityService(db, settings).live()
    finally:
        db.close()
    return 0 if socket.gethostname() in {worker.hostname for worker in live} else 1


if __name__ == "__main__":
    sys.exit(main())
