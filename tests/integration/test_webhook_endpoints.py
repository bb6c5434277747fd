"""Webhook endpoints: told of what they asked for, signed by their own secrets, by receivers of every kind, whatever
dies; on both databases."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, update
from standardwebhooks import Webhook, WebhookVerificationError

from anneal_client import SignatureMismatch, verify_webhook
from app.blobs.collector import Collector
from app.db.base import utcnow
from app.db.orm import LOCAL_TENANT, Job, Tenant
from app.db.webhooks import WebhookDelivery, WebhookEndpoint
from app.domain.job_state import JobStatus, Trigger
from app.domain.spec import OptimizationSpec
from app.jobs.repository import JobRepository
from app.settings import CollectorSettings, Settings, WebhookSettings
from app.webhooks import sender as sending
from app.webhooks.outbox import take_over, tell_late
from app.webhooks.schemas import WebhookEndpointChange, WebhookEndpointIn
from app.webhooks.sender import WebhookSender
from app.webhooks.service import WebhookService
from app.webhooks.signing import secrets_of
from tests.factories.webhooks import (
    Receiver,
    Silent,
    deliver_due,
    delivering,
    eventually,
    receiving,
    unruly,
)
from tests.integration.conftest import Desk


@pytest.fixture
def webhooks(desk: Desk) -> WebhookService:
    return WebhookService(desk.db, Settings())


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


def _sender(desk: Desk, **options: Any) -> WebhookSender:
    return WebhookSender(desk.db, Settings(webhooks=WebhookSettings(allow_private=True, **options)))


def _endpoint(webhooks: WebhookService, url: str, tenant_id: str = LOCAL_TENANT, **options: Any) -> WebhookEndpoint:
    return webhooks.create(tenant_id, WebhookEndpointIn(url=url, **options), None)[0]


def _cancelled(desk: Desk, url: str | None = None) -> Job:
    """A job that has ended by the way of every job."""
    body: dict[str, Any] = {"model_id": desk.add_model().id, "webhook": {"url": url} if url else None}
    spec = OptimizationSpec.model_validate(body)
    job, _ = desk.service.submit(LOCAL_TENANT, spec, correlation_id="t", idempotency=None)
    return desk.service.cancel(LOCAL_TENANT, job.id)


def _failed(desk: Desk) -> Job:
    job = desk.submit()
    claim = desk.claim(job)
    assert claim is not None
    desk.ledger.fail(claim, {"code": "x", "detail": "d"}, {})
    return desk.job(job.id)


def _rows(desk: Desk) -> list[WebhookDelivery]:
    with desk.db.read() as session:
        return [*session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.id))]


def _row(desk: Desk) -> WebhookDelivery:
    (found,) = _rows(desk)
    return found


def _pass_time(desk: Desk, **columns: Any) -> None:
    """As if what waits had waited: due, and with no attempt under way."""
    values = {"due_at": utcnow(), "lease_expires_at": None, **columns}
    with desk.db.write() as uow:
        uow.session.execute(update(WebhookDelivery).where(WebhookDelivery.due_at.is_not(None)).values(**values))


def test_endpoints_are_told_of_what_they_asked_for(desk: Desk, webhooks: WebhookService, receiver: Receiver) -> None:
    with desk.db.write() as uow:
        uow.session.add(Tenant(id="tnt_other", name="other"))
    everything = _endpoint(webhooks, receiver.url)
    failures = _endpoint(webhooks, receiver.url, events=["job.failed"])
    _endpoint(webhooks, receiver.url, "tnt_other")
    webhooks.delete(LOCAL_TENANT, _endpoint(webhooks, receiver.url).id)
    off = _endpoint(webhooks, receiver.url)
    webhooks.change(LOCAL_TENANT, off.id, WebhookEndpointChange(enabled=False))
    cancelled, failed = _cancelled(desk, receiver.url), _failed(desk)
    told = {(row.endpoint_id, row.job_id, row.event) for row in _rows(desk)}
    assert told == {
        (everything.id, cancelled.id, "job.cancelled"),
        (None, cancelled.id, "job.cancelled"),
        (everything.id, failed.id, "job.failed"),
        (failures.id, failed.id, "job.failed"),
    }
    assert deliver_due(_sender(desk)) == 4
    assert {row.status for row in _rows(desk)} == {"delivered"}
    secrets = {everything.id: everything.secret, failures.id: failures.secret}
    by_id = {row.id: row for row in _rows(desk)}
    for headers, body in receiver.requests:
        row = by_id[headers["webhook-id"]]
        assert headers["X-Anneal-Delivery"] == row.id
        assert "X-Anneal-Signature" not in headers
        if row.endpoint_id is not None:
            ended = verify_webhook(body, headers, secrets[row.endpoint_id])
            assert (ended.type, ended.job.id) == (row.event, row.job_id)
            others = [secret for owner, secret in secrets.items() if owner != row.endpoint_id]
            with pytest.raises(SignatureMismatch):
                verify_webhook(body, headers, others)


def test_a_delivery_is_written_with_the_end_or_not_at_all(desk: Desk, webhooks: WebhookService) -> None:
    _endpoint(webhooks, "http://127.0.0.1:9/")
    job = desk.submit()

    def end_and_fall() -> None:
        with desk.db.write() as uow:
            JobRepository(uow.session).apply(job.id, Trigger.CANCEL, source=JobStatus.QUEUED)
            assert uow.session.scalar(select(func.count()).select_from(WebhookDelivery)) == 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        end_and_fall()
    assert (desk.job(job.id).status, _rows(desk)) == ("queued", [])


def test_receivers_of_every_kind_get_it_in_the_end_under_one_id(desk: Desk, webhooks: WebhookService) -> None:
    """Refused, hung up on, redirected, failed, broken off; a body that breaks off is no matter: 2xx was answered."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refusing = f"http://127.0.0.1:{taken.getsockname()[1]}/"
    endpoint = _endpoint(webhooks, refusing)
    _cancelled(desk)
    sender = _sender(desk, timeout_s=0.2)
    assert deliver_due(sender) == 0
    first = _row(desk)
    assert (first.attempts, first.last_status) == (1, None)
    assert "refused" in (first.last_error or "")
    with unruly("hang", "cut", 302, 404, 500, "cut body") as receiver:
        webhooks.change(LOCAL_TENANT, endpoint.id, WebhookEndpointChange(url=receiver.url))
        seen = []
        for _ in range(5):
            assert deliver_due(sender) == 0, "it has to wait"
            _pass_time(desk)
            assert deliver_due(sender) == 0
            row = _row(desk)
            assert row.due_at is not None
            assert row.due_at > utcnow()
            seen.append(row.last_status)
        assert seen == [None, None, 302, 404, 500]
        with desk.db.read() as session:
            assert session.get_one(WebhookEndpoint, endpoint.id).failures == 6
        _pass_time(desk)
        assert deliver_due(sender) == 1
        assert receiver.ids == [first.id] * 6
        for headers, body in receiver.requests:
            verify_webhook(body, headers, endpoint.secret)
    done = _row(desk)
    assert (done.status, done.attempts, done.failures, done.last_status) == ("delivered", 7, 0, 200)
    assert (done.last_error, done.due_at, done.lease_expires_at) == (None, None, None)
    with desk.db.read() as session:
        again = session.get_one(WebhookEndpoint, endpoint.id)
    assert (again.failures, again.failing_since) == (0, None)


