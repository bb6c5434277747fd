"""A worker looks after itself: it sweeps, and where it is idle though there is a job that it could take, it wakes
itself.

Messages get lost, and others' work may become this worker's: a lease that ran out, a pause that is over, a job whose
message somebody took who had something better to do. Whoever is idle finds it, at the latest after `sweep_s`: as many
messages as there are idle workers, however many jobs wait, and none for jobs that no worker here can run. Where the
broker is away, or what was sent through it is not heard (its client connects again after pauses that grow), an idle
worker takes a job all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.errors import AppError
from app.jobs.ledger import JobLedger
from app.jobs.schedule import Offer
from workers.background import Regularly

log = structlog.get_logger(__name__)

_BREATH_S = 0.2  # after a job: a message that is there already comes by itself
_IN_VAIN = 2  # so often it wakes itself before it takes a job unasked


class Lookout:
    """Of one worker process. `draining`: it takes no job any more, and wakes itself for none. `told`: called with that,
    whenever it changes. `swept`: called with what a sweep found, by kind, and with `woken` for itself; `failed`: where
    that did not work."""

    def __init__(
        self,
        ledger: JobLedger,
        offer: Offer,
        sweep_s: float,
        shutdown: threading.Event,
        swept: Callable[[Mapping[str, int]], None] = lambda _counts: None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._ledger, self._offer, self._shutdown = ledger, offer, shutdown
        self._swept, self._failed = swept, failed
        self._sweep_s, self._sweeps = sweep_s, Regularly(sweep_s)
        self._look = threading.Event()
        self._busy = 0
        self._in_vain = 0
        self.draining = False
        self.take: Callable[[], None] = lambda: None  # have a job taken without a message, by another thread
        self.told: Callable[[bool], None] = lambda _draining: None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """It is not idle inside."""
        self._busy += 1  # by one thread at a time
        self._in_vain = 0
        try:
            yield
        finally:
            self._busy -= 1
            self._look.set()

    @property
    def willing(self) -> bool:
        """Whether it takes jobs, if there are some."""
        return not self._shutdown.is_set() and not self.draining

    def takes_jobs(self) -> bool:
        """Whether there is one for it now."""
        return self.willing and self._ledger.waiting(self._offer) is not None

    def drain(self, draining: bool) -> None:
        """What the operator wants."""
        if draining != self.draining:
            log.info("draining" if draining else "takes_jobs_again")
            self.draining = draining
            self.told(draining)

    def run(self) -> None:
        """Until the shutdown, also while a job runs: as long as one worker lives, nothing stays lost. A thread of its
        own, not a Celery task: it must not wait behind a long job, nor depend on the broker whose losses it mends."""
        while not self._shutdown.is_set():
            soon = self._look.wait(self._sweep_s)
            self._look.clear()
            if self._shutdown.wait(_BREATH_S if soon else 0.0):
                return
            try:
                if self._sweeps.due():
                    self._swept(self._ledger.sweep())
                self._wake_itself()
            except (SQLAlchemyError, AppError, OSError) as error:
                self._failed()
                log.warning("sweep_failed", error=str(error)[:300])

    def _wake_itself(self) -> None:
        if self._busy or not self.willing:
            return
        job = self._ledger.waiting(self._offer)
        if job is None:
            self._in_vain = 0
            return
        told = self._ledger.dispatch(job)
        if not told or self._in_vain >= _IN_VAIN:
            self._swept({"unasked": 1})
            self.take()
            return
        self._in_vain += 1
        self._swept({"woken": 1})

    def stop(self) -> None:
        """At the shutdown: it waits no longer."""
        self._look.set()
