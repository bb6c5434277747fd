"""`/v1/webhooks` and `/v1/deliveries`: their documents, their errors, and that they are their tenant's alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from anneal_client import Client, NotFound, verify_webhook
from app.http.services import Services
from app.main import create_app
from app.settings import Settings, WebhookSettings
from app.tenants import create_key
from app.webhooks.sender import WebhookSender
from tests.api.conftest import assert_problem, serving
from tests.api.test_pages import HTML, token_in
from tests.factories.webhooks import Receiver, deliver_due, receiving

URL = "https://hooks.example/anneal"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


def _sender(services: Services) -> WebhookSender:
    return WebhookSender(services.db, Settings(webhooks=WebhookSettings(allow_private=True)))


def _made(client: httpx.Client, url: str = URL, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/webhooks", json={"url": url, **fields})
    assert response.status_code == 201, response.text
    document: dict[str, Any] = response.json()
    return document


def test_an_endpoint_from_its_beginning_to_its_end(client: httpx.Client) -> None:
    response = client.post("/v1/webhooks", json={"url": URL, "events": ["job.failed", "job.failed"]})
    made = response.json()
    assert response.headers["location"] == made["links"]["self"] == f"/v1/webhooks/{made['id']}"
    assert response.headers["cache-control"] == "no-store"
    assert made["secret"].startswith("whsec_")
    assert (made["url"], made["events"], made["enabled"]) == (URL, ["job.failed"], True)
    shown = {name: value for name, value in made.items() if name != "secret"}
    assert client.get(made["links"]["self"]).json() == shown, "the secret is shown once"
    assert client.get("/v1/webhooks").json() == {"items": [shown], "next_cursor": None}

    changed = client.patch(made["links"]["self"], json={"description": "ops", "events": None, "enabled": False}).json()
    assert (changed["description"], changed["events"], changed["enabled"]) == ("ops", None, False)
    assert (changed["url"], changed["disabled_reason"]) == (URL, None)
    assert changed["disabled_at"]
    disabled = assert_problem(client.post(made["links"]["test"]), 409, "webhook_disabled")
    assert "PATCH" in disabled["remedy"]
    assert client.patch(made["links"]["self"], json={"enabled": True}).json()["enabled"] is True
    assert client.patch(made["links"]["self"], json={}).json()["description"] == "ops"

    rotated = client.post(made["links"]["rotate"]).json()
    assert rotated["secret"] != made["secret"]
    assert rotated["previous_secret_until"]
    assert client.post(made["links"]["rotate"], json={"overlap_seconds": 0}).json()["previous_secret_until"] is None

    assert client.delete(made["links"]["self"]).status_code == 204
    for call in (client.get, client.delete):
        assert_problem(call(made["links"]["self"]), 404, "not_found")
    assert client.get("/v1/webhooks").json()["items"] == []
    done = [e["action"] for e in client.get("/v1/audit").json()["items"] if e["resource"] == made["id"]]
    assert done[::-1] == [f"webhook.{what}" for what in ("create", "change", "change", "rotate", "rotate", "delete")]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/body/url"),
        ({"url": "ftp://a/"}, "/body/url"),
        ({"url": "http://x:99999/"}, "/body/url"),
        ({"url": "http://[fe80::1%25eth0]/"}, "/body/url"),
        ({"url": URL + "x" * 2048}, "/body/url"),
        ({"url": URL, "events": []}, "/body/events"),
        ({"url": URL, "events": ["job.started"]}, "/body/events/0"),
        ({"url": URL, "description": "a\u0000"}, "/body/description"),
        ({"url": URL, "secret": "mine"}, "/body/secret"),
    ],
)
def test_what_is_refused(client: httpx.Client, body: dict[str, Any], pointer: str) -> None:
    problem = assert_problem(client.post("/v1/webhooks", json=body), 422, "invalid_request")
    assert problem["errors"][0]["pointer"] == pointer
    assert client.get("/v1/webhooks").json()["items"] == []


def test_changes_that_are_refused(client: httpx.Client) -> None:
    made = _made(client)
    path = made["links"]["self"]
    for body in ({"url": "file:///etc/passwd"}, {"events": []}, {"enabled": "perhaps"}, {"id": "whk_1"}):
        assert_problem(client.patch(path, json=body), 422, "invalid_request")
    for seconds in (-1, 1e9, "soon"):
        body = {"overlap_seconds": seconds}
        assert_problem(client.post(made["links"]["rotate"], json=body), 422, "invalid_request")
    assert client.get(path).json() == {name: value for name, value in made.items() if name != "secret"}


def test_the_same_request_again_makes_no_other_and_tells_no_secret(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = client.post("/v1/webhooks", json={"url": URL}, headers=headers).json()
    again = client.post("/v1/webhooks", json={"url": URL}, headers=headers)
    assert (again.json()["id"], again.json()["secret"]) == (first["id"], None)
    assert again.headers["idempotency-replayed"] == "true"
    other = client.post("/v1/webhooks", json={"url": URL + "2"}, headers=headers)
    assert_problem(other, 409, "idempotency_conflict")
    client.delete(first["links"]["self"])
    assert_problem(client.post("/v1/webhooks", json={"url": URL}, headers=headers), 409, "idempotency_resource_gone")


def test_no_more_than_so_many(client: httpx.Client) -> None:
    for _ in range(WebhookSettings().endpoints_per_tenant):
        made = _made(client)
    assert_problem(client.post("/v1/webhooks", json={"url": URL}), 409, "too_many_webhooks")
    client.delete(made["links"]["self"])
    _made(client)


def test_deliveries_and_redelivery(
    client: httpx.Client, services: Services, job: dict[str, Any], receiver: Receiver
) -> None:
    hook = _made(client, receiver.url)
    tested = client.post(hook["links"]["test"])
    assert tested.status_code == 202
    assert tested.json()["payload"]["type"] == "webhook.test"
    client.post(job["links"]["cancel"])
    receiver.status = 500
    assert deliver_due(_sender(services)) == 0
    listed = client.get(hook["links"]["deliveries"]).json()["items"]
    assert [(d["event"], d["status"], d["attempts"]) for d in listed] == [
        ("job.cancelled", "pending", 1),
        ("webhook.test", "pending", 1),
    ]
    ended = listed[0]
    assert (ended["last_status"], ended["last_error"]) == (500, "it answered 500")
    assert (ended["webhook_id"], ended["job_id"]) == (hook["id"], job["id"])
    assert ended["next_attempt_at"] > ended["last_attempt_at"]
    assert "payload" not in ended
    whole = client.get(ended["links"]["self"]).json()
    assert whole["payload"]["job"]["id"] == job["id"]

    receiver.status = 200
    again = client.post(ended["links"]["redeliver"])
    assert (again.status_code, again.json()["status"]) == (202, "pending")
    assert deliver_due(_sender(services)) == 1
    headers, body = receiver.requests[-1]
    assert headers["webhook-id"] == ended["id"]
    assert verify_webhook(body, headers, hook["secret"]).job.id == job["id"]
    delivered = client.get("/v1/deliveries", params={"status": "delivered"}).json()["items"]
    assert [d["id"] for d in delivered] == [ended["id"]]
    assert client.get("/v1/deliveries", params={"job_id": job["id"]}).json()["items"] == delivered
    first = client.get("/v1/deliveries", params={"limit": 1, "webhook_id": hook["id"]}).json()
    rest = client.get("/v1/deliveries", params={"cursor": first["next_cursor"]}).json()
    assert [d["event"] for d in (*first["items"], *rest["items"])] == ["job.cancelled", "webhook.test"]

    client.delete(hook["links"]["self"])
    assert len(client.get("/v1/deliveries").json()["items"]) == 2, "they can be looked at still"
    assert_problem(client.get(hook["links"]["deliveries"]), 404, "not_found")
    assert_problem(client.post(ended["links"]["redeliver"]), 409, "webhook_deleted")
    assert_problem(client.get("/v1/deliveries?status=lost"), 422, "invalid_request")
    assert_problem(client.get("/v1/deliveries/msg_1"), 404, "not_found")


def test_what_is_another_tenants_is_not_there(settings: Settings) -> None:
    app = create_app(settings.model_copy(update={"require_keys": True}), dispatch=lambda job: True)
    with serving(app) as url:
        keys = {name: create_key(app.state.services.db, name, "k") for name in ("alice", "bob")}
        clients = {
            name: httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}) for name, key in keys.items()
        }
        with clients["alice"] as alice, clients["bob"] as bob:
            hook = _made(alice)
            delivery = alice.post(hook["links"]["test"]).json()
            path, message = hook["links"]["self"], delivery["links"]["self"]
            for method, at, body in (
                ("GET", path, None),
                ("PATCH", path, {"enabled": False}),
                ("DELETE", path, None),
                ("POST", f"{path}/rotate", None),
                ("POST", f"{path}/test", None),
                ("GET", f"{path}/deliveries", None),
                ("GET", message, None),
                ("POST", f"{message}/redeliver", None),
            ):
                theirs = bob.request(method, at, json=body)
                nobodys = bob.request(
                    method, at.replace(hook["id"], "whk_0").replace(delivery["id"], "msg_0"), json=body
                )
                assert_problem(theirs, 404, "not_found")
                assert (
                    theirs.json()["detail"].replace(hook["id"], "whk_0").replace(delivery["id"], "msg_0")
                    == (nobodys.json()["detail"])
                )
            for listed in ("/v1/webhooks", "/v1/deliveries", f"/v1/deliveries?webhook_id={hook['id']}"):
                assert bob.get(listed).json()["items"] == []
            assert alice.get(path).json()["enabled"] is True
            assert len(alice.get("/v1/deliveries").json()["items"]) == 1


def test_the_page_shows_them_and_sends_one_again(
    client: httpx.Client, services: Services, job: dict[str, Any], receiver: Receiver
) -> None:
    made = _made(client, f"{receiver.url}&<b>", description="<script>alert(1)</script>")
    client.post(job["links"]["cancel"])
    receiver.status = 500
    assert deliver_due(_sender(services)) == 0
    client.headers.update(HTML)
    page = client.get("/webhooks", params={"webhook_id": made["id"], "status": "pending"})
    assert "&lt;script&gt;alert(1)" in page.text
    assert "<b>" not in page.text.partition("<main")[2]
    assert made["secret"] not in page.text
    assert "it answered 500" in page.text
    (path,) = re.findall(r'action="(/webhooks/deliveries/msg_\w+/redeliver)"', page.text)
    assert client.post(path, data={"csrf": "0" * 64}).status_code == 403
    receiver.status = 200
    assert client.post(path, data={"csrf": token_in(page)}).headers["location"] == "/webhooks"
    assert deliver_due(_sender(services)) == 1
    assert "delivered</span>" in client.get("/webhooks").text


def test_by_the_client(base_url: str, services: Services, receiver: Receiver) -> None:
    with Client(base_url) as anneal:
        made = anneal.create_webhook(receiver.url, events=["job.failed"], description="ops")
        assert [hook.id for hook in anneal.webhooks()] == [made.id]
        test = anneal.test_webhook(made.id)
        assert deliver_due(_sender(services)) == 1
        (headers, body) = receiver.requests[0]
        assert verify_webhook(body, headers, made.secret or "").type == "webhook.test"
        assert anneal.redeliver(test.id).status == "pending"
        assert [d.id for d in anneal.deliveries(webhook_id=made.id, status="pending")] == [test.id]
        assert anneal.rotate_webhook_secret(made.id).secret != made.secret
        assert anneal.change_webhook(made.id, enabled=False).enabled is False
        assert list(anneal.deliveries(status="pending")) == []
        anneal.delete_webhook(made.id)
        assert list(anneal.webhooks()) == []
        with pytest.raises(NotFound):
            anneal.test_webhook(made.id)
