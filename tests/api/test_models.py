"""Uploading, listing, downloading and deleting models and data sets."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from app.blobs.content import blob_key
from app.blobs.references import keep_result
from app.db.orm import LOCAL_TENANT, Blob, Job, StageResult
from app.http.services import Services
from app.settings import Settings
from tests.api.conftest import assert_problem, files_in


def digest_header(content: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


def stored(services: Services, sha256: str) -> bool:
    with services.db.read() as session:
        row = session.get(Blob, (LOCAL_TENANT, sha256)) is not None
    assert row == (services.content.store.size(blob_key(LOCAL_TENANT, sha256)) is not None)
    return row


def no_scratch(settings: Settings) -> bool:
    return not files_in(settings.temp_dir)


def test_raw_upload(client: httpx.Client, model_bytes: bytes, services: Services, settings: Settings) -> None:
    sha256 = hashlib.sha256(model_bytes).hexdigest()
    response = client.post(
        "/v1/models?name=My model&filename=a.onnx",
        content=model_bytes,
        headers={"Content-Digest": "sha-512=:AAAA:, " + digest_header(model_bytes)},
    )
    assert response.status_code == 201
    body = response.json()
    assert response.headers["location"] == f"/v1/models/{body['id']}" == body["links"]["self"]
    assert body["id"].startswith("mdl_")
    assert (body["name"], body["filename"], body["format"]) == ("My model", "a.onnx", "onnx")
    assert (body["sha256"], body["size_bytes"], body["opset"]) == (sha256, len(model_bytes), 17)
    assert body["inputs"][0]["dtype"] == "float32"
    assert body["inputs"][0]["shape"][0] == "batch"
    assert body["created_at"].endswith("Z")
    assert client.get(body["links"]["self"]).json() == body
    assert client.get(body["links"]["download"]).content == model_bytes
    assert stored(services, sha256)
    assert no_scratch(settings)


def test_default_name_is_the_file_stem(client: httpx.Client, model_bytes: bytes) -> None:
    assert client.post("/v1/models?filename=best.onnx", content=model_bytes).json()["name"] == "best"


@pytest.mark.parametrize("with_digest", [True, False])
def test_multipart_upload(client: httpx.Client, model_bytes: bytes, settings: Settings, with_digest: bool) -> None:
    files = {"file": ("ä.onnx", model_bytes, "application/octet-stream")}
    request = client.build_request("POST", "/v1/models", files=files, data={"name": "from a form"})
    if with_digest:
        request.headers["Content-Digest"] = digest_header(request.read())
    response = client.send(request)
    assert response.status_code == 201, response.text
    assert response.json()["name"] == "from a form"
    assert response.json()["filename"] == "ä.onnx"
    assert response.json()["sha256"] == hashlib.sha256(model_bytes).hexdigest()
    assert (
        "filename*=UTF-8''%C3%A4.onnx"
        in client.get(response.json()["links"]["download"]).headers["content-disposition"]
    )
    assert no_scratch(settings)


def test_bad_forms(client: httpx.Client, settings: Settings) -> None:
    for body in (
        b"",
        b"not a form",
        b"--b\r\nContent-Disposition: form-data; name=other\r\n\r\nx\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.onnx"\r\n\r\nhalf',
        b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n\xff\r\n--b--\r\n',
        b"--b\r\nX: " + b"x" * 20_000 + b"\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\nContent-Disposition: form-data; name=a\r\n\r\nx\r\n" * 20 + b"--b--\r\n",
    ):
        response = client.post("/v1/models", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
        assert_problem(response, 422, "invalid_multipart")
    assert no_scratch(settings)


def test_form_without_boundary(client: httpx.Client) -> None:
    response = client.post("/v1/models", content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert_problem(response, 422, "invalid_multipart")


def test_wrong_digest_leaves_nothing(client: httpx.Client, model_bytes: bytes, settings: Settings) -> None:
    for header in ("Content-Digest", "Repr-Digest"):
        headers = {header: digest_header(model_bytes + b"x")}
        response = client.post("/v1/models?filename=a.onnx", content=model_bytes, headers=headers)
        assert_problem(response, 422, "digest_mismatch")
    response = client.post("/v1/models", content=b"x", headers={"Content-Digest": "sha-256=:AAAA:"})
    assert_problem(response, 422, "invalid_digest")
    response = client.post("/v1/models", content=b"x", headers={"Content-Digest": "sha-256=abc"})
    assert_problem(response, 422, "invalid_digest")
    assert no_scratch(settings)
    assert client.get("/v1/models").json()["items"] == []
    assert not files_in(settings.home_dir / "blobs")


def test_not_a_model(client: httpx.Client, settings: Settings, model_bytes: bytes) -> None:
    for content in (b"", b"hello", model_bytes[: len(model_bytes) // 2]):
        problem = assert_problem(client.post("/v1/models?filename=a.onnx", content=content), 422, "invalid_model")
        assert problem["detail"]
    assert no_scratch(settings)
    assert not files_in(settings.home_dir / "blobs")


def test_too_large(client: httpx.Client, settings: Settings) -> None:
    def endless() -> Any:
        for _ in range(80):
            yield bytes(1 << 20)

    problem = assert_problem(client.post("/v1/models", content=endless()), 413, "too_large")
    assert problem["limit"] == 64 << 20
    assert no_scratch(settings)


def test_bad_names(client: httpx.Client, model_bytes: bytes, settings: Settings) -> None:
    for params in (
        {"name": ""},
        {"name": "x" * 201},
        {"name": "a\x00b"},
        {"name": "a\nb"},
        {"filename": "../a.onnx"},
        {"filename": "a\\b.onnx"},
        {"filename": "\x00"},
        {"filename": "ä" * 200},
        {"filename": ".."},
    ):
        response = client.post("/v1/models", params={"filename": "a.onnx", **params}, content=model_bytes)
        problem = assert_problem(response, 422, "invalid_request")
        assert problem["errors"][0]["pointer"] in ("/name", "/filename")
    assert no_scratch(settings)


def test_encoded_body(client: httpx.Client) -> None:
    response = client.post("/v1/models", content=b"x", headers={"Content-Encoding": "gzip"})
    assert_problem(response, 415, "unsupported_encoding")


def test_bad_json(client: httpx.Client) -> None:
    for body in (b"", b"{", b"[]", b'{"upload_id": 1}', b'{"upload_id": "x", "extra": 1}', b"\xff"):
        response = client.post("/v1/models", content=body, headers={"Content-Type": "application/json"})
        assert_problem(response, 422, "invalid_request")


def test_idempotency(client: httpx.Client, model_bytes: bytes, npz: Callable[..., bytes]) -> None:
    def send(content: bytes, name: str = "a", kind: str = "models") -> Any:
        params = {"name": name, "filename": "a.onnx"}
        return client.post(f"/v1/{kind}", params=params, content=content, headers={"Idempotency-Key": "k 1"})

    first, again = send(model_bytes), send(model_bytes)
    assert first.status_code == again.status_code == 201
    assert first.json() == again.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert len(client.get("/v1/models").json()["items"]) == 1
    assert_problem(send(model_bytes, name="b"), 409, "idempotency_conflict")
    assert_problem(send(npz(x=np.zeros((2, 2))), kind="datasets"), 409, "idempotency_conflict")
    bad = client.post("/v1/models", content=model_bytes, headers={"Idempotency-Key": "x" * 256})
    assert_problem(bad, 422, "invalid_request")


def test_a_key_whose_resource_was_deleted_makes_no_other(client: httpx.Client, model_bytes: bytes) -> None:
    headers = {"Idempotency-Key": "k"}
    first = client.post("/v1/models?filename=a.onnx", content=model_bytes, headers=headers)
    assert client.delete(first.json()["links"]["self"]).status_code == 204
    again = client.post("/v1/models?filename=a.onnx", content=model_bytes, headers=headers)
    assert "new Idempotency-Key" in assert_problem(again, 409, "idempotency_resource_gone")["remedy"]


def test_pages(client: httpx.Client, model_bytes: bytes) -> None:
    made = [client.post(f"/v1/models?name=m{i}", content=model_bytes).json()["id"] for i in range(5)]
    seen: list[str] = []
    cursor = None
    while True:
        params = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = client.get("/v1/models", params=params).json()
        seen += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
        assert len(page["items"]) == 2
    assert seen == made[::-1]
    assert [m["name"] for m in client.get("/v1/models?name=m3").json()["items"]] == ["m3"]
    assert client.get("/v1/models?unknown=1").status_code == 200
    for cursor in ("x", "AAAA", "%00", "ä", base64.urlsafe_b64encode(b"mdl_' OR 1=1").decode()):
        assert_problem(client.get("/v1/models", params={"cursor": cursor}), 422, "invalid_cursor")
    for limit in ("0", "201", "x"):
        assert_problem(client.get("/v1/models", params={"limit": limit}), 422, "invalid_request")
    assert_problem(client.get("/v1/models", params={"name": "\x00"}), 422, "invalid_request")


def test_unknown_ids(client: httpx.Client) -> None:
    for path in ("mdl_0123", "job_1", "x", "%00", "mdl_%00", "mdl_%ff", "mdl_" + "0" * 90):
        for suffix in ("", "/download"):
            assert_problem(client.get(f"/v1/models/{path}{suffix}"), 404, "not_found")
        assert_problem(client.delete(f"/v1/models/{path}"), 404, "not_found")


def test_delete_removes_bytes_with_the_last_use(
    client: httpx.Client, model: dict[str, Any], model_bytes: bytes, services: Services
) -> None:
    twin = client.post("/v1/models?name=twin", content=model_bytes).json()
    assert client.delete(model["links"]["self"]).status_code == 204
    assert_problem(client.get(model["links"]["self"]), 404, "not_found")
    assert stored(services, model["sha256"])
    assert client.get(twin["links"]["download"]).content == model_bytes
    assert client.delete(twin["links"]["self"]).status_code == 204
    assert not stored(services, model["sha256"])
    again = client.post("/v1/models", content=model_bytes)
    assert client.get(again.json()["links"]["download"]).content == model_bytes


def test_delete_keeps_what_the_stage_cache_needs(
    client: httpx.Client, model: dict[str, Any], services: Services
) -> None:
    outputs = {"model": [{"name": "model.onnx", "sha256": model["sha256"], "size_bytes": 1}]}
    row = StageResult(tenant_id=LOCAL_TENANT, key="0" * 64, stage="export", outputs=outputs, data={}, seconds=1.0)
    with services.db.write() as uow:
        keep_result(uow.session, row)
    assert client.delete(model["links"]["self"]).status_code == 204
    assert stored(services, model["sha256"])


def test_delete_in_use(client: httpx.Client, job: dict[str, Any], services: Services) -> None:
    problem = assert_problem(client.delete(job["links"]["model"]), 409, "in_use")
    assert job["id"] in problem["detail"]
    client.post(job["links"]["cancel"])
    assert client.delete(job["links"]["model"]).status_code == 204


def test_dataset(client: httpx.Client, npz: Callable[..., bytes], job: dict[str, Any], services: Services) -> None:
    content = npz(input=np.zeros((6, 8), np.float32), labels=np.zeros(6, np.int64))
    response = client.post("/v1/datasets?filename=d.npz", content=content)
    assert response.status_code == 201, response.text
    body = response.json()
    assert body["id"].startswith("dst_")
    assert body["samples"] == 6
    assert {a["name"]: (a["dtype"], a["shape"]) for a in body["arrays"]} == {
        "input": ("float32", [8]),
        "labels": ("int64", []),
    }
    assert client.get("/v1/datasets").json()["items"] == [body]
    assert client.get(body["links"]["download"]).content == content
    with services.db.write() as uow:
        row = uow.session.get_one(Job, job["id"])
        row.spec = {**row.spec, "validation": {**row.spec["validation"], "dataset_id": body["id"]}}
    assert_problem(client.delete(body["links"]["self"]), 409, "in_use")
    client.post(job["links"]["cancel"])
    assert client.delete(body["links"]["self"]).status_code == 204


def test_pickled_dataset(client: httpx.Client, npz: Callable[..., bytes]) -> None:
    content = npz(input=np.array([{}, {}], dtype=object))
    response = client.post("/v1/datasets?filename=d.npz", content=content)
    assert response.status_code == 422
    assert response.json()["code"] in ("invalid_dataset", "dataset_pickled")
