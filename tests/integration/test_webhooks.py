"""Webhooks: delivered after the end, tried again, signed, never to an address that is not meant for clients, and never
behind somebody else's."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import update

from app.db.base import make_engine, utcnow
from app.db.ids import new_id
from app.db.orm import LOCAL_TENANT, Job, Tenant
from app.db.uow import Database
from app.db.webhooks import WebhookDelivery
from app.domain.spec import OptimizationSpec
from app.jobs.schemas import JobEnded, JobNotice, job_json
from app.settings import Settings, WebhookSettings
from app.webhooks import places
from app.webhooks import sender as sending
from app.webhooks.sender import WebhookSender
from tests.factories.webhooks import Receiver, Silent, deliver_due, delivering, eventually, receiving
from tests.integration.conftest import Desk


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture
def silent() -> Iterator[Silent]:
    with contextlib.closing(Silent()) as found:
        yield found


def _sender(desk: Desk, **options: Any) -> WebhookSender:
    return WebhookSender(desk.db, Settings(webhooks=WebhookSettings(**options)))


def _ended_job(desk: Desk, url: str) -> Job:
    body = {"model_id": desk.add_model().id, "webhook": {"url": url}}
    spec = OptimizationSpec.model_validate(body)
    job, _ = desk.service.submit(LOCAL_TENANT, spec, correlation_id="t", idempotency=None)
    desk.service.cancel(LOCAL_TENANT, job.id)
    return job


def _make_due(desk: Desk, job: Job) -> None:
    due = update(WebhookDelivery).where(WebhookDelivery.job_id == job.id, WebhookDelivery.due_at.is_not(None))
    with desk.db.write() as uow:
        uow.session.execute(due.values(due_at=utcnow()))


def test_an_ended_job_is_told_once_and_signed(desk: Desk, receiver: Receiver) -> None:
    job = _ended_job(desk, receiver.url)
    sender = _sender(desk, secret=SecretStr("s3cret"))
    assert deliver_due(sender) == 1
    assert deliver_due(sender) == 0
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
    assert deliver_due(_sender(desk)) == 0


@pytest.mark.parametrize("status", [302, 404, 500])
def test_anything_but_2xx_is_tried_again_later(desk: Desk, receiver: Receiver, status: int) -> None:
    job = _ended_job(desk, receiver.url)
    receiver.status = status
    sender = _sender(desk)
    assert deliver_due(sender) == 0
    assert deliver_due(sender) == 0
    assert len(receiver.requests) == 1, "the second attempt has to wait"
    _make_due(desk, job)
    receiver.status = 204
    assert deliver_due(sender) == 1


def test_it_is_given_up_in_the_end_and_the_job_says_so(desk: Desk, receiver: Receiver) -> None:
    job = _ended_job(desk, receiver.url)
    receiver.status = 500
    sender = _sender(desk, max_attempts=2)
    for _ in range(3):
        deliver_due(sender)
        _make_due(desk, job)
    assert len(receiver.requests) == 2
    assert "given up" in desk.service.events_after(LOCAL_TENANT, job.id, 0)[-1].data["message"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://[::1]:{port}/"])
def test_private_addresses_are_not_connected_to_where_tenants_share_the_service(
    desk: Desk, receiver: Receiver, url: str
) -> None:
    _ended_job(desk, url.format(port=receiver.port))
    sender = WebhookSender(desk.db, Settings(require_keys=True))
    assert deliver_due(sender) == 0
    assert receiver.requests == []


def test_private_addresses_are_allowed_by_default_in_the_embedded_service_only(desk: Desk, receiver: Receiver) -> None:
    _ended_job(desk, receiver.url)
    server = {"DATABASE_URL": "postgresql://db/anneal"}
    # A worker has no ANNEAL_HOST that would tell that keys are required.
    assert deliver_due(WebhookSender(desk.db, Settings(**server))) == 0
    assert receiver.requests == []
    allowed = {
        (): True,
        ("keys",): False,
        ("server",): False,
        ("server", "keys"): False,
    }
    for options, expected in allowed.items():
        settings = Settings(**(server if "server" in options else {}), require_keys=True if "keys" in options else None)
        assert WebhookSender(desk.db, settings).transport.allow_private is expected, options
        for said in (True, False):
            settings.webhooks = WebhookSettings(allow_private=said)
            assert WebhookSender(desk.db, settings).transport.allow_private is said


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
        assert deliver_due(_sender(desk, timeout_s=0.4)) == 0
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
        assert deliver_due(_sender(desk, max_attempts=1)) == 0
        thread.join(4)
        assert not thread.is_alive(), "the socket was left open"
        assert "given up" in desk.service.events_after(LOCAL_TENANT, job.id, 0)[-1].data["message"]


def test_a_resolver_that_hangs_is_not_waited_for(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    # No name server of the tests could be made to hang without touching the system's configuration.
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(10) and [])
    _ended_job(desk, "http://receiver.example/")
    started = time.monotonic()
    assert deliver_due(_sender(desk, timeout_s=0.3)) == 0
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
        assert deliver_due(_sender(desk, timeout_s=0.4)) == 0
        assert time.monotonic() - started < 3
        thread.join()


def _ended_jobs(desk: Desk, count: int, url: str, tenant_id: str = LOCAL_TENANT) -> None:
    """Rows of jobs that have ended and whose webhook is due, as the release before leaves them."""
    model = desk.add_model(tenant_id)
    with desk.db.write() as uow:
        uow.session.add_all(
            Job(
                id=new_id("job"),
                tenant_id=tenant_id,
                model_id=model.id,
                status="succeeded",
                spec={},
                queue="anneal.cpu",
                correlation_id="t",
                webhook_url=url,
                finished_at=utcnow(),
            )
            for _ in range(count)
        )


def _add_tenant(desk: Desk, tenant_id: str) -> str:
    with desk.db.write() as uow:
        uow.session.add(Tenant(id=tenant_id, name=tenant_id))
    return tenant_id


def _attempts(desk: Desk) -> Counter[int]:
    with desk.db.read() as session:
        return Counter(delivery.attempts for delivery in session.query(WebhookDelivery))


def test_a_silent_receiver_holds_up_its_own_webhooks_only(desk: Desk, silent: Silent, receiver: Receiver) -> None:
    """Each attempt at it lasts for a minute. Another tenant's goes out meanwhile, and the same tenant's to another
    receiver."""
    _ended_jobs(desk, 40, silent.url)
    _ended_jobs(desk, 1, receiver.url)
    _ended_jobs(desk, 1, receiver.url, _add_tenant(desk, "tnt_other"))
    with delivering(_sender(desk, timeout_s=60)):
        assert eventually(lambda: len(receiver.requests) == 2)
        assert eventually(lambda: silent.connections == places.OF_A_RECEIVER)
        time.sleep(0.3)
        assert silent.connections == places.OF_A_RECEIVER
        _ended_jobs(desk, 1, receiver.url, "tnt_other")
        assert eventually(lambda: len(receiver.requests) == 3), "one that comes later, too"
        silent.close()  # what hangs fails: those threads are not left behind


def test_a_tenant_with_many_silent_receivers_holds_up_its_own_webhooks_only(desk: Desk, receiver: Receiver) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(contextlib.closing(Silent())) for _ in range(places.PLACES)]
        for one in silent:
            _ended_jobs(desk, 2, one.url)
        _ended_jobs(desk, 3, receiver.url, _add_tenant(desk, "tnt_other"))
        with delivering(_sender(desk, timeout_s=60)):
            assert eventually(lambda: len(receiver.requests) == 3)
            assert sum(one.connections for one in silent) <= places.OF_A_TENANT
            stack.close()


def test_tenants_take_turns_at_a_receiver_that_both_use(
    desk: Desk, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "OF_A_RECEIVER", 1)
    _ended_jobs(desk, 10, receiver.url)
    _ended_jobs(desk, 3, receiver.url, _add_tenant(desk, "tnt_other"))
    with delivering(_sender(desk)):
        assert eventually(lambda: len(receiver.requests) == 13)
    with desk.db.read() as session:
        deliveries = session.query(WebhookDelivery).order_by(WebhookDelivery.delivered_at).all()
    turns = [delivery.tenant_id for delivery in deliveries]
    assert turns[:6].count("tnt_other") == 3, turns


def test_several_processes_never_make_two_attempts_at_once(
    desk: Desk, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an attempt lasts longer than the pause that follows it."""
    monkeypatch.setattr(sending, "_FIRST_PAUSE_S", 0.05)
    receiver.takes_s = 0.3
    _ended_jobs(desk, 12, receiver.url)
    url = desk.db.engine.url.render_as_string(hide_password=False)
    others = [Database(make_engine(url)) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for db in others:
            stack.callback(db.close)
        for db in others:
            stack.enter_context(delivering(WebhookSender(db, Settings())))
        assert eventually(lambda: len(receiver.requests) >= 12)
        time.sleep(0.5)
    told = Counter(json.loads(body)["job"]["id"] for _, body in receiver.requests)
    assert (len(told), set(told.values())) == (12, {1})
    assert _attempts(desk) == {1: 12}


def test_the_pause_begins_when_the_attempt_has_failed(
    desk: Desk, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "_FIRST_PAUSE_S", 0.2)
    receiver.status = 500
    _ended_jobs(desk, 1, receiver.url)
    with delivering(_sender(desk)):
        assert eventually(lambda: len(receiver.requests) == 3), "long before the first attempt's lease would be over"
        time.sleep(1)
        assert len(receiver.requests) == 3, "0.2 s, 0.8 s, 3.2 s"
