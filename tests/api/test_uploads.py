"""Upload sessions."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import pytest

from app.db.base import utcnow
from app.db.orm import Upload
from app.http.services import Services
from app.settings import LimitSettings, Settings
from app.uploads.parts import MAX_PARTS, part_size
from tests.api.conftest import assert_problem, files_in
from tests.factories import onnx_models

PART = 5 << 20


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"limits": LimitSettings(part_bytes=PART, upload_bytes=1 << 30)})


@pytest.fixture(scope="module")
def large_model() -> bytes:
    """A model of three parts."""
    return onnx_models.mlp(features=1024, hidden=3000).SerializeToString()


def open_upload(client: httpx.Client, content: bytes, **fields: Any) -> dict[str, Any]:
    body = {"filename": "big.onnx", "size_bytes": len(content), **fields}
    response = client.post("/v1/uploads", json=body)
    assert response.status_code == 201, response.text
    assert response.headers["location"] == response.json()["links"]["self"]
    return response.json()


def part(content: bytes, number: int) -> bytes:
    return content[(number - 1) * PART : number * PART]


def send_all(client: httpx.Client, upload: dict[str, Any], content: bytes) -> None:
    def send(number: int) -> httpx.Response:
        return client.put(upload["part_urls"][number - 1], content=part(content, number))

    with ThreadPoolExecutor(3) as threads:
        for response in threads.map(send, reversed(range(1, upload["parts"] + 1))):
            assert response.status_code == 200, response.text


def no_bytes(settings: Settings) -> bool:
    return not files_in(settings.home_dir / "blobs") and not files_in(settings.temp_dir)


def test_whole_way(client: httpx.Client, large_model: bytes, settings: Settings) -> None:
    sha256 = hashlib.sha256(large_model).hexdigest()
    upload = open_upload(client, large_model, sha256=sha256)
    assert (upload["part_size"], upload["parts"], upload["status"]) == (PART, 3, "open")
    assert upload["received_parts"] == []
    path = upload["links"]["self"]
    assert client.put(upload["part_urls"][2], content=part(large_model, 3)).json()["number"] == 3
    assert client.get(path).json()["received_parts"] == [{"number": 3, "size_bytes": len(large_model) - 2 * PART}]
    problem = assert_problem(client.post(f"{path}/complete"), 409, "upload_incomplete")
    assert problem["missing_parts"] == [1, 2]
    assert_problem(client.post("/v1/models", json={"upload_id": upload["id"]}), 409, "upload_not_completed")
    send_all(client, upload, large_model)
    done = client.post(f"{path}/complete")
    assert done.status_code == 200, done.text
    assert (done.json()["status"], done.json()["sha256"]) == ("completed", sha256)
    assert client.post(f"{path}/complete").json() == done.json()
    headers = {"Idempotency-Key": "once"}
    model = client.post("/v1/models", json={"name": "big", "upload_id": upload["id"]}, headers=headers)
    assert model.status_code == 201, model.text
    assert (model.json()["name"], model.json()["sha256"]) == ("big", sha256)
    again = client.post("/v1/models", json={"name": "big", "upload_id": upload["id"]}, headers=headers)
    assert again.json() == model.json()
    assert_problem(client.post("/v1/models", json={"upload_id": upload["id"]}), 409, "upload_consumed")
    assert client.get(path).json()["status"] == "consumed"
    assert client.get(model.json()["links"]["download"]).content == large_model
    assert client.delete(path).status_code == 204
    assert client.get(model.json()["links"]["download"]).content == large_model
    assert len(files_in(settings.home_dir / "blobs")) == 1
    assert not files_in(settings.temp_dir)


def test_lies_about_sizes(client: httpx.Client, large_model: bytes, settings: Settings) -> None:
    upload = open_upload(client, large_model)
    url = upload["part_urls"][0]

    def chunked(content: bytes) -> Any:
        yield content

    for content in (b"short", large_model[: PART + 1]):
        assert_problem(client.put(url, content=content), 422, "part_size_mismatch")
        problem = assert_problem(client.put(url, content=chunked(content)), 422, "part_size_mismatch")
        assert problem["expected_bytes"] == PART
    assert_problem(client.put(url, content=chunked(bytes(12 << 20))), 413, "too_large")
    assert_problem(client.put(f"{upload['links']['self']}/parts/4", content=b"x"), 422, "part_number_invalid")
    assert_problem(client.put(f"{upload['links']['self']}/parts/0", content=b"x"), 422, "invalid_request")
    assert client.get(upload["links"]["self"]).json()["received_parts"] == []
    assert not files_in(settings.temp_dir)


def test_wrong_digest(client: httpx.Client, large_model: bytes, settings: Settings) -> None:
    upload = open_upload(client, large_model, sha256="0" * 64)
    headers = {"Content-Digest": "sha-256=:" + "A" * 43 + "=:"}
    bad = client.put(upload["part_urls"][0], content=part(large_model, 1), headers=headers)
    assert_problem(bad, 422, "digest_mismatch")
    send_all(client, upload, large_model)
    assert_problem(client.post(upload["links"]["complete"]), 422, "digest_mismatch")
    assert client.get(upload["links"]["self"]).json()["status"] == "aborted"
    assert no_bytes(settings)


def test_bad_requests(client: httpx.Client) -> None:
    good = {"filename": "a.onnx", "size_bytes": 1}
    for change in ({"size_bytes": 0}, {"size_bytes": "x"}, {"filename": ""}, {"sha256": "x"}, {"extra": 1}):
        assert_problem(client.post("/v1/uploads", json={**good, **change}), 422, "invalid_request")
    for filename in ("a/b", "a\x00b", "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace") + "\n"):
        assert_problem(client.post("/v1/uploads", json={**good, "filename": filename}), 422, "invalid_request")
    assert_problem(client.post("/v1/uploads", json={**good, "size_bytes": 2 << 30}), 413, "too_large")
    assert_problem(client.get("/v1/uploads/upl_0"), 404, "not_found")
    assert_problem(client.post("/v1/models", json={"upload_id": "upl_0"}), 404, "not_found")


def test_idempotent_open(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": "k"}
    body = {"filename": "a.onnx", "size_bytes": 10}
    first = client.post("/v1/uploads", json=body, headers=headers)
    assert client.post("/v1/uploads", json=body, headers=headers).json() == first.json()
    other = client.post("/v1/uploads", json={**body, "size_bytes": 11}, headers=headers)
    assert_problem(other, 409, "idempotency_conflict")


def test_abort(client: httpx.Client, large_model: bytes, settings: Settings) -> None:
    upload = open_upload(client, large_model)
    send_all(client, upload, large_model)
    client.post(upload["links"]["complete"])
    assert client.delete(upload["links"]["self"]).status_code == 204
    assert client.delete(upload["links"]["self"]).status_code == 204
    assert_problem(client.put(f"{upload['links']['self']}/parts/1", content=b"x"), 409, "upload_closed")
    assert_problem(client.post(upload["links"]["complete"]), 409, "upload_closed")
    assert no_bytes(settings)


def test_expired_sessions_are_cleaned(
    client: httpx.Client, large_model: bytes, services: Services, settings: Settings
) -> None:
    half = open_upload(client, large_model)
    client.put(half["part_urls"][0], content=part(large_model, 1))
    whole = open_upload(client, large_model)
    send_all(client, whole, large_model)
    assert client.post(whole["links"]["complete"]).status_code == 200
    assert services.uploads.expire_uploads() == 0
    with services.db.write() as uow:
        for upload in (half, whole):
            uow.session.get_one(Upload, upload["id"]).expires_at = utcnow() - timedelta(seconds=1)
    assert_problem(client.put(half["part_urls"][1], content=part(large_model, 2)), 409, "upload_expired")
    assert services.uploads.expire_uploads() == 2
    assert services.uploads.expire_uploads() == 0
    assert client.get(half["links"]["self"]).json()["status"] == "aborted"
    assert no_bytes(settings)


def test_part_size() -> None:
    for size in (1, 64 << 20, 640 << 30, 640_000 * (1 << 20) + 1, 5 << 40):
        parts = -(-size // part_size(size, 64 << 20))
        assert 1 <= parts <= MAX_PARTS
    assert part_size(1 << 30, 64 << 20) == 64 << 20
