"""Webhooks: delivered after the end, tried again, signed, and never to an address that is not meant for clients."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import SecretStr

from app.db.base import utcnow
from app.db.orm import LOCAL_TENANT, Job
from app.domain.spec import OptimizationSpec
from app.jobs.schemas import JobEnded, JobNotice, job_json
from app.jobs.webhooks import WebhookSender
from app.settings import Settings, WebhookSettings
from tests.integration.conftest import Desk


@dataclass
class Receiver:
    port: int = 0
    status: int = 200
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?x=1"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.requests.append((dict(self.headers), body))
            self.send_response(found.status)
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def _sender(desk: Desk, **options: Any) -> WebhookSender:
    return WebhookSender(desk.db, Settings(webhooks=WebhookSettings(**options)))


def _ended_job(desk: Desk, url: str) -> Job:
    body = {"model_id": desk.add_model().id, "webhook": {"url": url}}
    spec = OptimizationSpec.model_validate(body)
    job, _ = desk.service.submit(LOCAL_TENANT, spec, correlation_id="t", idempotency=None)
    desk.service.cancel(LOCAL_TENANT, job.id)
    return job


def _make_due(desk: Desk, job: Job) -> None:
    with desk.db.write() as uow:
        uow.session.get_one(Job, job.id).webhook_due_at = utcnow()


def test_an_ended_job_is_told_once_and_signed(desk: Desk, receiver: Receiver) -> None:
    job = _ended_job(desk, receiver.url)
    sender = _sender(desk, secret=SecretStr("s3cret"))
    assert sender.deliver_due() == 1
    assert sender.deliver_due() == 0
    ((headers, body),) = receiver.requests
    told = JobEnded.model_validate_json(body)
    assert (told.type, told.job.id, told.job.status) == ("job.cancelled", job.id, "cancelled")
    document = json.loads(job_json(desk.job(job.id)))
    assert json.loads(body)["job"] == {name: document[name] for name in JobNotice.model_fields}
    assert "report" not in told.job.links, "it has none"
    assert headers["X-Anneal-Signature"] == "sha256=" + hmac.new(b"s3cret", body, hashlib.sha256).hexdigest()


def test_a_running_job_is_not_told(desk: Desk, receiver: Receiver) -> None:
    body = {"model_id": desk.add_model().id, "webhook": {"url": receiver.url}}
    desk.service.submit(LOCAL_TENANT, OptimizationSpec.model_validate(body), correlation_id="t", idempotency=None)
    assert _sender(desk).deliver_due() == 0


@pytest.mark.parametrize("status", [302, 404, 500])
def test_anything_but_2xx_is_tried_again_later(desk: Desk, receiver: Receiver, status: int) -> None:
    job = _ended_job(desk, receiver.url)
    receiver.status = status
    sender = _sender(desk)
    assert sender.deliver_due() == 0
    assert sender.deliver_due() == 0
    assert len(receiver.requests) == 1, "the second attempt has to wait"
    _make_due(desk, job)
    receiver.status = 204
    assert sender.deliver_due() == 1


def test_it_is_given_up_in_the_end_and_the_job_says_so(desk: Desk, receiver: Receiver) -> None:
    job = _ended_job(desk, receiver.url)
    receiver.status = 500
    sender = _sender(desk, max_attempts=2)
    for _ in range(3):
        sender.deliver_due()
        _make_due(desk, job)
    assert len(receiver.requests) == 2
    assert "given up" in desk.service.events_after(LOCAL_TENANT, job.id, 0)[-1].data["message"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://[::1]:{port}/"])
def test_private_addresses_are_not_connected_to_where_tenants_share_the_service(
    desk: Desk, receiver: Receiver, url: str
) -> None:
    _ended_job(desk, url.format(port=receiver.port))
    sender = WebhookSender(desk.db, Settings(require_keys=True))
    assert sender.deliver_due() == 0
    assert receiver.requests == []


def test_private_addresses_are_allowed_by_default_in_the_embedded_service_only(desk: Desk, receiver: Receiver) -> None:
    _ended_job(desk, receiver.url)
    server = {"DATABASE_URL": "postgresql://db/anneal"}
    # A worker has no ANNEAL_HOST that would tell that keys are required.
    assert WebhookSender(desk.db, Settings(**server)).deliver_due() == 0
    assert receiver.requests == []
    allowed = {
        (): True,
        ("keys",): False,
        ("server",): False,
        ("server", "keys"): False,
    }
    for options, expected in allowed.items():
        settings = Settings(**(server if "server" in options else {}), require_keys=True if "keys" in options else None)
        assert WebhookSender(desk.db, settings).allow_private is expected, options
        for said in (True, False):
            settings.webhooks = WebhookSettings(allow_private=said)
            assert WebhookSender(desk.db, settings).allow_private is said


def test_a_receiver_that_trickles_its_handshake_is_hung_up_on(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ended: list[float] = []

        def trickle() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                # A handshake record of 8 KiB, a byte at a time.
                for byte in b"\x16\x03\x03\x20\x00\x02\x00\x1f\xfc" + bytes(60):
                    connection.sendall(bytes([byte]))
                    time.sleep(0.1)
            ended.append(time.monotonic())

        thread = threading.Thread(target=trickle)
        thread.start()
        _ended_job(desk, f"https://127.0.0.1:{server.getsockname()[1]}/")
        started = time.monotonic()
        assert _sender(desk, timeout_s=0.4).deliver_due() == 0
        assert time.monotonic() - started < 2
        thread.join()
        assert ended[0] - started < 3, "the connection was closed"


def test_a_receiver_that_speaks_no_tls_is_let_go_of(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        rest: list[bytes] = []

        def answer() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                while chunk := connection.recv(4096):
                    rest.append(chunk)

        thread = threading.Thread(target=answer)
        thread.start()
        job = _ended_job(desk, f"https://127.0.0.1:{server.getsockname()[1]}/")
        assert _sender(desk, max_attempts=1).deliver_due() == 0
        thread.join(4)
        assert not thread.is_alive(), "the socket was left open"
        assert "given up" in desk.service.events_after(LOCAL_TENANT, job.id, 0)[-1].data["message"]


def test_a_resolver_that_hangs_is_not_waited_for(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    # No name server of the tests could be made to hang without touching the system's configuration.
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(10) and [])
    _ended_job(desk, "http://receiver.example/")
    started = time.monotonic()
    assert _sender(desk, timeout_s=0.3).deliver_due() == 0
    assert time.monotonic() - started < 2
    released.set()


def test_a_receiver_that_trickles_its_answer_is_hung_up_on(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                for _ in range(100):
                    connection.sendall(b"H")
                    time.sleep(0.1)

        thread = threading.Thread(target=trickle)
        thread.start()
        _ended_job(desk, f"http://127.0.0.1:{server.getsockname()[1]}/")
        started = time.monotonic()
        assert _sender(desk, timeout_s=0.4).deliver_due() == 0
        assert time.monotonic() - started < 3
        thread.join()
