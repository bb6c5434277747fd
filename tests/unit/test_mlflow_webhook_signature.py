"""Webhooks of MLflow: what it signs is taken, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

import pytest

from anneal_client.mlflow.signature import NotUnderstood, NotVerified, verified

SECRET, NOW = "s3cret", 1_700_000_000
EVENT = {"entity": "model_version", "action": "created", "timestamp": "…", "data": {"name": "m", "version": "3"}}


def request(body: bytes, *, secret: str = SECRET, timestamp: str = str(NOW), **other: str) -> dict[str, str]:
    """Headers as MLflow's documentation tells to make them."""
    content = b"%s.%s.%s" % (b"d-1", timestamp.encode(), body)
    signature = base64.b64encode(hmac.new(secret.encode(), content, hashlib.sha256).digest()).decode()
    headers = {"X-MLflow-Signature": f"v1,{signature}", "X-MLflow-Timestamp": timestamp, "X-MLflow-Delivery-Id": "d-1"}
    return {**headers, **other}


def test_an_event_of_mlflow_is_understood() -> None:
    body = json.dumps(EVENT, ensure_ascii=False).encode()
    delivery = verified(SECRET, request(body), body, now=NOW + 10)
    assert (delivery.id, delivery.event, delivery.data) == (
        "d-1",
        "model_version.created",
        {"name": "m", "version": "3"},
    )
    lower = {name.lower(): value for name, value in request(body).items()}
    assert verified(SECRET, lower, body, now=NOW) == delivery


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"secret": "another"}, "signature"),
        ({"timestamp": str(NOW - 301)}, "too far"),
        ({"timestamp": str(NOW + 301)}, "too far"),
        ({"timestamp": "1e9"}, "not a Unix time"),
        ({"X-MLflow-Signature": "v1,AAAA"}, "signature"),
        ({"X-MLflow-Signature": "ä"}, "signature"),
        ({"X-MLflow-Delivery-Id": "d-2"}, "signature"),
        ({"X-MLflow-Timestamp": str(NOW + 1)}, "signature"),
    ],
)
def test_what_mlflow_did_not_sign_is_refused(changed: dict[str, str], why: str) -> None:
    body = json.dumps(EVENT).encode()
    with pytest.raises(NotVerified, match=why):
        verified(SECRET, request(body, **changed), body, now=NOW)


def test_another_body_and_a_missing_header_are_refused() -> None:
    body = json.dumps(EVENT).encode()
    with pytest.raises(NotVerified, match="signature"):
        verified(SECRET, request(body), body.replace(b'"3"', b'"4"'), now=NOW)
    for name in request(body):
        headers = {n: v for n, v in request(body).items() if n != name}
        with pytest.raises(NotVerified, match=f"{name.lower()} is missing"):
            verified(SECRET, headers, body, now=NOW)
    with pytest.raises(ValueError, match="empty secret"):
        verified("", request(body, secret=""), body, now=NOW)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"\xff", b'{"entity": "a", "action": "b", "data": 1}'])
def test_what_is_no_event_is_told_so(body: bytes) -> None:
    with pytest.raises(NotUnderstood):
        verified(SECRET, request(body), body, now=NOW)