_SENDER = """
import sys, threading
from app.db.base import make_engine
from app.db.uow import Database
from app.settings import Settings, WebhookSettings
from app.webhooks.sender import WebhookSender

settings = Settings(webhooks=WebhookSettings(allow_private=True))
WebhookSender(Database(make_engine(sys.argv[1])), settings).run(threading.Event(), 0.05)
"""


def test_a_sender_that_is_killed_in_between_costs_an_attempt_and_no_message(
    desk: Desk, webhooks: WebhookService
) -> None:
    """Whether the receiver had it, nobody knows: it comes again, and tells by its id that it is the same."""
    endpoint = _endpoint(webhooks, "http://127.0.0.1:9/")
    url = desk.db.engine.url.render_as_string(hide_password=False)
    with unruly("hang", 200) as receiver:
        webhooks.change(LOCAL_TENANT, endpoint.id, WebhookEndpointChange(url=receiver.url))
        job = _cancelled(desk)
        process = subprocess.Popen([sys.executable, "-c", _SENDER, url])
        try:
            assert eventually(lambda: len(receiver.requests) == 1)
        finally:
            process.kill()
            process.wait()
        sender = _sender(desk)
        assert deliver_due(sender) == 0, "as long as the attempt could last, nobody makes another"
        lease = _row(desk).lease_expires_at
        assert lease is not None
        assert lease - utcnow() < timedelta(seconds=sender.transport.longest_s)
        _pass_time(desk)
        assert deliver_due(sender) == 1
        assert receiver.ids == [_row(desk).id] * 2
        told = [verify_webhook(body, headers, endpoint.secret) for headers, body in receiver.requests]
        assert [ended.job.id for ended in told] == [job.id] * 2
    assert _row(desk).attempts == 2


