"""A receiver tells the service's messages from others', as the service signs them; also those of services that only
signed the body."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time

import pytest

from anneal_client import AnnealError, SignatureMismatch, verify_webhook
from app.db.base import utcnow
from app.jobs.schemas import JobEnded
from app.settings import Settings
from app.webhooks.signing import key_of, new_secret, signature, signed, signed_as_before
from app.webhooks.transport import WebhookTransport
from tests.factories.webhooks import receiving

BODY = JobEnded.sample(utcnow()).to_json()
OLD_BODY = (
    b'{"type": "job.succeeded", "job": {"id": "job_1", "status": "succeeded", "engine_ids": ["eng_1"], "error": null}}'
)
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NOW = 1_764_000_000


def test_the_signature_of_the_specification() -> None:
    """The vector that the libraries of Standard Webhooks are tested by."""
    body = b'{"test": 2432232314}'
    made = signature(key_of(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_secrets_are_long_and_their_own() -> None:
    secrets = {new_secret() for _ in range(20)}
    assert len(secrets) == 20
    assert {len(key_of(secret)) for secret in secrets} == {32}
    assert key_of("whsec_no Base64") == b"whsec_no Base64", "an operator's, as it is"


@pytest.fixture
def received() -> tuple[dict[str, str], bytes]:
    """Headers and body as they came from the service's own transport."""
    headers = signed("msg_1", int(time.time()), BODY, ["s3cret"])
    with receiving() as receiver:
        assert WebhookTransport(Settings()).post(receiver.url, BODY, headers | signed_as_before("s3cret", BODY)) == 200
    return receiver.requests[0]


def test_a_message_of_the_service(received: tuple[dict[str, str], bytes]) -> None:
    headers, body = received
    ended = verify_webhook(body, headers, "s3cret")
    assert (ended.type, ended.job.id, ended.job.engine_ids) == ("webhook.test", "job_test", ["eng_test"])
    assert verify_webhook(body, {k.title(): v for k, v in headers.items()}, ["new", "s3cret"]) == ended


def test_messages_of_others(received: tuple[dict[str, str], bytes]) -> None:
    headers, body = received
    for changed, told, secret in (
        (body.replace(b"succeeded", b"cancelled"), headers, "s3cret"),
        (body, headers, "other"),
        (body, {}, "s3cret"),
        (body, headers | {"webhook-id": "msg_2"}, "s3cret"),
        (body, headers | {"webhook-id": ""}, "s3cret"),
        (body, headers | {"webhook-timestamp": str(int(headers["webhook-timestamp"]) + 1)}, "s3cret"),
        (body, headers | {"webhook-signature": "v1,\xfc v1, ,\udc80"}, "s3cret"),
        (body, headers | {"webhook-signature": headers["webhook-signature"].replace("v1,", "v2,")}, "s3cret"),
        (OLD_BODY, {"X-Anneal-Signature": "sha256=\xfc"}, "s3cret"),
    ):
        with pytest.raises(SignatureMismatch) as caught:
            verify_webhook(changed, told, secret)
        assert caught.value.code == "signature_mismatch"
    for nothing in ("", [], ["s3cret", ""]):
        with pytest.raises(ValueError, match="empty secret"):
            verify_webhook(body, headers, nothing)


def test_what_was_recorded_cannot_be_sent_again_later() -> None:
    headers = signed("msg_1", NOW, BODY, [SECRET])
    for now in (NOW - 300, NOW, NOW + 300):
        assert verify_webhook(BODY, headers, SECRET, now=now).job.id == "job_test"
    for now in (NOW - 301, NOW + 301):
        with pytest.raises(SignatureMismatch, match="more than 300 s"):
            verify_webhook(BODY, headers, SECRET, now=now)
    assert verify_webhook(BODY, headers, SECRET, now=NOW + 3000, tolerance_s=3600)


@pytest.mark.parametrize("timestamp", ["", "soon", "1e9", "-5", "\u0661\u0662", "9" * 400])
def test_times_that_are_none(timestamp: str) -> None:
    content = f"msg_1.{timestamp}.".encode() + BODY
    made = "v1," + base64.b64encode(hmac.new(key_of(SECRET), content, hashlib.sha256).digest()).decode()
    headers = {"webhook-id": "msg_1", "webhook-timestamp": timestamp, "webhook-signature": made}
    with pytest.raises(SignatureMismatch):
        verify_webhook(BODY, headers, SECRET)


def test_whoever_takes_the_time_away_is_found_out(received: tuple[dict[str, str], bytes]) -> None:
    """The signature that is still sent for receivers of before would verify for ever."""
    headers, body = received
    left = {name: value for name, value in headers.items() if not name.startswith("webhook-")}
    with pytest.raises(SignatureMismatch, match="has no webhook-signature"):
        verify_webhook(body, left, "s3cret")


def test_one_secret_replaces_another() -> None:
    old, new = new_secret(), new_secret()
    both = signed("msg_1", NOW, BODY, [new, old])
    assert len(both["webhook-signature"].split(" ")) == 2
    for secret in (old, new, [new, old]):
        assert verify_webhook(BODY, both, secret, now=NOW).job.id == "job_test"
    with pytest.raises(SignatureMismatch):
        verify_webhook(BODY, signed("msg_1", NOW, BODY, [new]), old, now=NOW)


def test_messages_of_a_service_of_before() -> None:
    headers = {**signed_as_before("s3cret", OLD_BODY), "X-Anneal-Delivery": "job_1-1"}
    ended = verify_webhook(OLD_BODY, headers, "s3cret")
    assert (ended.type, ended.job.id, ended.job.engine_ids) == ("job.succeeded", "job_1", ["eng_1"])
    with pytest.raises(SignatureMismatch):
        verify_webhook(OLD_BODY, signed_as_before(SECRET, OLD_BODY), SECRET)  # an endpoint's never signed so


def test_a_signed_body_that_is_no_message() -> None:
    for body in (b"", b"[]", b'{"job": 1}', b"\xff"):
        for headers in (signed("msg_1", NOW, body, ["k"]), signed_as_before("k", body)):
            with pytest.raises(AnnealError, match="invalid_webhook"):
                verify_webhook(body, headers, "k", now=NOW)
