"""Tells a job's webhook that the job has ended: at least once, with growing pauses, until it answers 2xx.

Attempts run beside each other, in a bounded number of places of which no tenant and no receiver can have more than a
share: one that keeps silent holds up its own webhooks, and nobody else's.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.db.base import utcnow
from app.db.orm import Job
from app.db.uow import Database
from app.jobs.schemas import JobEnded
from app.jobs.webhook_repository import Passed, WebhookRepository
from app.jobs.webhook_transport import FAILURES, WebhookTransport
from app.settings import Settings

log = structlog.get_logger(__name__)

_PLACES = 16  # attempts at once, of one process
_OF_A_TENANT = 4
_OF_A_RECEIVER = 2
_REMEMBERED = 1000  # tenants, as to when each had its last turn
_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 3600.0
_RECEIVER = re.compile(r"[^/?#]*//[^/?#]*")


class WebhookSender:
    """Any number of processes may have one: each attempt is taken in the database before it is made, for as long as it
    can last, so that no two are under way for one job; one whose process dies has only lost this attempt."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self.db = db
        self.settings = settings.webhooks
        self.transport = WebhookTransport(settings)
        self.told: Callable[[str], None] = lambda _outcome: None  # delivered, failed, given_up: of every attempt
        self._places = _Places()

    def run(self, stopping: threading.Event, every_s: float) -> None:
        """Deliver what is due until told to stop. A place that becomes free is given away at once."""
        while not stopping.is_set():
            try:
                self.start_due()
            except SQLAlchemyError as error:
                log.warning("webhooks_not_looked_for", error=str(error)[:300])
            self._places.wait(every_s)

    def start_due(self) -> list[Future[bool]]:
        """Begin an attempt for as much of what is due as there are places for, each in a thread of its own; whether
        they delivered. Tenants take turns: next is who has the fewest attempts under way."""
        started = []
        while (job := self._next()) is not None:
            attempt = self._start(job)
            if attempt is not None:
                started.append(attempt)
        return started

    def _next(self) -> Job | None:
        passed = self._places.full()
        if passed is None:
            return None
        now = utcnow()
        with self.db.read() as session:
            repository = WebhookRepository(session)
            tenant_id = self._places.turn(repository.waiting_tenants(now, passed))
            return repository.next_of(tenant_id, now, passed) if tenant_id is not None else None

    def _start(self, job: Job) -> Future[bool] | None:
        """None where another process has taken it at this moment; it is not due then."""
        until = utcnow() + timedelta(seconds=self.transport.longest_s + _pause_s(job))
        with self.db.write() as uow:
            if not WebhookRepository(uow.session).take(job, until):
                return None
        self._places.take(job)
        ended: Future[bool] = Future()

        def deliver() -> None:
            try:
                ended.set_result(self._deliver(job))
            except Exception as error:  # the database is away, say: the attempt counts, the next one comes later
                log.warning("webhook_not_noted", job_id=job.id, error=str(error)[:300])
                ended.set_result(False)
            finally:
                self._places.leave(job)

        # Not a pool's: those are waited for at the end of the process, however long a receiver keeps silent.
        threading.Thread(target=deliver, name=f"webhook-{job.id}", daemon=True).start()
        return ended

    def _deliver(self, job: Job) -> bool:
        assert job.webhook_url is not None
        attempt = job.webhook_attempts + 1
        headers = {"X-Anneal-Delivery": f"{job.id}-{attempt}"}
        try:
            self.transport.post(job.webhook_url, JobEnded.of(job).to_json(), headers)
        except FAILURES as error:
            log.warning("webhook_failed", job_id=job.id, attempt=attempt, reason=str(error)[:200])
            with self.db.write() as uow:
                repository = WebhookRepository(uow.session)
                over = attempt >= self.settings.max_attempts
                self.told("given_up" if over else "failed")
                if over:
                    repository.done(job, f"webhook given up after {self.settings.max_attempts} attempts: {error}")
                else:
                    repository.again(job, utcnow() + timedelta(seconds=_pause_s(job)))
            return False
        with self.db.write() as uow:
            WebhookRepository(uow.session).done(job, "webhook delivered")
        self.told("delivered")
        return True


class _Places:
    """Who has an attempt under way in this process. Threads share it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken: dict[str, tuple[str, str]] = {}  # job → tenant, receiver
        self._freed = False
        self._turns: dict[str, int] = {}  # when each tenant had its last one, of those that had one of late
        self._turn = 0

    def full(self) -> Passed | None:
        """Whom there is no place for; None where there is none at all."""
        with self._changed:
            if len(self._taken) >= _PLACES:
                return None
            tenants = Counter(tenant for tenant, _ in self._taken.values())
            receivers = Counter(receiver for _, receiver in self._taken.values())
            return Passed(
                [*self._taken],
                [tenant for tenant, count in tenants.items() if count >= _OF_A_TENANT],
                [receiver for receiver, count in receivers.items() if count >= _OF_A_RECEIVER],
            )

    def turn(self, tenants: list[str]) -> str | None:
        """Whose turn it is of those that wait, who has waited longest first."""
        with self._changed:
            held = Counter(tenant for tenant, _ in self._taken.values())
            return min(tenants, key=lambda tenant: (held[tenant], self._turns.get(tenant, 0)), default=None)

    def take(self, job: Job) -> None:
        with self._changed:
            self._turn += 1
            self._turns.pop(job.tenant_id, None)
            self._turns[job.tenant_id] = self._turn
            if len(self._turns) > _REMEMBERED:
                del self._turns[next(iter(self._turns))]
            self._taken[job.id] = (job.tenant_id, _receiver(job))

    def leave(self, job: Job) -> None:
        with self._changed:
            del self._taken[job.id]
            self._freed = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Until a place becomes free, or has since the last time; at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._freed, seconds)
            self._freed = False


def _receiver(job: Job) -> str:
    """The URL up to its path. Spellings of one host count as several: they share the tenant's places all the same."""
    found = _RECEIVER.match(job.webhook_url or "")
    return found[0] if found else ""


def _pause_s(job: Job) -> float:
    """After the attempt that comes next, should it fail."""
    return float(min(_FIRST_PAUSE_S * 4**job.webhook_attempts, _LONGEST_PAUSE_S))