def test_a_late_note_of_an_attempt_that_was_given_on_counts_no_more(desk: Desk, webhooks: WebhookService) -> None:
    with unruly(500) as receiver:
        _endpoint(webhooks, receiver.url)
        _cancelled(desk)
        sender, late = _sender(desk), _row(desk)
        assert deliver_due(sender) == 0
        _pass_time(desk)
        assert deliver_due(sender) == 0
        before = _row(desk)
        sender._note(late, 200, None)
        assert (_row(desk).status, _row(desk).attempts) == (before.status, 2)


def test_one_that_fails_for_days_is_disabled_and_says_why(desk: Desk, webhooks: WebhookService) -> None:
    with unruly(500) as receiver:
        endpoint = _endpoint(webhooks, receiver.url)
        job = _cancelled(desk)
        sender = _sender(desk, max_attempts=50)
        outcomes: list[str] = []
        sender.told = outcomes.append
        for _ in range(sending._DISABLING):
            _pass_time(desk)
            assert deliver_due(sender) == 0
        assert webhooks.get(LOCAL_TENANT, endpoint.id).disabled_at is None, "not yet for days"
        with desk.db.write() as uow:
            uow.session.get_one(WebhookEndpoint, endpoint.id).failing_since = utcnow() - timedelta(days=4)
        _cancelled(desk)
        _pass_time(desk)
        deliver_due(sender)
        disabled = webhooks.get(LOCAL_TENANT, endpoint.id)
        assert disabled.disabled_at is not None
        assert "attempts since" in (disabled.disabled_reason or "")
        assert "it answered 500" in (disabled.disabled_reason or "")
        assert {(row.status, row.due_at) for row in _rows(desk)} == {("failed", None)}
        before = len(receiver.requests)
        _cancelled(desk)
        assert deliver_due(sender) == 0
        assert (len(_rows(desk)), len(receiver.requests)) == (2, before), "what happens meanwhile is not told"
        enabled = webhooks.change(LOCAL_TENANT, endpoint.id, WebhookEndpointChange(enabled=True))
        assert (enabled.disabled_at, enabled.disabled_reason, enabled.failing_since) == (None, None, None)
        receiver.behaviours[:] = [200]
        lost = next(row for row in _rows(desk) if row.job_id == job.id)
        webhooks.redeliver(LOCAL_TENANT, lost.id)
        assert deliver_due(sender) == 1
        assert receiver.ids[-1] == receiver.ids[0] == lost.id
    assert set(outcomes[:-1]) == {"failed"}
    assert outcomes[-1] == "delivered"


def test_one_that_is_gone_is_disabled_at_once(desk: Desk, webhooks: WebhookService) -> None:
    with unruly(410) as receiver:
        endpoint = _endpoint(webhooks, receiver.url)
        _cancelled(desk)
        assert deliver_due(_sender(desk)) == 0
    found = webhooks.get(LOCAL_TENANT, endpoint.id)
    assert found.disabled_reason == "It answered 410 Gone."
    assert (_row(desk).status, _row(desk).last_status) == ("failed", 410)


def test_what_waits_for_an_endpoint_goes_with_it(desk: Desk, webhooks: WebhookService, receiver: Receiver) -> None:
    endpoint = _endpoint(webhooks, receiver.url)
    _cancelled(desk)
    webhooks.delete(LOCAL_TENANT, endpoint.id)
    assert (_row(desk).status, _row(desk).last_error) == ("failed", "The endpoint was deleted.")
    # Written while it was being deleted:
    with desk.db.write() as uow:
        uow.session.execute(update(WebhookDelivery).values(status="pending", due_at=utcnow()))
    assert deliver_due(_sender(desk)) == 0
    assert receiver.requests == []
    assert (_row(desk).status, _row(desk).due_at) == ("failed", None)


def test_an_attempt_under_way_does_not_bring_back_what_was_dropped(desk: Desk, webhooks: WebhookService) -> None:
    with contextlib.closing(Silent()) as silent:
        endpoint = _endpoint(webhooks, silent.url)
        _cancelled(desk)
        with delivering(_sender(desk, timeout_s=60)):
            assert eventually(lambda: silent.connections == 1)
            webhooks.delete(LOCAL_TENANT, endpoint.id)
            silent.close()
            time.sleep(0.2)
    assert (_row(desk).status, _row(desk).due_at) == ("failed", None)


