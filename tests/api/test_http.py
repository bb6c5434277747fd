"""What holds for every route: problem documents, keys and tenants, request ids, local protection, limits."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.db.base import make_engine
from app.db.uow import Database
from app.http.services import Services
from app.main import create_app
from app.network import is_loopback
from app.settings import Settings
from app.tenants import caller_of_key, create_key, revoke_key
from tests.api.conftest import assert_problem, serving


def test_framework_errors(client: httpx.Client) -> None:
    assert_problem(client.get("/v1/nothing"), 404, "not_found")
    assert_problem(client.get("/"), 404, "not_found")
    problem = assert_problem(client.patch("/v1/models"), 405, "method_not_allowed")
    assert "PATCH" in problem["detail"]
    assert client.patch("/v1/models").headers["allow"] == "GET, POST"
    assert client.patch("/v1/models/mdl_0").headers["allow"] == "DELETE, GET"
    assert_problem(client.request("PURGE", "/v1/models"), 405, "method_not_allowed")


def test_unhandled_errors(app: FastAPI, client: httpx.Client, services: Services) -> None:
    def broken() -> None:
        raise RuntimeError("secret detail")

    app.add_api_route("/broken", broken)
    problem = assert_problem(client.get("/broken", headers={"X-Request-ID": "abc"}), 500, "internal_error")
    assert "secret" not in str(problem)
    assert problem["request_id"] == "abc"


def test_database_away(client: httpx.Client, settings: Settings, services: Services) -> None:
    services.db.close()
    (settings.home_dir / "anneal.db").unlink()
    for suffix in ("-wal", "-shm"):
        (settings.home_dir / f"anneal.db{suffix}").unlink(missing_ok=True)
    # A new, empty file: every table is missing
    problem = assert_problem(client.get("/v1/models"), 503, "database_unavailable")
    assert "sqlite" not in str(problem).lower()
    response = client.get("/readyz")
    assert response.status_code == 503
    assert "migrations" in response.json()["missing"]


def test_request_ids(client: httpx.Client) -> None:
    assert client.get("/healthz", headers={"X-Request-ID": "a.b-c_1"}).headers["x-request-id"] == "a.b-c_1"
    for bad in ("", "a b", "x" * 129, "é".encode()):
        made = client.get("/healthz", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert made.isalnum()
    ids = {client.get("/healthz").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_json_bodies_are_limited(client: httpx.Client, settings: Settings) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * (1 << 16)

    large = b" " * ((1 << 20) + 1)
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/jobs", "/v1/uploads", "/v1/models"):
        assert_problem(client.post(path, content=large, headers=headers), 413, "too_large")
        assert_problem(client.post(path, content=chunks(), headers=headers), 413, "too_large")


def test_rebinding_and_cross_site(client: httpx.Client, base_url: str) -> None:
    host = base_url.removeprefix("http://")
    assert_problem(client.get("/v1/models", headers={"Host": "evil.example"}), 421, "wrong_host")
    assert_problem(client.get("/healthz", headers={"Host": "localhost.evil.example:80"}), 421, "wrong_host")
    body = {"filename": "a", "size_bytes": 1}
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert_problem(client.post("/v1/uploads", json=body, headers=headers), 403, "cross_origin")
    good = {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/v1/uploads", json=body, headers=good).status_code == 201


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9", True),
        ("[::1]:8000", True),
        ("", False),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("10.0.0.1", False),
        ("[::1]", True),
        ("testserver", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_wrong_key_is_refused_without_keys_too(client: httpx.Client) -> None:
    for value in ("Bearer ank_wrong", "Basic abc", "Bearer", "x", "Bearer \xff"):
        response = client.get("/v1/models", headers={"Authorization": value.encode("latin-1")})
        assert_problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.fixture
def keyed(settings: Settings) -> Iterator[tuple[str, Services]]:
    app = create_app(settings.model_copy(update={"require_keys": True}), dispatch=lambda job: True)
    with serving(app) as url:
        yield url, app.state.services


def test_keys_and_tenants(keyed: tuple[str, Services], model_bytes: bytes) -> None:
    url, services = keyed
    keys = {name: create_key(services.db, name, "test") for name in ("alice", "bob")}
    assert all(key.startswith("ank_") and len(key) == 47 for key in keys.values())

    def client(name: str) -> httpx.Client:
        return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {keys[name]}"})

    anonymous = httpx.get(f"{url}/v1/models")
    assert_problem(anonymous, 401, "unauthorized")
    assert anonymous.headers["www-authenticate"].startswith("Bearer")
    for path in ("/healthz", "/metrics", "/openapi.json"):
        assert httpx.get(url + path).status_code == 200
    with client("alice") as alice, client("bob") as bob:
        # With keys the service has names of its own
        assert alice.get("/v1/models", headers={"Host": "anneal.example"}).status_code == 200
        headers = {"Idempotency-Key": "k"}
        mine: dict[str, Any] = alice.post("/v1/models?name=a", content=model_bytes, headers=headers).json()
        for method, path in (
            ("GET", mine["links"]["self"]),
            ("GET", mine["links"]["download"]),
            ("DELETE", mine["links"]["self"]),
        ):
            assert_problem(bob.request(method, path), 404, "not_found")
        assert bob.get("/v1/models").json()["items"] == []
        spec = {"model_id": mine["id"]}
        assert_problem(bob.post("/v1/jobs", json=spec), 422, "invalid_request")
        # Neither keys nor content reach over
        theirs = bob.post("/v1/models?name=b", content=model_bytes, headers=headers).json()
        assert theirs["id"] != mine["id"]
        assert alice.delete(mine["links"]["self"]).status_code == 204
        assert bob.get(theirs["links"]["download"]).content == model_bytes
        upload = alice.post("/v1/uploads", json={"filename": "a.onnx", "size_bytes": 1}).json()
        assert_problem(bob.get(upload["links"]["self"]), 404, "not_found")
        assert_problem(bob.put(upload["part_urls"][0], content=b"x"), 404, "not_found")
        assert_problem(bob.post("/v1/models", json={"upload_id": upload["id"]}), 404, "not_found")


def test_revoked_key(keyed: tuple[str, Services]) -> None:
    url, services = keyed
    key = create_key(services.db, "alice", "one")
    assert revoke_key(services.db, key)
    assert not revoke_key(services.db, key)
    response = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert_problem(response, 401, "unauthorized")


def test_create_and_revoke_keys_from_the_command_line(settings: Settings) -> None:
    environment = {**os.environ, "ANNEAL_HOME": str(settings.home)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "app", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    made = [run("create-key", "--tenant", "alice") for _ in range(2)]
    first, second = (m.stdout.strip() for m in made)
    identifier = made[1].stderr.split()[-1]
    assert identifier.startswith("key_")
    db = Database(make_engine(settings.database))
    try:
        assert caller_of_key(db, first) is not None
        assert [run("revoke-key", first).returncode for _ in range(2)] == [0, 1]
        assert caller_of_key(db, first) is None
        assert caller_of_key(db, second) is not None, "another key of the same tenant"
        assert run("revoke-key", identifier).returncode == 0
        assert caller_of_key(db, second) is None
        assert not revoke_key(db, "key_\0\udcff")
    finally:
        db.close()


def test_only_the_hash_of_a_key_is_stored(services: Services, settings: Settings) -> None:
    key = create_key(services.db, "carol", "one")
    services.db.close()
    for path in settings.home_dir.glob("anneal.db*"):
        assert key.encode() not in path.read_bytes()
    assert hashlib.sha256(key.encode()).hexdigest()
