"""A receiver tells the service's messages from others', as the service signs them."""

from __future__ import annotations

import pytest

from anneal_client import AnnealError, SignatureMismatch, verify_webhook
from app.jobs.webhook_transport import WebhookTransport
from app.settings import Settings
from tests.factories.webhooks import receiving

BODY = (
    b'{"type": "job.succeeded", "job": {"id": "job_1", "status": "succeeded", "engine_ids": ["eng_1"], "error": null}}'
)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, str], bytes]:
    """Headers and body as they came from the service's own transport."""
    monkeypatch.setenv("WEBHOOK_SECRET", "s3cret")
    with receiving() as receiver:
        WebhookTransport(Settings()).post(receiver.url, BODY, {"X-Anneal-Delivery": "d1"})
    return receiver.requests[0]


def test_a_message_of_the_service(received: tuple[dict[str, str], bytes]) -> None:
    headers, body = received
    ended = verify_webhook(body, headers, "s3cret")
    assert (ended.type, ended.job.id, ended.job.engine_ids) == ("job.succeeded", "job_1", ["eng_1"])
    assert verify_webhook(body, {k.lower(): v for k, v in headers.items()}, ["new", "s3cret"]) == ended


def test_messages_of_others(received: tuple[dict[str, str], bytes]) -> None:
    headers, body = received
    for changed, told, secret in (
        (body.replace(b"succeeded", b"cancelled"), headers, "s3cret"),
        (body, headers, "other"),
        (body, {}, "s3cret"),
        (body, {"X-Anneal-Signature": "sha256=ü"}, "s3cret"),
    ):
        with pytest.raises(SignatureMismatch) as caught:
            verify_webhook(changed, told, secret)
        assert caught.value.code == "signature_mismatch"
    for nothing in ("", [], ["s3cret", ""]):
        with pytest.raises(ValueError, match="empty secret"):
            verify_webhook(body, headers, nothing)


def test_a_signed_body_that_is_no_message() -> None:
    import hashlib
    import hmac

    for body in (b"", b"[]", b'{"job": 1}', b"\xff"):
        signature = "sha256=" + hmac.new(b"k", body, hashlib.sha256).hexdigest()
        with pytest.raises(AnnealError, match="invalid_webhook"):
            verify_webhook(body, {"X-Anneal-Signature": signature}, "k")