def test_secrets_change_over(desk: Desk, webhooks: WebhookService, receiver: Receiver) -> None:
    old = _endpoint(webhooks, receiver.url)
    new = webhooks.rotate(LOCAL_TENANT, old.id, 3600)
    assert new.secret != old.secret
    _cancelled(desk)
    assert deliver_due(_sender(desk)) == 1
    ((headers, body),) = receiver.requests
    for secret in (old.secret, new.secret):
        verify_webhook(body, headers, secret)
        told = Webhook(secret).verify(body, {k.lower(): v for k, v in headers.items()})  # a library of others
        assert told["type"] == "job.cancelled"
    with pytest.raises(WebhookVerificationError):
        Webhook(new.secret).verify(body + b" ", {k.lower(): v for k, v in headers.items()})
    now = utcnow()
    found = webhooks.get(LOCAL_TENANT, old.id)
    assert secrets_of(found, now) == [new.secret, old.secret]
    assert secrets_of(found, now + timedelta(seconds=3601)) == [new.secret]
    newest = webhooks.rotate(LOCAL_TENANT, old.id, 60)
    assert secrets_of(newest, now) == [newest.secret, new.secret, old.secret], "an answer that was lost breaks nothing"
    last = webhooks.rotate(LOCAL_TENANT, old.id, 0)
    assert secrets_of(webhooks.get(LOCAL_TENANT, old.id), now) == [last.secret], "others know those of before"


def test_again_and_again_on_demand(desk: Desk, webhooks: WebhookService, receiver: Receiver) -> None:
    job = _cancelled(desk, receiver.url)
    sender = _sender(desk, max_attempts=1)
    receiver.status = 500
    assert deliver_due(sender) == 0
    given_up = _row(desk)
    assert (given_up.status, given_up.due_at) == ("failed", None)
    assert "given up" in desk.service.events_after(LOCAL_TENANT, job.id, 0)[-1].data["message"]
    receiver.status = 200
    for attempts in (2, 3):
        assert webhooks.redeliver(LOCAL_TENANT, given_up.id).status == "pending"
        assert deliver_due(sender) == 1
        assert (_row(desk).status, _row(desk).attempts) == ("delivered", attempts)
    assert {headers["webhook-id"] for headers, _ in receiver.requests} == {given_up.id}
    assert "delivered" in desk.service.events_after(LOCAL_TENANT, job.id, 0)[-1].data["message"]


def test_what_the_release_before_leaves_is_taken_over_once(desk: Desk, receiver: Receiver) -> None:
    """Its workers end jobs without a delivery, and attempt their webhooks by the job's own columns."""
    waiting, attempted = _cancelled(desk, receiver.url), _cancelled(desk, receiver.url)
    with desk.db.write() as uow:
        uow.session.query(WebhookDelivery).delete()
        for job_id, columns in {
            waiting.id: {"webhook_attempts": 3, "webhook_due_at": utcnow()},
            attempted.id: {"webhook_attempts": 1, "webhook_due_at": utcnow() + timedelta(minutes=1)},
        }.items():
            values = {"webhook_done_at": None, **columns}
            uow.session.execute(update(Job).where(Job.id == job_id).values(**values))
    assert deliver_due(_sender(desk)) == 1
    (row,) = _rows(desk)
    assert (row.job_id, row.attempts) == (waiting.id, 4)
    assert desk.job(waiting.id).webhook_done_at is not None, "nothing more to be done about it by the release before"
    assert desk.job(attempted.id).webhook_done_at is None, "it attempts this one at this moment"
    with desk.db.write() as uow:
        assert not take_over(uow.session, attempted.id, 0), "attempted meanwhile"
    with desk.db.write() as uow:
        assert not take_over(uow.session, waiting.id, 3)
    assert len(_rows(desk)) == 1


def test_what_a_worker_of_the_release_before_ends_is_told_to_endpoints_once(
    desk: Desk, webhooks: WebhookService, receiver: Receiver
) -> None:
    """It knows of none. Those that came after the end do not hear of it."""
    _endpoint(webhooks, receiver.url)
    job, long_ended = _cancelled(desk), _cancelled(desk)
    with desk.db.write() as uow:
        uow.session.query(WebhookDelivery).delete()
        uow.session.execute(update(Job).values(told=False))
        before = {"finished_at": utcnow() - timedelta(days=1)}
        uow.session.execute(update(Job).where(Job.id == long_ended.id).values(**before))
    active = desk.submit()
    sender = _sender(desk)
    assert deliver_due(sender) == 1
    assert [row.job_id for row in _rows(desk)] == [job.id]
    assert desk.job(job.id).told
    assert desk.job(long_ended.id).told
    assert not desk.job(active.id).told
    with desk.db.write() as uow:
        tell_late(uow.session, job.id)
        tell_late(uow.session, active.id)
    assert deliver_due(sender) == 0
    assert len(receiver.requests) == 1


