"""A worker: takes claimed jobs through the pipeline, reports itself, and sweeps up after workers that died."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.blobs.content import ContentStore
from app.capabilities.service import CapabilityService
from app.compatibility.service import CompatibilityService
from app.db.base import make_engine
from app.db.clock import CLOCK
from app.db.uow import Database
from app.errors import AppError
from app.jobs.ledger import JobLedger
from app.jobs.schedule import Offer
from app.logging import bind_correlation_id, new_correlation_id
from app.prebuilds.service import PrebuildService
from app.queue.producer import make_dispatch
from app.settings import Settings
from app.sharing.service import SharingService
from app.storage.factory import make_store
from app.webhooks.sender import WebhookSender
from workers import plugins
from workers.attempts import Attempts
from workers.background import Background, Regularly
from workers.chores import Chores
from workers.devices.cuda import confine
from workers.equipment import Equipment
from workers.examiner import Examiner
from workers.hardware import describe, fingerprint
from workers.helping import Helper, Sharing
from workers.installation import Installation, load_or_make_key
from workers.kinds import kind_of
from workers.libraries import model_formats
from workers.liveness import Liveness
from workers.lookout import Lookout
from workers.offer import backends_of, queues_of
from workers.pipeline.confining import check_features, host_of
from workers.pipeline.isolated import IsolatedRunner
from workers.pipeline.shared_caches import SharedCaches
from workers.prebuilder import Prebuilder
from workers.room import Room
from workers.spare import SpareTime
from workers.telemetry.telling import Telemetry

log = structlog.get_logger(__name__)

_TELL_EVERY_S = 60.0
_LOOK_S = 0.5
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0


class WorkerService:
    """Everything one worker process holds. `start` before the first job, `close` at the end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.id = settings.worker.name or f"{socket.gethostname()}-{os.getpid()}"
        self.db = Database(make_engine(settings.database))
        lease_s = settings.worker.lease_s
        # An answer that takes longer than the lease is of no use to a job; a renewal is to fail while another can help.
        self._job_db = Database(make_engine(settings.database, lease_s))
        self._renewal_db = Database(make_engine(settings.database, lease_s / 3))
        self.content = ContentStore(make_store(settings))
        dispatch = make_dispatch(settings)
        self.ledger = JobLedger(self._job_db, self.content, dispatch, settings.worker)
        self._renewals = JobLedger(self._renewal_db, self.content, dispatch, settings.worker)
        self.capabilities = CapabilityService(self.db, settings)
        self.webhooks = WebhookSender(self.db, settings)
        self.isolated = IsolatedRunner(host=host_of(settings))
        self.shutdown = threading.Event()
        self.shared_caches = SharedCaches(self.content.store, settings.home_dir / "cache")
        self.hardware: Mapping[str, Any] = describe(settings.worker.gpu)
        confine(self.hardware, settings.worker.gpu)
        self.fingerprint = fingerprint(self.hardware)
        self.telemetry = Telemetry(settings, self.id, self.hardware)
        self.webhooks.told = self.telemetry.delivered
        self.chores = Chores(self.db, self.content, settings, self.telemetry, self.shutdown)
        for plugin in plugins.found():
            if plugin.problem is not None:
                log.warning("plugin_left_out", **plugin.to_json())
        self.backends = backends_of(self.hardware)
        self.liveness = Liveness(settings.worker.lock_dir)
        self.liveness.hold()
        self.offer = Offer(self.id, tuple(queues_of(self.backends, self.hardware)), self.liveness.name)
        swept, failed = self.telemetry.swept, partial(self.telemetry.chore_failed, "sweeper")
        self.lookout = Lookout(self.ledger, self.offer, settings.worker.sweep_s, self.shutdown, swept, failed)
        self.room = Room(settings.home_dir, settings.worker.least_free_mb << 20)
        self.spare = SpareTime(self.shutdown)
        self._equipment = Equipment(
            self.id,
            settings,
            self.ledger,
            self.content,
            self.isolated,
            self.hardware,
            self.fingerprint,
            load_or_make_key(settings.worker.engine_key_file or settings.home_dir / "keys" / "engine.key"),
        )
        self._plan_work()
        self._one_job = threading.Lock()
        self._has_job = False
        self._unasked = threading.Event()
        self.lookout.take = self._unasked.set
        self._background = Background(self.shutdown, self.give_up)
        self.failed: str | None = None

    def _plan_work(self) -> None:
        """Its own jobs; and what it does for jobs of others, and for questions, while it has none."""
        settings, equipment = self.settings, self._equipment
        self.examiner = Examiner(CompatibilityService(self.db, self.capabilities), equipment, self.spare)
        self.prebuilder = Prebuilder(PrebuildService(self.db), equipment, self.spare, self.telemetry)
        kind = kind_of(self.backends, self.hardware, self.fingerprint, Installation(equipment.engine_key).key_id)
        self.sharing = Sharing(self._job_db, self.capabilities, settings, self.id, kind)
        self.helper = Helper(
            SharingService(self._job_db, settings.worker),
            SharingService(self._renewal_db, settings.worker),
            equipment,
            kind,
            self.backends,
            self.spare,
            self.telemetry,
            lambda: not self.lookout.draining,
        )
        self.attempts = Attempts(
            equipment,
            self._renewals,
            self.backends,
            self.sharing,
            shared_caches=self.shared_caches,
            room=self.room,
            telemetry=self.telemetry,
            shutdown=self.shutdown,
            give_up=self.give_up,
        )

    def start(self) -> None:
        self.chores.remove_stale()
        self.isolated.start()
        self.telemetry.start()
        check_features(self.isolated.features, self.settings.worker.sandbox)
        self._sign_on()
        self._background.start("housekeeping", self._housekeep)
        self._background.start("sweeper", self.lookout.run)
        self._background.start("jobs without a message", self._take_unasked)
        self._background.start("deaths", lambda: self.liveness.watch(self.shutdown, self._bury))
        self._background.start("errands", self.chores.run_errands)
        self._background.start("webhooks", lambda: self.webhooks.run(self.shutdown, self.settings.worker.heartbeat_s))
        self._background.start("collector", self.chores.collect)
        errands = [self.examiner.answer_one, self.helper.help_one, self.prebuilder.build_one]
        self._background.start("spare time", lambda: self.spare.run(errands, self.settings.worker.heartbeat_s))

    def give_up(self, reason: str) -> None:
        """End this process in order, as a failure: whoever runs it starts another. A job that runs is given back."""
        if self.shutdown.is_set():
            return
        log.error("worker_gives_up", reason=reason)
        self.failed = reason
        self.shutdown.set()
        os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        self.shutdown.set()
        self.lookout.stop()
        self.spare.look()
        self.isolated.close()
        self._background.join(timeout_s=5)
        try:
            self.capabilities.stopped(self.id)
        except SQLAlchemyError as error:
            log.warning("could_not_sign_off", error=str(error)[:200])
        for db in (self.db, self._job_db, self._renewal_db):
            db.close()
        if not self._has_job:  # else it is for those who see this process go
            self.liveness.release()
        self.telemetry.close()

    def _sign_on(self) -> None:
        """Make itself known; waits for a database that is away, or not migrated yet."""
        pause = _FIRST_PAUSE_S
        while not self.shutdown.is_set():
            try:
                self._report_self()
                return
            except SQLAlchemyError as error:
                log.warning("waiting_for_the_database", again_in_s=pause, error=str(error)[:300])
            self.shutdown.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    # Housekeeping

    def _report_self(self) -> None:
        self.capabilities.report(
            self.id,
            hostname=socket.gethostname(),
            hardware=self.hardware,
            backends=[
                {
                    "name": b.name,
                    "versions": dict(b.versions),
                    "devices": list(b.devices),
                    "precisions": list(b.precisions),
                }
                for b in self.backends
            ],
            formats=model_formats(),
            queues=self.offer.queues,
            plugins=[plugin.to_json() for plugin in plugins.found()],
            examines=self.examiner.backends,
            builds=self.prebuilder.offers,
            helps=self.sharing.kind.plain,
            isolation=self.isolated.features.to_json(self.settings.worker.sandbox),
        )

    def _housekeep(self) -> None:
        """The heartbeat, and nothing that may take long."""
        clock = Regularly(_TELL_EVERY_S)
        while not self.shutdown.wait(self.settings.worker.heartbeat_s):
            try:
                beat = self.capabilities.heartbeat(self.id)
                if beat is None:
                    self._report_self()
                self.lookout.drain(not self.room.enough() or (beat is not None and beat.draining))
                if abs(CLOCK.off_by()) > 1 and clock.due():
                    log.warning("clock_is_off", seconds=round(CLOCK.off_by(), 1))
            except (SQLAlchemyError, AppError, OSError) as error:
                log.warning("housekeeping_failed", error=str(error)[:300])

    def _bury(self, lock: str) -> int:
        """A worker of this machine is dead: its jobs go on at once."""
        taken = self.ledger.take_from_dead(lock)
        if taken:
            self.telemetry.swept({"from_dead": taken})
        return taken

    # Jobs

    def _take_unasked(self) -> None:
        """What the lookout wants taken though no message comes."""
        while not self.shutdown.is_set():
            if not self._unasked.wait(_LOOK_S):
                continue
            self._unasked.clear()
            bind_correlation_id(new_correlation_id())
            try:
                self.run_jobs()
            except Exception:  # as of a job that a message woke: the sweeper gives it on
                log.exception("task_failed")

    def run_jobs(self, most: float = math.inf) -> None:
        """Take the best of the jobs that wait to its end, and then the next, as long as there is one and nothing is
        wrong: between two there is no message to wait for. One at a time, whichever thread it is."""
        with self._one_job, self.lookout.at_work():
            if self.room.enough() and self.lookout.takes_jobs():
                with self.spare.jobs_first():
                    while most > 0 and self.room.enough() and self.lookout.willing and self._run_claimed():
                        most -= 1

    def _run_claimed(self) -> bool:
        """Whether there was a job, and has ended."""
        asked = time.monotonic()
        claim = self.ledger.claim(self.offer)
        if claim is None:  # another was faster
            return False
        self._has_job = True
        ended = self.attempts.run(claim, asked)
        self._has_job = False
        return ended
