"""A tenant's account: keys with roles and an end, its plan, what was done in its name, how often it asks."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.client import HTTPResponse
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from app.db.accounts import ApiKey, AuditEvent
from app.db.base import utcnow
from app.domain.plan import Limits
from app.http.services import Services
from app.main import create_app
from app.settings import Settings
from app.tenants import create_key
from tests.api.conftest import assert_problem, files_in, report_worker, serving
from tests.api.test_pages import HTML, token_in
from tests.api.test_signing_in import sign_in


@pytest.fixture
def keyed(settings: Settings) -> Iterator[tuple[str, Services]]:
    app = create_app(settings.model_copy(update={"require_keys": True}), dispatch=lambda job: True)
    with serving(app) as url:
        report_worker(app.state.services)
        yield url, app.state.services


@pytest.fixture
def alice(keyed: tuple[str, Services]) -> Iterator[httpx.Client]:
    with _client(keyed[0], create_key(keyed[1].db, "alice", "first")) as client:
        yield client


def _client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=20)


def _forget(services: Services) -> None:
    """What is remembered for two seconds."""
    services.auth._known.clear()


def _actions(client: httpx.Client) -> list[str]:
    return [event["action"] for event in client.get("/v1/audit").json()["items"]]


def _limit(services: Services, **limits: int | None) -> None:
    services.tenants.put_on("alice", None, Limits.model_validate(limits), clear=True, actor="test")
    _forget(services)


def test_a_key_is_shown_once_and_does_what_its_role_says(keyed: tuple[str, Services], alice: httpx.Client) -> None:
    url, services = keyed
    response = alice.post("/v1/keys", json={"name": "ci", "role": "read", "expires_in_days": 30})
    assert response.status_code == 201
    assert response.headers["cache-control"] == "no-store"
    made = response.json()
    assert made["key"].startswith("ank_")
    assert alice.get(response.headers["location"]).json() == {k: v for k, v in made.items() if k != "key"}
    listed = alice.get("/v1/keys").json()["items"]
    assert [key["name"] for key in listed] == ["ci", "first"]
    assert made["key"] not in json.dumps(listed)
    with _client(url, made["key"]) as reader:
        account = reader.get("/v1/tenant").json()
        assert (account["name"], account["role"], account["key_id"]) == ("alice", "read", made["id"])
        assert account["key_expires_at"] == made["expires_at"]
        assert reader.get("/v1/jobs").status_code == 200
        assert_problem(reader.post("/v1/jobs", content=b"x" * 100), 403, "role_required")
        assert_problem(reader.get("/v1/keys"), 403, "role_required")
    for body in ({}, {"name": ""}, {"name": "x", "role": "root"}, {"name": "x", "expires_in_days": 0}, {"name": "\x07"},
                 {"name": "x", "expires_in_days": 10**9}, {"name": "x", "more": 1}):  # fmt: skip
        assert_problem(alice.post("/v1/keys", json=body), 422, "invalid_request")
    assert alice.delete(f"/v1/keys/{made['id']}").status_code == 204
    assert alice.delete(f"/v1/keys/{made['id']}").status_code == 204
    assert_problem(alice.delete("/v1/keys/key_0"), 404, "not_found")
    _forget(services)
    with _client(url, made["key"]) as reader:
        assert_problem(reader.get("/v1/tenant"), 401, "unauthorized")
    assert sorted(_actions(alice)) == ["key.create", "key.create", "key.revoke", "tenant.create"]


def test_a_key_ends_by_itself_and_is_replaced_before(keyed: tuple[str, Services], alice: httpx.Client) -> None:
    url, services = keyed
    made = alice.post("/v1/keys", json={"name": "nightly", "role": "submit", "expires_in_days": 10}).json()
    new = alice.post(f"/v1/keys/{made['id']}/rotate", json={"grace_seconds": 3600}).json()
    assert (new["name"], new["role"]) == ("nightly", "submit")
    assert new["key"] != made["key"]
    for key in (made["key"], new["key"]):
        with _client(url, key) as client:
            assert client.get("/v1/jobs").status_code == 200
    old = alice.get(f"/v1/keys/{made['id']}").json()
    assert old["expires_at"] < made["expires_at"], "an hour, not ten days"
    with services.db.write() as uow:
        uow.session.execute(update(ApiKey).where(ApiKey.id == made["id"]).values(expires_at=utcnow()))
    _forget(services)
    with _client(url, made["key"]) as client:
        assert "expired" in assert_problem(client.get("/v1/jobs"), 401, "unauthorized")["detail"]
    with sign_in(url, made["key"]) as (_, response):
        assert response.status_code == 403
    assert_problem(alice.post(f"/v1/keys/{made['id']}/rotate"), 409, "key_ended")
    now = alice.post(f"/v1/keys/{new['id']}/rotate", json={"grace_seconds": 0}).json()
    _forget(services)
    with _client(url, new["key"]) as client:
        assert_problem(client.get("/v1/jobs"), 401, "unauthorized")
    with _client(url, now["key"]) as client:
        assert client.get("/v1/jobs").status_code == 200


def test_a_key_that_ends_is_not_remembered_beyond_its_end(keyed: tuple[str, Services], alice: httpx.Client) -> None:
    url, services = keyed
    made = alice.post("/v1/keys", json={"name": "short", "role": "read"}).json()
    with services.db.write() as uow:
        soon = utcnow() + timedelta(seconds=0.3)
        uow.session.execute(update(ApiKey).where(ApiKey.id == made["id"]).values(expires_at=soon))
    with _client(url, made["key"]) as client:
        seen = {client.get("/v1/jobs").status_code}
        time.sleep(0.4)
        seen.add(client.get("/v1/jobs").status_code)
    assert 401 in seen
    assert seen <= {200, 401}


def test_uses_are_noted_once_a_minute(keyed: tuple[str, Services], alice: httpx.Client) -> None:
    services = keyed[1]
    key_id = alice.get("/v1/tenant").json()["key_id"]

    def last() -> Any:
        with services.db.read() as session:
            return session.scalar(select(ApiKey.last_used_at).where(ApiKey.id == key_id))

    uses = services.auth.uses
    assert [*uses._due] == [key_id]
    asyncio.run(uses.write())
    first = last()
    assert first is not None
    _forget(services)
    assert alice.get("/v1/keys").json()["items"][0]["last_used_at"] is not None
    assert not uses._due, "a use of this minute stands there"
    uses._due[key_id] = utcnow()  # as another process would, that had not seen it
    asyncio.run(uses.write())
    assert last() == first


def test_a_tenant_that_is_switched_off_is_let_in_nowhere(keyed: tuple[str, Services], alice: httpx.Client) -> None:
    url, services = keyed
    key = alice.headers["Authorization"].removeprefix("Bearer ")
    with sign_in(url, key) as (browser, _):
        assert browser.get("/jobs").status_code == 200
        services.tenants.switch("alice", on=False, actor="operator:test")
        _forget(services)
        assert_problem(alice.get("/v1/jobs"), 403, "tenant_disabled")
        assert_problem(alice.post("/v1/jobs", json={}), 403, "tenant_disabled")
        page = browser.get("/jobs")
        assert page.status_code == 403
        assert "switched off" in page.text
    with sign_in(url, key) as (_, response):
        assert response.status_code == 403
    services.tenants.switch("alice", on=True, actor="operator:test")
    assert alice.get("/v1/jobs").status_code == 200
    assert {"tenant.disable", "tenant.enable", "session.begin", "session.refuse"} <= set(_actions(alice))


def test_what_was_done_is_told_with_who_did_it_and_no_secret(
    keyed: tuple[str, Services], alice: httpx.Client, model_bytes: bytes
) -> None:
    url, services = keyed
    key = alice.headers["Authorization"].removeprefix("Bearer ")
    model = alice.post("/v1/models?name=m&filename=m.onnx", content=model_bytes).json()
    job = alice.post("/v1/jobs", json={"model_id": model["id"]}).json()
    alice.post(job["links"]["cancel"])
    upload = alice.post("/v1/uploads", json={"filename": "u.onnx", "size_bytes": 1}).json()
    alice.delete(upload["links"]["self"])
    alice.delete(model["links"]["self"])
    with sign_in(url, key):
        pass
    with sign_in(url, "ank_" + "wrong" * 8):
        pass
    events = alice.get("/v1/audit?limit=6").json()
    own = alice.get("/v1/tenant").json()["key_id"]
    done = [(e["action"], e["resource"]) for e in events["items"]]
    expected = [("session.begin", own), ("model.delete", model["id"]), ("upload.abort", upload["id"])]
    expected += [("upload.create", upload["id"]), ("job.cancel", job["id"]), ("job.submit", job["id"])]
    assert done == expected
    assert {e["actor"] for e in events["items"]} == {f"key:{own}"}
    rest = alice.get(f"/v1/audit?limit=6&cursor={events['next_cursor']}").json()
    assert rest["items"][0]["action"] == "model.create"
    assert {e["action"] for e in rest["items"][1:]} == {"key.create", "tenant.create"}
    assert rest["next_cursor"] is None
    (submitted,) = alice.get("/v1/audit?action=job.submit").json()["items"]
    assert submitted["resource"] == job["id"]
    with services.db.read() as session:
        rows = [*session.scalars(select(AuditEvent))]
    assert [r.tenant_id for r in rows if r.action == "session.refuse"] == [None], "of what is no key: in nobody's name"
    text = json.dumps([[r.actor, r.resource, r.detail] for r in rows])
    assert key not in text
    assert "wrongwrong" not in text


def test_what_is_refused_leaves_no_row(keyed: tuple[str, Services], alice: httpx.Client) -> None:
    before = _actions(alice)
    assert_problem(alice.post("/v1/jobs", json={"model_id": "mdl_0"}), 422, "invalid_request")
    assert_problem(alice.delete("/v1/models/mdl_0"), 404, "not_found")
    assert _actions(alice) == before


# Plans


def test_more_bytes_than_the_plan_has_are_refused_and_nothing_of_them_stays(
    keyed: tuple[str, Services], alice: httpx.Client, model_bytes: bytes
) -> None:
    services = keyed[1]
    target, size = "/v1/models?name=m&filename=m.onnx", len(model_bytes)
    model = alice.post(target, content=model_bytes).json()
    _limit(services, stored_bytes=size - 1)  # less than is stored already
    assert alice.get(model["links"]["download"]).content == model_bytes, "what is there stays"
    for headers in ({}, {"Idempotency-Key": "k"}):
        refused = alice.post(target, content=model_bytes + b"\n", headers=headers)
        problem = assert_problem(refused, 413, "storage_quota")
        assert (problem["used"], problem["allowed"], problem["needed"]) == (size, size - 1, size + 1)
        assert problem["remedy"]
    again = alice.post(target, content=model_bytes, headers={"Idempotency-Key": "same bytes"})
    assert again.status_code == 201, "what is stored already takes no further room"
    assert_problem(alice.post("/v1/uploads", json={"filename": "u", "size_bytes": 1}), 413, "storage_quota")
    assert_problem(alice.post("/v1/jobs", json={"model_id": model["id"]}), 413, "storage_quota")
    assert len(files_in(services.settings.home_dir / "blobs")) == 1

    _limit(services, stored_bytes=size + 100)
    upload = alice.post("/v1/uploads", json={"filename": "u", "size_bytes": 60})
    assert upload.status_code == 201
    assert_problem(alice.post("/v1/uploads", json={"filename": "u", "size_bytes": 60}), 413, "storage_quota")
    usage = alice.get("/v1/tenant").json()
    assert usage["usage"]["upload_bytes"] == 60
    assert usage["limits"]["stored_bytes"] == size + 100
    assert alice.delete(upload.json()["links"]["self"]).status_code == 204
    assert alice.post("/v1/uploads", json={"filename": "u", "size_bytes": 60}).status_code == 201


def _unended(url: str, key: str, how: str) -> tuple[int, str]:
    """The answer, status and code, to a body that never ends. `how`: its length is told, beside an Idempotency-Key or
    as a form, and nothing of it is sent; or nobody tells it, and some of it is."""
    lines = ["POST /v1/models?name=m&filename=m.onnx HTTP/1.1", "Host: x", f"Authorization: Bearer {key}"]
    lines.append("Transfer-Encoding: chunked" if how == "chunked" else f"Content-Length: {8 << 20}")
    lines.append("Content-Type: multipart/form-data; boundary=b" if how == "form" else "Idempotency-Key: k")
    begun = b"%x\r\n%s\r\n" % (256 << 10, bytes(256 << 10)) if how == "chunked" else b""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + begun)
        answer = HTTPResponse(connection)
        answer.begin()
        return answer.status, json.loads(answer.read())["code"]


@pytest.mark.parametrize("how", ["with a key", "form", "chunked"])
def test_a_body_that_the_plan_has_no_room_for_is_not_received_first(
    keyed: tuple[str, Services], alice: httpx.Client, model_bytes: bytes, how: str
) -> None:
    url, services = keyed
    key = alice.headers["Authorization"].removeprefix("Bearer ")
    _limit(services, stored_bytes=100 << 10)
    assert alice.post("/v1/models?name=m&filename=m.onnx", content=model_bytes).status_code == 201
    assert _unended(url, key, how) == (413, "storage_quota")
    _limit(services, stored_bytes=1)  # less than there is: what is there may be sent again, whoever cannot tell
    target, again = "/v1/models?name=m&filename=m.onnx", {"Idempotency-Key": "again"}
    assert alice.post(target, content=model_bytes, headers=again).status_code == 201
    assert alice.post(target, files={"file": ("m.onnx", model_bytes)}).status_code == 201
    assert alice.post(target, content=iter([model_bytes])).status_code == 201
    assert _unended(url, key, how) == (413, "storage_quota")


def test_a_model_larger_than_the_plan_takes(
    keyed: tuple[str, Services], alice: httpx.Client, model_bytes: bytes
) -> None:
    _limit(keyed[1], model_bytes=len(model_bytes) - 1)
    target = "/v1/models?name=m&filename=m.onnx"
    for headers in ({}, {"Idempotency-Key": "k"}):
        problem = assert_problem(alice.post(target, content=model_bytes, headers=headers), 413, "model_quota")
        assert problem["allowed"] == len(model_bytes) - 1
    upload = alice.post("/v1/uploads", json={"filename": "m.onnx", "size_bytes": len(model_bytes)}).json()
    alice.put(upload["part_urls"][0], content=model_bytes)
    assert alice.post(upload["links"]["complete"]).status_code == 200
    assert_problem(alice.post("/v1/models", json={"upload_id": upload["id"]}), 413, "model_quota")
    assert alice.get("/v1/models").json()["items"] == []


def test_jobs_beyond_the_plan_wait_outside(
    keyed: tuple[str, Services], alice: httpx.Client, model_bytes: bytes
) -> None:
    model = alice.post("/v1/models?name=m&filename=m.onnx", content=model_bytes).json()
    _limit(keyed[1], active_jobs=2)

    def submit(_: int) -> httpx.Response:
        return alice.post("/v1/jobs", json={"model_id": model["id"]})

    with ThreadPoolExecutor(6) as threads:
        answers = [*threads.map(submit, range(6))]
    assert sorted(a.status_code for a in answers) == [202, 202, 429, 429, 429, 429], "however they race"
    problem = assert_problem(next(a for a in answers if a.status_code == 429), 429, "too_many_jobs")
    assert (problem["used"], problem["allowed"], problem["retryable"]) == (2, 2, True)
    (job, _) = [a.json() for a in answers if a.status_code == 202]
    assert alice.post(job["links"]["cancel"]).status_code == 202
    assert submit(0).status_code == 202
    usage = alice.get("/v1/tenant").json()["usage"]
    assert (usage["jobs_queued"], usage["jobs_running"]) == (2, 0)


@pytest.mark.usefixtures("one_minute")
def test_one_who_asks_too_often_is_told_when_to_come_again(keyed: tuple[str, Services], alice: httpx.Client) -> None:
    url, services = keyed
    assert "ratelimit-limit" not in alice.get("/v1/jobs").headers
    _limit(services, requests_per_minute=3)
    left = [int(alice.get("/v1/jobs").headers["ratelimit-remaining"]) for _ in range(3)]
    assert left == [2, 1, 0]
    response = alice.get("/v1/jobs")
    problem = assert_problem(response, 429, "too_many_requests")
    assert problem["retryable"]
    assert 1 <= int(response.headers["retry-after"]) <= 120
    assert response.headers["ratelimit-limit"] == "3"
    with _client(url, create_key(services.db, "bob", "b")) as bob:
        assert bob.get("/v1/jobs").status_code == 200, "another tenant's are its own"
    _limit(services, requests_per_minute=0)
    assert_problem(alice.get("/v1/jobs"), 429, "too_many_requests")
    _limit(services)
    assert alice.get("/v1/jobs").status_code == 200


@pytest.mark.usefixtures("one_minute")
def test_an_address_may_not_ask_with_wrong_keys_without_end(settings: Settings) -> None:
    limits = settings.limits.model_copy(update={"wrong_keys_per_minute": 3})
    app = create_app(settings.model_copy(update={"require_keys": True, "limits": limits}), dispatch=lambda job: True)
    with serving(app) as url, httpx.Client(base_url=url) as client:
        assert {client.get("/v1/jobs").status_code for _ in range(5)} == {401}, "with none: nobody tries anything"
        answers = [client.get("/v1/jobs", headers={"Authorization": f"Bearer ank_{n}"}) for n in range(5)]
        assert [answer.status_code for answer in answers] == [401, 401, 401, 429, 429]
        assert_problem(answers[-1], 429, "too_many_requests")
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 120
        right = create_key(app.state.services.db, "alice", "a")
        assert client.get("/v1/jobs", headers={"Authorization": f"Bearer {right}"}).status_code == 200


@pytest.mark.usefixtures("one_minute")
def test_an_address_may_not_try_keys_without_end(settings: Settings) -> None:
    limits = settings.limits.model_copy(update={"sign_ins_per_minute": 3})
    app = create_app(settings.model_copy(update={"require_keys": True, "limits": limits}), dispatch=lambda job: True)
    with serving(app) as url, httpx.Client(base_url=url, headers=HTML) as browser:
        data = {"csrf": token_in(browser.get("/login")), "key": "ank_wrong"}
        codes = [browser.post("/login", data=data).status_code for _ in range(5)]
        assert codes == [403, 403, 403, 429, 429]
        assert "Retry-After" in browser.post("/login", data=data).headers


# Pages


def test_an_admin_makes_and_revokes_keys_on_a_page(keyed: tuple[str, Services], alice: httpx.Client) -> None:
    url, services = keyed
    key = alice.headers["Authorization"].removeprefix("Bearer ")
    with sign_in(url, key) as (browser, _):
        token = token_in(browser.get("/keys"))
        form = {"csrf": token, "name": "<b>ci", "role": "read", "days": "7"}
        assert browser.post("/keys", data={**form, "csrf": "0" * 64}).status_code == 403
        made = browser.post("/keys", data=form)
        assert made.status_code == 201
        assert made.headers["cache-control"] == "no-store"
        secret = made.text.partition('id="made-key">')[2].partition("<")[0]
        assert secret.startswith("ank_")
        assert "&lt;b&gt;ci" in made.text
        assert "<b>ci" not in made.text
        assert secret not in browser.get("/keys").text
        for wrong in ({"name": ""}, {"role": "root"}, {"days": "0"}, {"days": "x"}, {"days": "9" * 30}):
            assert browser.post("/keys", data={**form, **wrong}).status_code == 422, wrong
        account = browser.get("/account").text
        assert "alice" in account
        assert "default" in account
        with sign_in(url, secret) as (reader, answer):
            assert answer.status_code == 303
            page = reader.get("/models").text
            assert "data-upload" not in page
            assert "/jobs/new" not in page
            assert reader.get("/account").status_code == 200
            assert reader.get("/keys").status_code == 403
            own = token_in(reader.get("/models"))
            assert reader.post("/jobs", data={"csrf": own, "model": "mdl_0"}).status_code == 403
            assert reader.post("/keys", data={"csrf": own, "name": "x"}).status_code == 403
            (row,) = [k for k in alice.get("/v1/keys").json()["items"] if k["role"] == "read"]
            assert reader.post(f"/keys/{row['id']}/revoke", data={"csrf": own}).status_code == 403
            revoked = browser.post(f"/keys/{row['id']}/revoke", data={"csrf": token_in(browser.get("/keys"))})
            assert revoked.headers["location"] == "/keys"
            _forget(services)
            assert reader.get("/models").status_code == 303, "a browser's session ends with its key"
        assert browser.post("/keys/key_0/revoke", data={"csrf": token}).status_code == 404