def test_old_deliveries_and_deleted_endpoints_are_collected(desk: Desk, webhooks: WebhookService) -> None:
    kept, gone = _endpoint(webhooks, "http://127.0.0.1:9/"), _endpoint(webhooks, "http://127.0.0.1:9/")
    for _ in range(2):
        _cancelled(desk)
    webhooks.delete(LOCAL_TENANT, gone.id)
    old = utcnow() - timedelta(days=33)
    waits = next(row for row in _rows(desk) if row.endpoint_id == kept.id)
    with desk.db.write() as uow:
        uow.session.execute(update(WebhookDelivery).values(created_at=old))
        uow.session.execute(update(WebhookEndpoint).where(WebhookEndpoint.id == gone.id).values(deleted_at=old))
        done = update(WebhookDelivery).where(WebhookDelivery.id != waits.id)
        uow.session.execute(done.values(due_at=None, status="delivered"))
    settings = Settings(collector=CollectorSettings(grace_s=0))
    counts = Collector(desk.db, desk.content, settings).collect()
    assert (counts["webhook_deliveries"], counts["webhook_endpoints"]) == (3, 1)
    assert _row(desk).id == waits.id, "what has yet to be delivered stays"
    assert [endpoint.id for endpoint in webhooks.page(LOCAL_TENANT, limit=50, before=None)] == [kept.id]


@pytest.mark.parametrize(
    "addresses",
    [["169.254.169.254"], ["::ffff:169.254.169.254"], ["10.0.0.1", "127.0.0.1"], ["fd00:ec2::254"]],
)
def test_names_that_lead_to_a_clouds_metadata_or_inside_are_not_followed(
    desk: Desk, webhooks: WebhookService, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    # No name server of the tests can be told what to answer without touching the system's configuration.
    _endpoint(webhooks, "http://metadata.example/latest/")
    _cancelled(desk)
    connected: list[Any] = []
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in addresses]
    monkeypatch.setattr("app.webhooks.transport.socket.getaddrinfo", lambda *_, **__: answers)
    monkeypatch.setattr("app.webhooks.transport.socket.create_connection", lambda *a, **_: connected.append(a))
    assert deliver_due(WebhookSender(desk.db, Settings(webhooks=WebhookSettings(allow_private=False)))) == 0
    assert connected == []
    assert "no address that webhooks may reach" in (_row(desk).last_error or "")


def test_a_name_that_changes_after_it_was_looked_at_is_not_asked_again(
    desk: Desk, webhooks: WebhookService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the address that was checked is the one that is connected to."""
    _endpoint(webhooks, "http://rebinding.example/")
    _cancelled(desk)
    asked: list[str] = []
    connected: list[str] = []

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        address = "93.184.216.34" if len(asked) == 1 else "169.254.169.254"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))]

    def connect(address: tuple[str, int], **_: Any) -> socket.socket:
        connected.append(address[0])
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr("app.webhooks.transport.socket.getaddrinfo", resolve)
    monkeypatch.setattr("app.webhooks.transport.socket.create_connection", connect)
    assert deliver_due(WebhookSender(desk.db, Settings(webhooks=WebhookSettings(allow_private=False)))) == 0
    assert (asked, connected) == (["rebinding.example"], ["93.184.216.34"])


def test_pauses_grow_for_about_a_day_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    most = WebhookSettings().max_attempts
    lengths = [sum(sending._pause_s(n) for n in range(1, most)) / 3600 for _ in range(20)]
    assert all(18 < hours < 33 for hours in lengths)
    assert len({round(hours, 6) for hours in lengths}) > 1
    assert all(4 <= sending._pause_s(1) <= 6 for _ in range(20))


def test_a_test_is_a_message_like_any(desk: Desk, webhooks: WebhookService, receiver: Receiver) -> None:
    endpoint = _endpoint(webhooks, receiver.url, events=["job.failed"])
    first = webhooks.test(LOCAL_TENANT, endpoint.id)
    assert webhooks.test(LOCAL_TENANT, endpoint.id).id == first.id, "one at a time"
    assert deliver_due(_sender(desk)) == 1
    ((headers, body),) = receiver.requests
    ended = verify_webhook(body, headers, endpoint.secret)
    assert (headers["webhook-id"], ended.type, ended.job.id) == (first.id, "webhook.test", "job_test")
    assert json.loads(body)["timestamp"]
