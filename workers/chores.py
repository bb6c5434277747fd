"""What a worker does for the whole service beside its jobs, each in a thread of its own."""

from __future__ import annotations

import math
import threading
import time

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.blobs.collector import Collector
from app.blobs.content import ContentStore
from app.db.uow import Database
from app.domain.failures import StageFailure
from app.errors import AppError
from app.settings import Settings
from app.sharing.service import SharingService
from app.uploads.service import UploadService
from workers.background import Regularly
from workers.pipeline.isolated import Interrupted
from workers.pipeline.machine import MachineLock, Place
from workers.pipeline.workspace import remove_stale
from workers.telemetry.telling import Telemetry

log = structlog.get_logger(__name__)

_STALE_EVERY_S = 60.0
_LEAST_REST_S = 0.2


class Chores:
    def __init__(
        self, db: Database, content: ContentStore, settings: Settings, telemetry: Telemetry, shutdown: threading.Event
    ) -> None:
        self._settings, self._telemetry, self._shutdown = settings, telemetry, shutdown
        self._uploads = UploadService(db, content, settings)
        self._collector = Collector(db, content, settings)
        self._sharing = SharingService(db, settings.worker)

    def remove_stale(self) -> None:
        """Workspaces of workers that were killed."""
        if stale := remove_stale(self._settings.home_dir):
            log.info("removed_stale_workspaces", count=stale)

    def run_errands(self) -> None:
        """What may take long and must not hold up the heartbeat."""
        stale = Regularly(_STALE_EVERY_S)
        while not self._shutdown.wait(self._settings.worker.heartbeat_s):
            try:
                self._uploads.expire_uploads()
                if stale.due():
                    self.remove_stale()
                    self._sharing.remove_stale()
            except (SQLAlchemyError, AppError, OSError) as error:
                log.warning("errand_failed", error=str(error)[:300])

    def collect(self) -> None:
        """The collector, in a thread of its own: it goes on while there is work, and nothing else waits for it. No more
        than half of the time, and no pass begins while something is measured on this machine."""
        machine, pause = MachineLock(self._settings.worker.lock_dir, math.inf), self._settings.worker.heartbeat_s
        while not self._shutdown.wait(pause):
            pause = self._settings.collector.every_s
            try:
                with machine.hold(Place(alone=False), self._shutdown.is_set, lambda: None):
                    began = time.monotonic()  # and let go: no measurement is to wait for a storage that hangs
                self._telemetry.collected(self._collector.collect(), time.monotonic() - began)
                if not self._collector.round_over:
                    pause = max(time.monotonic() - began, _LEAST_REST_S)
            except Interrupted:
                return
            except (SQLAlchemyError, AppError, OSError, StageFailure) as error:
                self._telemetry.chore_failed("collector")
                log.warning("collecting_failed", error=str(error)[:300])
