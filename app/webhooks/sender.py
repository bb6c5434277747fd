"""Delivers webhooks: at least once, with growing pauses for about a day, until they are answered with 2xx.

Attempts run beside each other, in a bounded number of places of which no tenant and no receiver can have more than a
share: one that keeps silent holds up its own webhooks, and nobody else's; jobs hold up none.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.db.base import utcnow
from app.db.uow import Database, patiently
from app.db.webhooks import WebhookDelivery, WebhookEndpoint
from app.jobs.repository import JobRepository
from app.settings import Settings
from app.webhooks.outbox import take_over, tell_late
from app.webhooks.places import FairPlaces
from app.webhooks.queue import DeliveryQueue
from app.webhooks.signing import secrets_of, signed, signed_as_before
from app.webhooks.transport import FAILURES, UndeliverableWebhook, WebhookTransport

log = structlog.get_logger(__name__)

_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 6 * 3600.0
_JITTER = 0.2
_DISABLING = 20  # failures in a row: fewer are too few to tell, however long they went on
_GONE = 410
_TAKEN_OVER = 50  # at once, of the release before


@dataclass(frozen=True)
class _Attempt:
    """`secrets`: each of them signs. `as_before`: that of the operator, which signs as it did, too."""

    delivery: WebhookDelivery
    secrets: Sequence[str]
    as_before: str | None


@dataclass(frozen=True)
class _Failure:
    """`status`: of the answer, if there was one."""

    status: int | None
    reason: str


class WebhookSender:
    """Any number of processes may have one: each attempt is taken in the database before it is made, for as long as it
    can last, so that no two are under way for one delivery; one whose process dies has only lost this attempt."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self.db = db
        self.settings = settings.webhooks
        self.transport = WebhookTransport(settings)
        self.told: Callable[[str], None] = lambda _outcome: None  # delivered, failed, given_up: of every attempt
        self._places = FairPlaces()

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
        self._take_over()
        started = []
        while (delivery := self._next()) is not None:
            attempt = self._take(delivery)
            if attempt is not None:
                started.append(self._start(attempt))
        return started

    def _take_over(self) -> None:
        """What an earlier release left, or a worker of it leaves now."""
        with self.db.read() as session:
            queue = DeliveryQueue(session)
            left, untold = queue.left_behind(utcnow(), _TAKEN_OVER), queue.untold(_TAKEN_OVER)
        for job_id, attempts in left:
            with self.db.write() as uow:
                take_over(uow.session, job_id, attempts)
        if untold:
            with self.db.write() as uow:
                for job_id in untold:
                    tell_late(uow.session, job_id)

    def _next(self) -> WebhookDelivery | None:
        passed = self._places.full()
        if passed is None:
            return None
        now = utcnow()
        with self.db.read() as session:
            queue = DeliveryQueue(session)
            tenant_id = self._places.turn(queue.waiting_tenants(now, passed))
            return queue.next_of(tenant_id, now, passed) if tenant_id is not None else None

    def _take(self, delivery: WebhookDelivery) -> _Attempt | None:
        """None where another process has taken it at this moment, or where its endpoint takes nothing any more; it is
        not due then."""
        until = utcnow() + timedelta(seconds=self.transport.longest_s)
        with self.db.write() as uow:
            queue = DeliveryQueue(uow.session)
            if delivery.endpoint_id is None:
                operators = self.settings.secret.get_secret_value() if self.settings.secret is not None else None
                attempt = _Attempt(delivery, [operators] if operators else [], operators)
                return attempt if queue.take(delivery, until) else None
            endpoint = queue.endpoint(delivery.endpoint_id)
            if endpoint is None or endpoint.disabled_at is not None or endpoint.deleted_at is not None:
                # It was written while the endpoint was disabled or deleted.
                queue.drop(delivery, "The endpoint takes nothing any more.")
                return None
            return _Attempt(delivery, secrets_of(endpoint, utcnow()), None) if queue.take(delivery, until) else None

    def _start(self, attempt: _Attempt) -> Future[bool]:
        delivery = attempt.delivery
        self._places.take(delivery)
        ended: Future[bool] = Future()

        def deliver() -> None:
            try:
                ended.set_result(self._deliver(attempt))
            except Exception as error:  # the database is away, say: the attempt counts, the next one comes later
                log.warning("webhook_not_noted", delivery_id=delivery.id, error=str(error)[:300])
                ended.set_result(False)
            finally:
                self._places.leave(delivery)

        # Not a pool's: those are waited for at the end of the process, however long a receiver keeps silent.
        threading.Thread(target=deliver, name=f"webhook-{delivery.id}", daemon=True).start()
        return ended

    def _deliver(self, attempt: _Attempt) -> bool:
        delivery = attempt.delivery
        body = delivery.payload.encode()
        now = int(utcnow().timestamp())
        headers = {"X-Anneal-Delivery": delivery.id, **signed(delivery.id, now, body, attempt.secrets)}
        if attempt.as_before is not None:
            headers |= signed_as_before(attempt.as_before, body)
        status, failure = 0, None
        try:
            status = self.transport.post(delivery.url, body, headers)
        except UndeliverableWebhook as error:
            failure = _Failure(error.status, str(error))
        except FAILURES as error:
            failure = _Failure(None, str(error) or type(error).__name__)
        # What was answered is worth some patience: without the note it is sent once more.
        patiently(lambda: self._note(delivery, status, failure), self.transport.longest_s / 2)
        over = failure is not None and delivery.failures + 1 >= self.settings.max_attempts
        self.told("delivered" if failure is None else "given_up" if over else "failed")
        return failure is None

    def _note(self, delivery: WebhookDelivery, status: int, failure: _Failure | None) -> None:
        with self.db.write() as uow:
            queue = DeliveryQueue(uow.session)
            endpoint = queue.endpoint(delivery.endpoint_id, lock=True) if delivery.endpoint_id is not None else None
            if failure is None:
                if queue.delivered(delivery, status):
                    _note_job(JobRepository(uow.session), delivery, "webhook delivered")
                if endpoint is not None:
                    queue.answered(endpoint)
                return
            self._note_failure(queue, delivery, failure)
            if endpoint is not None:
                queue.failed(endpoint)
                reason = self._why_disable(endpoint, failure)
                if reason is not None and endpoint.disabled_at is None:
                    log.warning("webhook_endpoint_disabled", endpoint_id=endpoint.id, reason=reason)
                    queue.disable(endpoint, reason)

    def _note_failure(self, queue: DeliveryQueue, delivery: WebhookDelivery, failure: _Failure) -> None:
        failures = delivery.failures + 1
        log.warning("webhook_failed", delivery_id=delivery.id, failures=failures, reason=failure.reason[:200])
        if failures < self.settings.max_attempts:
            due_at = utcnow() + timedelta(seconds=_pause_s(failures))
            queue.again(delivery, due_at, failure.status, failure.reason)
        elif queue.given_up(delivery, failure.status, failure.reason):
            told = f"webhook given up after {failures} attempts: {failure.reason}"
            _note_job(JobRepository(queue.session), delivery, told)

    def _why_disable(self, endpoint: WebhookEndpoint, failure: _Failure) -> str | None:
        if failure.status == _GONE:
            return "It answered 410 Gone."
        assert endpoint.failing_since is not None
        failing = utcnow() - endpoint.failing_since
        if endpoint.failures < _DISABLING or failing < timedelta(hours=self.settings.disable_after_h):
            return None
        since = endpoint.failing_since.isoformat(timespec="seconds").replace("+00:00", "Z")
        return f"All of {endpoint.failures} attempts since {since} have failed, the last one so: {failure.reason}"


def _note_job(jobs: JobRepository, delivery: WebhookDelivery, message: str) -> None:
    """Of a webhook that the job itself names, its events tell."""
    if delivery.endpoint_id is None and delivery.job_id is not None:
        jobs.update(delivery.job_id, [], {}, "note", {"message": message[:300]})


def _pause_s(failures: int) -> float:
    """After so many in a row. By chance a little longer or shorter, so that what failed together does not come back
    together."""
    pause = min(_FIRST_PAUSE_S * 4 ** (failures - 1), _LONGEST_PAUSE_S)
    return float(pause * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311 (no secret)
