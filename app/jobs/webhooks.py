"""Tells a job's webhook that the job has ended: at least once, with growing pauses, until it answers 2xx.

The URL is the client's, so it is untrusted: only addresses of the public internet are connected to (unless the operator
allows more), the address that was checked is the one connected to, no redirect is followed and no answer is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import urlsplit

import structlog

from app.db.base import utcnow
from app.db.orm import Job
from app.db.uow import Database
from app.jobs.repository import JobRepository
from app.jobs.schemas import JobEnded
from app.network import is_in, is_public
from app.settings import Settings

log = structlog.get_logger(__name__)

_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 3600.0


class UndeliverableWebhook(Exception):
    """The message says why this attempt failed."""


class WebhookSender:
    def __init__(self, db: Database, settings: Settings) -> None:
        self.db = db
        self.settings = settings.webhooks
        self.allow_private = settings.webhooks.allow_private
        if self.allow_private is None:
            # The embedded default: everybody is on this machine, and so may their receivers be.
            self.allow_private = settings.embedded and not settings.keys_required

    def deliver_due(self, limit: int = 20) -> int:
        """One attempt for every webhook that is due; how many were delivered. Any number of workers may call it."""
        with self.db.read() as session:
            due = JobRepository(session).webhooks_due(utcnow(), limit)
        return sum(self._attempt(job) for job in due)

    def _attempt(self, job: Job) -> bool:
        # Taken before it is sent: two workers do not send it at once, and one that dies has only lost this attempt.
        pause = min(_FIRST_PAUSE_S * 4**job.webhook_attempts, _LONGEST_PAUSE_S)
        taken = {
            "webhook_due_at": utcnow() + timedelta(seconds=pause),
            "webhook_attempts": job.webhook_attempts + 1,
        }
        with self.db.write() as uow:
            if not JobRepository(uow.session).touch(job.id, [Job.webhook_attempts == job.webhook_attempts], taken):
                return False
        try:
            self._post(job)
        except (UndeliverableWebhook, OSError, ValueError, http.client.HTTPException) as error:
            # ValueError: what is no URL after all (a broken IPv6 address, a port of 99999, a label of 70 letters)
            last = job.webhook_attempts + 1 >= self.settings.max_attempts
            log.warning("webhook_failed", job_id=job.id, attempt=job.webhook_attempts + 1, reason=str(error)[:200])
            if last:
                self._done(job, f"webhook given up after {self.settings.max_attempts} attempts: {error}")
            return False
        self._done(job, "webhook delivered")
        return True

    def _done(self, job: Job, message: str) -> None:
        with self.db.write() as uow:
            JobRepository(uow.session).update(
                job.id, [], {"webhook_done_at": utcnow()}, "note", {"message": message[:300]}
            )

    def _post(self, job: Job) -> None:
        assert job.webhook_url is not None
        body = JobEnded.of(job).to_json()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "anneal-webhook/1",
            "X-Anneal-Delivery": f"{job.id}-{job.webhook_attempts + 1}",
        }
        if self.settings.secret is not None:
            key = self.settings.secret.get_secret_value().encode()
            headers["X-Anneal-Signature"] = "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()
        parts = urlsplit(job.webhook_url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        with (
            _Deadline(2 * self.settings.timeout_s) as deadline,
            self._connect(parts.scheme, parts.hostname or "", parts.port, deadline) as connection,
        ):
            connection.request("POST", target, body, headers)
            status = connection.getresponse().status
        if not 200 <= status < 300:
            raise UndeliverableWebhook(f"it answered {status}")

    @contextlib.contextmanager
    def _connect(
        self, scheme: str, host: str, port: int | None, deadline: _Deadline
    ) -> Iterator[http.client.HTTPConnection]:
        port = port or (443 if scheme == "https" else 80)
        address = self._address(host, port)
        # The name goes into the Host header and the certificate check, the checked address into the connection.
        connection: http.client.HTTPConnection
        if scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=self.settings.timeout_s)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self.settings.timeout_s)
        with contextlib.closing(connection):
            connection.sock = socket.create_connection((address, port), timeout=self.settings.timeout_s)
            deadline.watch(connection.sock)
            if scheme == "https":
                # The handshake comes after the wrapping: what is wrapped is another socket, to be watched in its turn.
                context = ssl.create_default_context()
                secured = context.wrap_socket(connection.sock, server_hostname=host, do_handshake_on_connect=False)
                connection.sock = secured
                deadline.watch(secured)
                secured.do_handshake()
            yield connection

    def _address(self, host: str, port: int) -> str:
        for address in _resolve(host, port, self.settings.timeout_s):
            if (self.allow_private or is_public(address)) and not is_in(address, self.settings.deny):
                return address
        raise UndeliverableWebhook(f"{host} has no address that webhooks may reach")


class _Deadline:
    """Hangs up after so many seconds, whatever the connection is doing: a socket's time-out is per operation, and a
    receiver that trickles its answer must not hold up everybody else's."""

    def __init__(self, seconds: float) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._over = False
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, connected: socket.socket) -> None:
        with self._lock:
            self._socket = connected
            if self._over:
                raise UndeliverableWebhook("it took too long to connect")

    def _expire(self) -> None:
        with self._lock:
            self._over = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    # Not SSLSocket's own, which takes the TLS object away from under the thread that uses it.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _resolve(host: str, port: int, seconds: float) -> list[str]:
    """The host's addresses. The system's resolver knows no time-out, so it is left alone in a thread after that."""
    found: list[str] = []
    failed: list[Exception] = []

    def look_up() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(str(address) for *_, (address, *_rest) in answers)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=look_up, name="webhook-dns", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise UndeliverableWebhook(f"{host} could not be looked up in {seconds:g} s")
    if failed:
        raise failed[0]
    return found
